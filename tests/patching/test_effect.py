"""A plan without effect is refused, and one with an effect is not: the verdict against the logits themselves."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hf_posext import patch_model
from hf_posext.errors import InvalidParameterError, NoEffectError
from hf_posext.evaluation.setup import try_plans
from hf_posext.methods import as_method, methods
from hf_posext.patching import detect_scheme, patch
from hf_posext.patching.remap import probe

from ..conftest import TRAINED, logits, tiny_llama, tokens

TARGET = 2 * TRAINED
TEXT = tokens(2 * TARGET)
"""As long as the verdict reaches."""

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED, "pad_token_id": 0}


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data.mul_(4)
    return model.double().eval()


def windowed(window: int) -> PreTrainedModel:
    """All layers see a window, which attention takes from the config."""
    torch.manual_seed(0)
    return sharp(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)))


def mixed(window: int) -> PreTrainedModel:
    """The first layer sees all tokens, the second a window."""
    torch.manual_seed(0)
    kinds = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    return sharp(Qwen2ForCausalLM(Qwen2Config(**SIZES, **kinds)))


MODELS = {
    "all": lambda: tiny_llama().double(),
    "window 16": lambda: windowed(16),
    "window 48": lambda: windowed(48),
    "mixed 16": lambda: mixed(16),
}
LATE = [
    name
    for name, cls in methods().items()
    if "rotary" in cls.kinds and cls.example(detect_scheme(tiny_llama())).plan(
        detect_scheme(tiny_llama()), target_length=TARGET
    ).rotates_late
]  # fmt: skip
TEXTS = [
    *LATE,
    "self-extend(group=1)",
    "self-extend(group=2, window=16)",
    "leaky-rerope(stride=1)",
    "rerope(window=64)",
    "rerope(window=15)",
    "rerope(window=16)",
    "dual-chunk(chunk=16)",
    "llama4-temperature(step=1000)",
    "llama4-temperature(step=257)",
    "llama4-temperature(step=256)",
]


@pytest.mark.parametrize("name", MODELS)
def test_the_verdict_is_what_logits_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    before, scheme = logits(model, TEXT), detect_scheme(model)
    judge, verdicts = probe.refuse_idle, {}
    for text in TEXTS:
        method = as_method(text) if "(" in text else methods()[text].example(scheme)
        try:
            plan = method.plan(scheme, target_length=TARGET)
        except InvalidParameterError:
            continue  # a method that has to come after another
        if plan.changes_nothing:
            continue  # new frequencies, in layers that all have windows within the trained length
        refused: list[NoEffectError] = []

        def note(*arguments: Any, refused: list[NoEffectError] = refused) -> None:
            try:
                judge(*arguments)
            except NoEffectError as error:
                refused.append(error)

        monkeypatch.setattr(probe, "refuse_idle", note)
        with patch_model(model, plan):
            change = (logits(model, TEXT) - before).abs().max()
        # the float32 phases of other positions at the same distance differ by up to 1e-6, the least effect is 3e-2
        verdicts[text] = not refused, bool(change > 1e-4)
    assert {text: verdict for text, verdict in verdicts.items() if verdict[0] != verdict[1]} == {}
    assert {verdict[0] for verdict in verdicts.values()} == {True, False}
    monkeypatch.undo()
    reach = "all tokens" if name in ("all", "mixed 16") else f"at most {name.split()[1]} tokens back"
    with pytest.raises(NoEffectError, match=f"changes a pair of tokens, got .* for layers of .* that see {reach}"):
        patch_model(model, "self-extend(group=1)", target_length=TARGET)
    assert torch.equal(logits(model, TEXT), before)


COMPONENTS = [
    ("dual-chunk", "fade"),  # up to twice the trained length, older chunks hold no more keys than the reference
    ("dual-chunk(chunk=32, local=16)", "fade"),
    ("dual-chunk", "log-n"),
    ("rerope(window=48)", "fade(reference=100000)"),
    ("rerope(window=48)", "fade(reference=128)"),
    ("rerope(window=48)", "fade(reference=48)"),
    ("rerope(window=48)", "llama4-temperature(step=1000)"),
    ("rerope(window=48)", "llama4-temperature(step=256)"),
    ("leaky-rerope", "decay"),
    ("leaky-rerope", "decay(start=128)"),
    ("leaky-rerope", "decay(start=256)"),
    ("ntk", "self-extend(group=1)"),
    ("ntk", "rerope(window=48)"),
    ("dynamic-yarn", "rerope(window=48)"),
    ("yarn", "cope(clip=2)"),
    ("rerope(window=48)+log-n", "fade(reference=128)"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["all", "window 48"])
def test_a_component_is_judged_as_logits_show(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A component is refused where logits of twice the target stay, and named where those of the target do."""
    model, verdicts = MODELS[name](), set()
    for base, component in COMPONENTS:
        method = as_method(f"{base}+{component}")
        if name != "all" and ("rerope(window=48)" in base or "ntk" in base or "yarn" in base):
            continue  # the base has no effect in layers that see 48 tokens
        readings = []
        for text in (base, method):
            monkeypatch.setattr(patch, "refuse_idle_components", lambda *arguments: None)
            with patch_model(model, text, target_length=TARGET):
                readings.append([logits(model, TEXT[:, :length]) for length in (TARGET, 2 * TARGET)])
            monkeypatch.undo()
        # as above: the rounding of phases is 1e-6
        early, late = (
            bool((base_logits - component_logits).abs().max() > 1e-4)
            for base_logits, component_logits in zip(*readings, strict=True)
        )
        logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
        caplog.clear()
        if late:
            with patch_model(model, method, target_length=TARGET):
                assert (f"{component!r} of {method.label!r} has no effect up to 128 tokens" in caplog.text) != early
        else:
            message = f"got {component!r} without effect up to 256 tokens"
            with pytest.raises(NoEffectError, match=re.escape(message)):
                patch_model(model, method, target_length=TARGET)
            with patch_model(model, method.plan(detect_scheme(model), target_length=TARGET)):  # a saved plan opens
                assert message in caplog.text
        verdicts.add((early, late))
    assert verdicts == {(False, False), (False, True), (True, True)}


def test_measuring_leaves_out_a_composition_with_an_idle_component() -> None:
    model, refusals = tiny_llama(), dict[str, str]()
    texts = ("rerope", "rerope+fade", "rerope+fade(reference=100000)")
    plans = [as_method(text).plan(detect_scheme(model), factor=8) for text in texts]
    assert try_plans(model, plans, refusals) == plans[:2]
    assert "got 'fade(reference=100000)' without effect" in refusals[texts[2]]


def test_plans_for_lengths_that_no_machine_runs_are_judged() -> None:
    model = tiny_llama()
    with patch_model(model, "rerope", target_length=2**24):
        pass
    with pytest.raises(NoEffectError):
        patch_model(model, "self-extend(group=1)", target_length=2**24)
