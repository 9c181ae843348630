"""
Every rotary causal-LM type of the installed transformers, patched by four frequency methods.

For each type and method: the logits past the trained length change, they equal those of a model that transformers
itself configured, and undo puts every bit back. Apart from any reference: with positions interpolated by 4, position
4p must give what the unpatched model gives at p. A type works, or is refused by name; nothing else passes.

The outcome of each type goes to pytest's cache, from which `tools/sweep_table.py` makes docs/architectures.md.
"""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from hf_posext import LongRoPE, detect_scheme, patch_model
from hf_posext.errors import MethodNotApplicableError, PosExtError
from hf_posext.methods import Method
from tests.zoo import OTHER_SCHEMES, TRAINED_LENGTH, build, candidate_types, has_frequencies, other_types, token_ids

from .native import NO_NATIVE, is_shipped_scaled, native_model

pytestmark = pytest.mark.sweep

METHODS = ("linear", "yarn", "llama3", "longrope")
FACTOR = 4
LENGTH = TRAINED_LENGTH + 16
CACHE_KEY = "sweep/frequencies"

WIDE_WINDOW = 4 * TRAINED_LENGTH
"""Sliding layers that see less than the trained length are left alone by design. Here all are to be patched."""

EXPECTED_REFUSALS: dict[str, str] = {}
"""Rotary types that are refused, with words from the message. At most three may be."""

MOVED_BY_MORE_THAN_PHASES = {
    "beam": "",
    "deepseek_v4": "its compressed keys are placed by counting tokens, not by position ids",
}
"""Types in which a position does more than turn phases, so that position 4p cannot equal p."""

# The smallest effect of any patch on any type is 1e-2; a native model computes the same float32 numbers, so that what
# remains is the order of one multiplication in longrope, amplified by the six layers: 4e-6 at most.
CHANGED, EQUAL = 1e-3, 1e-5


@torch.no_grad()
def logits(model: PreTrainedModel, length: int, stride: int = 1) -> torch.Tensor:
    """Logits `(length, vocabulary)` of one row of tokens at positions 0, stride, 2 * stride, ..."""
    return model(
        input_ids=token_ids(length),
        # Without a mask, positions with gaps would be taken for a pack of several sequences.
        attention_mask=torch.ones(1, length, dtype=torch.long),
        position_ids=stride * torch.arange(length)[None],
        use_cache=False,
    ).logits[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return float((a - b).norm() / b.norm())


def frequency_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": value.clone()
        for path, module in model.named_modules()
        for name, value in {**module._buffers, **vars(module)}.items()
        if isinstance(value, torch.Tensor)
    }


@dataclass
class Outcome:
    """What the sweep found about one type: the cells of its row, and what must not be."""

    cells: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def expect(self, truth: bool, method: str, complaint: str) -> None:
        if not truth:
            self.cells[method] = "fails"
            self.failures.append(f"{method}: {complaint}")


def check_method(model: PreTrainedModel, name: str, before: torch.Tensor, outcome: Outcome) -> None:
    """Patch, compare, undo, compare."""
    model_type = detect_scheme(model).model_type
    config = model.config.to_dict()
    long_factor = [1.0 + index for index in range(detect_scheme(model).rotaries[0].pairs)]
    method: Method | str = LongRoPE(long_factor=long_factor) if name == "longrope" else name
    try:
        patch = patch_model(model, method, factor=FACTOR)
    except PosExtError as error:
        outcome.cells[name] = f"refused: {error}"
        outcome.expect(model_type in str(error), name, f"the refusal does not name {model_type}: {error}")
        return
    after = logits(model, LENGTH)
    outcome.cells[name] = "works"
    moved = relative(after[TRAINED_LENGTH:], before[TRAINED_LENGTH:])
    outcome.expect(moved > CHANGED, name, f"changes logits past the trained length by {moved:.1e} only")
    if name == "linear" and not is_shipped_scaled(model) and model_type not in MOVED_BY_MORE_THAN_PHASES:
        error = relative(logits(model, LENGTH // FACTOR, stride=FACTOR), before[: LENGTH // FACTOR])
        outcome.expect(error < EQUAL, name, f"position {FACTOR}p differs from unpatched p by {error:.1e}")
    patch.undo()
    outcome.expect(torch.equal(logits(model, LENGTH), before), name, "undo leaves other logits")
    outcome.expect(model.config.to_dict() == config, name, "undo leaves another config")
    if model.config.model_type not in NO_NATIVE:
        error = relative(after, logits(native_model(model, name, FACTOR, long_factor), LENGTH))
        outcome.expect(error < EQUAL, name, f"differs from transformers' own by {error:.1e}")
        if outcome.cells[name] == "works":
            outcome.cells[name] = "native" if error == 0 else f"native to {error:.0e}"


@pytest.mark.parametrize("model_type", candidate_types())
def test_rotary_type(model_type: str, request: pytest.FixtureRequest) -> None:
    model = build(model_type)
    if "sliding_window" in vars(model.config.get_text_config(decoder=True)):
        model = build(model_type, sliding_window=WIDE_WINDOW)
    assert has_frequencies(model), f"{model_type} has no rotary frequencies; list it in tests/zoo/schemes.py"
    before = logits(model, LENGTH)
    outcome = Outcome()
    for name in METHODS:
        check_method(model, name, before, outcome)
    record = {"transformers": transformers_version, "scheme": detect_scheme(model).describe(), "cells": outcome.cells}
    record |= {"failures": outcome.failures, "native": NO_NATIVE.get(model_type, "")}
    request.config.cache.set(f"{CACHE_KEY}/{model_type}", record)
    assert not outcome.failures, "\n".join(outcome.failures)


@pytest.mark.parametrize("model_type", other_types())
def test_other_schemes_are_refused(model_type: str) -> None:
    model = build(model_type)
    with pytest.raises(MethodNotApplicableError, match=model_type):
        patch_model(model, "yarn", factor=FACTOR)
