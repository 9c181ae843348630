"""Checkpoints of this package read by transformers 4, which no environment can have beside version 5.

`make test-reader-4` runs `write` with the one and `read` with the other; the second needs nothing of this package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NATIVE = ("theta", "ntk", "linear", "yarn", "yarn(attention_factor=1.5)", "yarn+resonance", "llama3", "longrope")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "starcoder2", "cohere2", "smollm3")
STOPPED = ("rerope", "dynamic-ntk", "log-n")
REFUSED = {
    "olmo2": "families",
    "gpt_neox": "families of transformers 4",
    "phi": "families",
    "gemma3_text": "layer types",
}
CHECKPOINT = "checkpoint-7"
"""Directory in which `Trainer` has to find `rope_parameters` alone."""


def write(root: Path) -> None:
    """Checkpoints with their logits, and which exports are refused."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_posext import LongRoPE, patch_model
    from hf_posext.errors import ExportError
    from hf_posext.export import export_checkpoint
    from tests.conftest import TRAINED, logits, sharpen, tokens

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def build(family: str) -> AutoModelForCausalLM:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **sizes, **heads, **special)
        return sharpen(AutoModelForCausalLM.from_config(config))

    ids, expected = tokens(3 * TRAINED), {}
    cases = [("llama", method) for method in (*NATIVE, *STOPPED)] + [(family, "yarn") for family in FAMILIES[1:]]
    for family, method in cases:
        if method == "longrope":
            lists = {"long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0], "short_factor": [1.0] * 7 + [1.25]}
            plan: str | LongRoPE = LongRoPE(**lists)
        else:
            plan = method
        model, name = build(family), f"{family}-{method}"
        patch = patch_model(model, plan, factor=4)
        if family == "llama":
            model.save_pretrained(root / f"{name}-by-itself")  # as trainer.save_model does
        if method in STOPPED:
            patch.save_pretrained(root / name)
            continue
        export_checkpoint(model, root / name, "transformers-4")
        expected[name] = logits(model, ids)
        if family == "llama":
            expected[f"{name}-by-itself"] = expected[name].clone()
    for family, reason in REFUSED.items():
        model = build(family)
        patch_model(model, "yarn", factor=4)
        try:
            export_checkpoint(model, root / family, "transformers-4")
        except ExportError as error:
            assert reason in str(error), error
        else:
            raise AssertionError(f"{family} was exported for transformers 4")
        model.save_pretrained(root / family)
    model = build("llama")
    patch_model(model, "yarn", factor=4)
    model.save_pretrained(root / CHECKPOINT)
    export_checkpoint(model, root / "vllm", "vllm")
    save_file({"ids": ids, **expected}, root / "expected.safetensors")


def read(root: Path) -> None:
    """Open all of them by transformers 4."""
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    expected = load_file(root / "expected.safetensors")
    ids = expected.pop("ids")
    for name, logits in expected.items():
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(root / name, output_loading_info=True)
        assert not loaded["missing_keys"], loaded
        with torch.no_grad():
            difference = (model.eval()(ids).logits - logits).abs().max() / logits.abs().max()
        print(f"{name}: {float(difference):.1e}")
        assert difference < 1e-5, name  # sums of float32 in another order
    stopped = [f"llama-{method}{writer}" for method in STOPPED for writer in ("", "-by-itself")]
    for path in (root / name for name in (*stopped, *REFUSED, CHECKPOINT, "vllm")):
        plan = json.loads((path / "config.json").read_text())["posext_plan"]["method"]
        try:
            transformers.AutoModelForCausalLM.from_pretrained(path)
        except ValueError as error:
            assert f"hf_posext plan ({plan}: 64 -> 256" in str(error), error
            print(f"{path.name}: stops")
        else:
            raise AssertionError(f"{path.name} was opened as another model")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
