"""Every kind of adapter of PEFT: trained, saved, opened again and merged, or refused when it is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_posext import load_adapter, load_patched, patch_model
from hf_posext.adapters import save_adapter, verify_adapter
from hf_posext.errors import EvaluationError, PlanMismatchError, UnsupportedModelError
from tests.adapters.helpers import train
from tests.conftest import TRAINED, logits, realigned, tiny_llama, tokens
from tests.helpers import run_python

IDS = tokens(3 * TRAINED)
LAYERS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, Callable[[], Any]] = {
    "embeddings": lambda: LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
    "tokens": lambda: LoraConfig(r=4, **LAYERS, trainable_token_indices=[1, 2]),
    "saved head": lambda: LoraConfig(r=4, **LAYERS, modules_to_save=["embed_tokens", "lm_head"]),
    "rslora": lambda: LoraConfig(r=4, **LAYERS, use_rslora=True, bias="all"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, tinit=1, tfinal=2, **LAYERS),
    "loha": lambda: peft.LoHaConfig(r=4, **LAYERS),
    "lokr": lambda: peft.LoKrConfig(r=4, **LAYERS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=16, use_cayley_neumann=False, **LAYERS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **LAYERS),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "miss": lambda: peft.MissConfig(r=4, **LAYERS),
    "shira": lambda: peft.ShiraConfig(r=4, **LAYERS),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=50, **LAYERS),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}
UNMERGED = ("prompt", "p-tuning")
"""Kinds that PEFT cannot put into weights."""


def trained(base: Path, config: Any, method: str, name: str = "default") -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base)
    patch_model(model, method, factor=4)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config, adapter_name=name)
    train(adapted, 2 * TRAINED)
    return adapted.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_round_trip(method: str, kind: str, base: Path, tmp_path: Path) -> None:
    model = trained(base, KINDS[kind](), method)
    expected = logits(realigned(model), IDS)
    save_adapter(model, tmp_path / "adapter")
    opened = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(realigned(opened), IDS), expected)
    assert verify_adapter(opened, tmp_path / "adapter")
    if kind in UNMERGED:
        return
    merged = opened.merge_and_unload()
    # one product of matrices instead of three, in float32
    torch.testing.assert_close(logits(merged, IDS), expected, atol=5e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(realigned(load_patched(tmp_path / "merged")), IDS), logits(realigned(merged), IDS))


def test_verifying_changes_nothing(base: Path, tmp_path: Path) -> None:
    save_adapter(trained(base, KINDS["saved head"](), "yarn"), tmp_path / "adapter")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    patch_model(model, "yarn", factor=4)
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    attributes, state = set(vars(model)), torch.get_rng_state()
    assert verify_adapter(model, tmp_path / "adapter")
    assert dict(model.named_modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert set(vars(model)) == attributes and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("trained_embeddings", [False, True])
def test_a_vocabulary_that_grew(trained_embeddings: bool, base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(132)
    patch_model(model, "rerope", factor=4)
    saved = ["embed_tokens", "lm_head"] if trained_embeddings else None
    adapted = get_peft_model(model, LoraConfig(r=4, **LAYERS, modules_to_save=saved))
    train(adapted, 2 * TRAINED)
    save_adapter(adapted.eval(), tmp_path / "adapter")
    opened = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(adapted), IDS))
    with pytest.raises(PlanMismatchError, match="132"):
        load_adapter(tmp_path / "adapter", base=AutoModelForCausalLM.from_pretrained(base))


def test_one_of_several_by_name(base: Path, tmp_path: Path) -> None:
    model = trained(base, LoraConfig(r=4, **LAYERS), "rerope", "long")
    model.add_adapter("other", LoraConfig(r=2, **LAYERS, init_lora_weights=False))
    expected = {}
    for name in ("long", "other"):
        model.set_adapter(name)
        expected[name] = logits(realigned(model), IDS)
        save_adapter(model, tmp_path / name, adapter_name=name)
    with pytest.raises(UnsupportedModelError, match="adapter_name to be one of long, other, got 'none'. Pass the one"):
        save_adapter(model, tmp_path / "none", adapter_name="none")
    opened = load_adapter(tmp_path / "long")
    load_adapter(tmp_path / "other", base=opened, adapter_name="second")
    for name, saved in (("default", "long"), ("second", "other")):
        opened.set_adapter(name)
        assert torch.equal(logits(realigned(opened), IDS), expected[saved])
    with pytest.raises(UnsupportedModelError, match="has the adapters default, second. Pass another adapter_name"):
        load_adapter(tmp_path / "other", base=opened)
    yarn = trained(base, LoraConfig(r=4, **LAYERS), "yarn")
    save_adapter(yarn, tmp_path / "yarn")
    with pytest.raises(PlanMismatchError, match="trained under .yarn.*carries .rerope"):
        load_adapter(tmp_path / "yarn", base=opened, adapter_name="third")


def test_what_peft_cannot_build_again_is_refused_when_it_is_saved(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(base, LoraConfig(r=4, **LAYERS), "yarn")
    model.peft_config["default"].target_modules = {"nothing_of_this_name"}  # as of a config that does not say all
    with pytest.raises(
        UnsupportedModelError, match="does not build the adapter 'default' again.*nothing_of_this_name"
    ):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


SETTINGS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "feedforward_modules": [],
    **{"num_virtual_tokens": 4, "encoder_hidden_size": 8, "adapter_len": 4, "adapter_layers": 1},
    **{"total_step": 10, "n_frequency": 50, "block_size": 16, "group_size": 16, "num_vectors": 8, "vector_length": 16},
}
"""Settings that make adapters of any kind fit a tiny model."""

OPENING = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from hf_posext import load_adapter
from tests.conftest import logits, realigned
saved, ids = Path(sys.argv[1]), load_file(sys.argv[2])["ids"]
opened = {path.name: logits(realigned(load_adapter(path)), ids).detach() for path in saved.iterdir()}
save_file(opened, sys.argv[3])
"""


@pytest.mark.filterwarnings("ignore")  # of kinds that are experimental in PEFT, and of prefixes
def test_every_kind_of_peft_opens_in_a_fresh_process_or_is_refused_when_saved(base: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    expected, refused = {}, set()
    for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        names = {entry.name for entry in dataclasses.fields(cls)}
        config = {name: value for name, value in SETTINGS.items() if name in names}
        try:
            train(get_peft_model(tiny_llama(), cls(**config)), TRAINED, 1)
        except Exception:  # PEFT itself wants other settings, or tasks for each row
            continue
        try:
            model = trained(base, cls(**config), "rerope")
            save_adapter(model, tmp_path / "saved" / kind.value)
        except EvaluationError as error:  # keys without positions
            assert "prefix tuning" in str(error)
            refused.add(kind.value)
        else:
            expected[kind.value] = logits(realigned(model), IDS)
    assert len(expected) > 20 and refused <= {"PREFIX_TUNING", "CARTRIDGE"}
    save_file({"ids": IDS}, tmp_path / "ids")
    run_python("-W", "ignore", "-c", OPENING, tmp_path / "saved", tmp_path / "ids", tmp_path / "opened")
    opened = load_file(tmp_path / "opened")
    assert opened.keys() == expected.keys() == {path.name for path in (tmp_path / "saved").iterdir()}
    assert [kind for kind in expected if not torch.equal(opened[kind], expected[kind])] == []
