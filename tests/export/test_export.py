"""Exports run elsewhere: in plain transformers to the bit, in servers by the formulas of their sources."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_posext import LongRoPE, SelfExtend, YaRN, find_patch, load_patched, patch_model
from hf_posext.errors import ExportError, InvalidParameterError, NotPatchedError, UnsupportedModelError
from hf_posext.escaping import render
from hf_posext.export import SERVERS, Serving, export_checkpoint
from tests.adapters.helpers import files, with_adapter
from tests.conftest import TRAINED, logits, realigned, sharpen, tiny_bloom, tiny_gpt2, tiny_llama, tiny_t5, tokens
from tests.helpers import ROOT, run_python, shipped_tokenizer

IDS = tokens(3 * TRAINED)
LONG, SHORT = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0], [1.0] * 7 + [1.25]
TWO_LISTS = LongRoPE(long_factor=LONG, short_factor=SHORT)
PLAIN: dict[str, Any] = {
    "theta": (tiny_llama, "theta"),
    "linear": (tiny_llama, "linear"),
    "yarn": (tiny_llama, "yarn"),
    "temperature": (tiny_llama, YaRN(attention_factor=1.5)),
    "resonance": (tiny_llama, "yarn+resonance"),
    "llama3": (tiny_llama, "llama3"),
    "two lists": (tiny_llama, TWO_LISTS),
    "partial": (tiny_llama, "partial"),
    "table": (tiny_gpt2, "table-linear"),
}

WITHOUT_US = """
import sys
sys.modules["hf_posext"] = None  # importing it raises
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, found = load_file(sys.argv[1])["ids"], {}
for path in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found[path] = model(input_ids=ids).logits
    found[path + " limit"] = torch.tensor(model.config.max_position_embeddings)
save_file(found, sys.argv[2])
"""


def without_us(paths: list[Path], directory: Path) -> dict[str, torch.Tensor]:
    """Logits by path, of a process in which this package cannot be imported."""
    from safetensors.torch import save_file

    inputs, outputs = directory / "ids.safetensors", directory / "found.safetensors"
    save_file({"ids": IDS}, inputs)
    assert "Unrecognized keys" not in run_python("-c", WITHOUT_US, inputs, outputs, *paths).stderr
    return load_file(outputs)


def export(method: Any, path: Path, to: str, model: PreTrainedModel | None = None) -> tuple[PreTrainedModel, Serving]:
    model = model or tiny_llama()
    patch_model(model, method, factor=4)
    return model, export_checkpoint(model, path, to)


def config_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "config.json").read_text()))


def test_plain_transformers_in_a_fresh_process(tmp_path: Path) -> None:
    expected_logits = {}
    for name, (build, method) in PLAIN.items():
        model, _ = export(method, tmp_path / name, "transformers", build())
        expected_logits[tmp_path / name] = logits(realigned(model), IDS)
    outputs = without_us(list(expected_logits), tmp_path)
    for path, expected in expected_logits.items():
        assert torch.equal(outputs[str(path)], expected), path.name
        assert outputs[f"{path} limit"] == 4 * TRAINED


# What vLLM 0.33.0 and SGLang 0.5.23 make of a config, in the words of docs/serving.md


def server_phases(to: str, rope: dict[str, Any], limit: int, count: int, dim: int = 16) -> torch.Tensor:
    """Cosine and sine of positions 0 to `count`, `(count, dim)`, in float64."""
    kind, factor = rope["rope_type"], rope.get("factor", 1.0)
    plain = [rope["rope_theta"] ** (-2 * i / dim) for i in range(dim // 2)]
    scale, rows = 1.0, limit
    if kind == "linear":
        assert isinstance(factor, float)  # an int is taken for a list
        plain, rows = [frequency / factor for frequency in plain], math.floor(limit * factor)
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        bounds = [
            dim * math.log(original / (rope[name] * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))
            for name in ("beta_fast", "beta_slow")
        ]
        low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), dim - 1)
        mixed = []
        for i, frequency in enumerate(plain):
            ramp = min(max((i - low) / (high - low), 0), 1)
            mixed.append(frequency / factor * ramp + frequency * (1 - ramp))
        default_scale = 0.1 * math.log(factor) + 1
        scale = rope["attention_factor"] if to == "vllm" else default_scale * rope.get("attn_factor", 1)
        plain, rows = mixed, math.floor(original * factor)
    if kind == "longrope":
        plain = [frequency / divisor for frequency, divisor in zip(plain, rope["long_factor"], strict=True)]
        default = math.sqrt(1 + math.log(limit / rope["original_max_position_embeddings"]) / math.log(TRAINED))
        scale = rope.get("long_mscale", default)
    assert rows >= count  # both look phases up in a table of this length
    angles = torch.arange(count, dtype=torch.float64)[:, None] * torch.tensor(plain, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], -1) * scale


@pytest.mark.parametrize("to", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "method",
    ["theta", "linear", "yarn", YaRN(attention_factor=1.5), YaRN(variant="paper"), "yarn+resonance", TWO_LISTS],
)
def test_servers_compute_the_phases_of_the_plan(method: Any, to: str, tmp_path: Path) -> None:
    model, serving = export(method, tmp_path / "out", to)
    config = config_of(tmp_path / "out")
    phases = server_phases(to, config["rope_parameters"], config["max_position_embeddings"], 4 * TRAINED)
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(4 * TRAINED)[None])
    # angles of float32, up to 255 radians
    torch.testing.assert_close(torch.cat([cos[0, :, :8], sin[0, :, :8]], -1).double(), phases, atol=3e-5, rtol=0)
    assert serving.commands[0][-1] == str(4 * TRAINED)


@pytest.mark.parametrize(("to", "flag"), [("vllm", "--hf-overrides"), ("sglang", "--json-model-override-args")])
def test_flags_say_what_the_exported_config_says(to: str, flag: str, tmp_path: Path) -> None:
    """The base model under the flags is the exported model, if its weights are the same."""
    for method in ("yarn", "linear"):
        _, serving = export(method, tmp_path / method, to)
        overrides = json.loads(serving.override[serving.override.index(flag) + 1])
        config = config_of(tmp_path / method)
        assert overrides == {key: config[key] for key in ("rope_parameters", "max_position_embeddings")}
        assert shlex.join(serving.override) in (tmp_path / method / "SERVING.md").read_text()


def overridden(base: Path, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The config of a base as `_apply_dict_overrides` of vLLM 0.33.0 makes it of `--hf-overrides`."""
    config = AutoConfig.from_pretrained(base)
    config.update({key: value for key, value in overrides.items() if not isinstance(value, dict)})
    for name, value in overrides.items():
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            for key, entry in value.items():
                if isinstance(entry, dict) and isinstance(getattr(part, key, None), dict):
                    getattr(part, key).update(entry)  # into what the base has there
                else:
                    setattr(part, key, entry)
        elif isinstance(value, dict):
            setattr(config, name, value)
    return config


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("method", ["theta", "ntk", "yarn", YaRN(attention_factor=1.5), "llama3", "linear"], ids=str)
def test_a_base_under_the_flags_is_the_patched_model(method: Any, multimodal: bool, tmp_path: Path) -> None:
    """Beside a base that is served so, an adapter of the plan finds its positions."""
    model = tiny_llava() if multimodal else tiny_llama()
    model.save_pretrained(tmp_path / "base")
    serving = export(method, tmp_path / "out", "vllm", model)[1]
    config = overridden(tmp_path / "base", json.loads(serving.override[1]))
    text = config.get_text_config()
    text.standardize_rope_params()  # `patch_rope_parameters` of vLLM
    text.validate_rope()
    limit = text.max_position_embeddings * (4 if method == "linear" else 1)  # multiplied by vLLM
    assert limit == int(serving.override[-1]) == 4 * TRAINED
    served = type(model).from_pretrained(tmp_path / "base", config=config).eval()
    assert torch.equal(logits(realigned(served), IDS), logits(realigned(model), IDS))


def test_names_from_outside_mark_up_nothing(tmp_path: Path) -> None:
    model, _ = export("yarn", tmp_path / "a`b <b>", "vllm")
    lines = (tmp_path / "a`b <b>" / "SERVING.md").read_text().splitlines()
    assert "vllm serve 'a`b <b>' --max-model-len 256" in lines  # between fences, quoted for the shell
    plan = find_patch(model).plan  # type: ignore[union-attr]
    serving = SERVERS["vllm"](model.config, plan, None)
    plain = {"merged": False, "obstacle": None, "beside": True}
    hostile = replace(serving, plan=replace(plan, method="<img src=x> [a](b)"), differences=("<script>",))
    text = render("serving.md.jinja", "hf_posext.export", {"shell": shlex.join}, serving=hostile, commands=[], **plain)
    assert "&lt;img" in text and "&lt;script" in text and "<img" not in text and "](b)" not in text
    text = render(
        "serving.md.jinja",
        "hf_posext.export",
        {"shell": shlex.join},
        serving=serving,
        commands=[],
        merged=True,
        beside=True,
        obstacle="an adapter of type <script>",
    )
    assert "(an adapter of type &lt;script>)" in text


def test_limit_of_linear_is_multiplied_by_servers(tmp_path: Path) -> None:
    for to in ("vllm", "sglang"):
        export("linear", tmp_path / to, to)
        assert config_of(tmp_path / to)["max_position_embeddings"] == TRAINED
    export("linear", tmp_path / "plain", "transformers")
    assert config_of(tmp_path / "plain")["max_position_embeddings"] == 4 * TRAINED


def tiny_llava() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=tiny_llama().config, image_token_index=3)
    return sharpen(LlavaForConditionalGeneration(config))


def test_text_part_of_a_multimodal_config(tmp_path: Path) -> None:
    model = tiny_llava()
    patch_model(model, YaRN(attention_factor=1.5), factor=4)
    for to, flag in (("vllm", "--hf-overrides"), ("sglang", "--json-model-override-args")):
        serving = export_checkpoint(model, tmp_path / to, to)
        text = config_of(tmp_path / to)["text_config"]
        assert text["rope_parameters"]["rope_type"] == "yarn" and text["max_position_embeddings"] == 4 * TRAINED
        assert ("attn_factor" in text["rope_parameters"]) == (to == "sglang")
        assert "rope_parameters" not in config_of(tmp_path / to)
        overrides = json.loads(serving.override[serving.override.index(flag) + 1])
        assert overrides == {"text_config": {key: text[key] for key in ("rope_parameters", "max_position_embeddings")}}
    assert isinstance(model.config.text_config, LlamaConfig)


@pytest.mark.parametrize(
    ("to", "method", "words"),
    [
        ("transformers", TWO_LISTS, "longest row of a batch"),
        ("transformers", "yarn", "The oldest reader is transformers 4.57"),
        ("transformers-4", "yarn", "The oldest reader is transformers 4.57"),
        ("transformers", "partial", "The oldest reader is transformers 5.0: transformers 4 reads the share"),
        ("transformers", "yarn", "ollama's converter (017eb8ae4) ignores `yarn` for Llama"),
        ("vllm", TWO_LISTS, "used for every input, short ones too"),
        ("vllm", "yarn+resonance", "`attention_factor` of a `longrope` config is ignored"),
        ("sglang", TWO_LISTS, "depends on the others"),
        ("sglang", YaRN(attention_factor=1.5), "times `attn_factor`, which makes up for it"),
        ("sglang", "yarn", "`0.1 ln(factor) + 1`, as here"),
        ("llama.cpp", TWO_LISTS, "decided by `-c` when the server starts"),
        ("llama.cpp", YaRN(attention_factor=1.5), "whatever `yarn_attn_factor`"),
        ("llama.cpp", "llama3", "a file without the second step has the positions of the base model"),
    ],
    ids=str,
)
def test_differences_are_told(to: str, method: Any, words: str, tmp_path: Path) -> None:
    _, serving = export(method, tmp_path / "out", to)
    assert any(words in sentence for sentence in serving.differences)
    text = (tmp_path / "out" / "SERVING.md").read_text()
    assert words in text and serving.read_from in text
    for line in serving.command_lines("out"):
        assert line in text


def test_converter_of_llama_cpp_reads_no_type_without_its_numbers(tmp_path: Path) -> None:
    """It would write `longrope` and no factors, which llama.cpp runs as the base model."""
    export("yarn+resonance", tmp_path / "a", "llama.cpp")
    assert config_of(tmp_path / "a")["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    with pytest.raises(ValueError, match=r"hf_posext plan \(yarn\+resonance: .*load_patched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")  # to which it would be the base model, too
    export("yarn", tmp_path / "b", "llama.cpp")
    assert config_of(tmp_path / "b")["rope_parameters"]["rope_type"] == "yarn"
    export("table-linear", tmp_path / "c", "llama.cpp", tiny_gpt2())
    assert config_of(tmp_path / "c")["n_ctx"] == 4 * TRAINED  # where it looks for the length of GPT-2


@pytest.mark.parametrize("to", SERVERS)
def test_export_opens_again_with_its_plan(to: str, tmp_path: Path) -> None:
    model, _ = export("yarn+resonance", tmp_path / "out", to)
    again = load_patched(tmp_path / "out")
    assert torch.equal(logits(realigned(again), IDS), logits(realigned(model), IDS))


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = shipped_tokenizer()
    tokenizer.model_max_length = TRAINED
    model = tiny_llama()
    patch_model(model, "yarn", factor=4)
    export_checkpoint(model, tmp_path / "out", "vllm", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 4 * TRAINED
    assert tokenizer.model_max_length == TRAINED


# Refusals


@pytest.mark.parametrize("to", SERVERS)
@pytest.mark.parametrize(
    ("build", "method", "reason"),
    [
        (tiny_llama, SelfExtend(), "remapped inside attention"),
        (tiny_llama, "dynamic-ntk", "'dynamic' of servers is another thing|load_patched"),
        (tiny_bloom, "alibi-linear", "cannot run"),
    ],
    ids=["remapping", "growth", "alibi"],
)
def test_positions_that_no_server_computes(build: Any, method: Any, reason: str, to: str, tmp_path: Path) -> None:
    model = build()
    patch_model(model, method, factor=4, trained_length=TRAINED)
    with pytest.raises(ExportError, match=f"cannot run .*{reason}|{reason}"):
        export_checkpoint(model, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_positions_that_one_server_computes_otherwise(tmp_path: Path) -> None:
    for to, method, words in (
        ("sglang", "partial", "partial_rotary_factor of rope type 'proportional'"),
        ("vllm", "nope", "refuses a partial_rotary_factor of 0"),
    ):
        with pytest.raises(ExportError, match=words):
            export(method, tmp_path / "out", to)
    t5 = tiny_t5()
    patch_model(t5, "bucket-max-distance", factor=4, trained_length=TRAINED)
    for to in ("vllm", "sglang", "llama.cpp"):
        with pytest.raises(ExportError, match="cannot run"):
            export_checkpoint(t5, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(NotPatchedError, match="got one without a patch"):
        export_checkpoint(model, tmp_path / "out")
    patch_model(model, "yarn", factor=4)
    with pytest.raises(
        InvalidParameterError, match="Pass one of transformers, transformers-4, vllm, sglang, llama.cpp"
    ):
        export_checkpoint(model, tmp_path / "out", "tgi")
    with_adapter(model)
    with pytest.raises(UnsupportedModelError, match="has an adapter"):
        export_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(FileExistsError):
        export("yarn", tmp_path, "vllm")
    assert files(tmp_path) == {"config.json": b"mine"}


def test_docs_tell_the_measured_figures() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    shipped = json.loads((ROOT / "benchmarks" / "results" / "llama_cpp.json").read_text())
    converted = json.loads((ROOT / "benchmarks" / "results" / "llama_cpp_converted.json").read_text())
    for result, rounding in ((shipped, 1e-6), (converted, 2e-5)):  # of 30 layers, and scores times 1.4 squared
        for row in result["rows"]:
            figures = f"{row['transformers']:.3f} | {row['llama.cpp']:.3f} | {row['difference']:+.1e}"
            assert f"| `{row['method']}` | {figures}" in text
            assert abs(row["difference"]) < rounding
    for row in json.loads((ROOT / "benchmarks/results/serving.json").read_text())["parts"]["throughput"]:
        assert f"| `{row['method']}` | {row['tokens_per_second']:.1f} | {row['ratio']:.2f} |" in text
    phases = json.loads((ROOT / "benchmarks" / "results" / "server_phases.json").read_text())
    assert all(row.get("largest_difference", 0.0) == 0.0 for row in phases["rows"])
    for version in (phases["versions"]["vllm"], phases["versions"]["sglang"]):
        assert version.split(" (")[0] in " ".join(text.split())  # lines may end within a name
    assert f"llama.cpp {shipped['versions']['llama.cpp']}" in text
