"""
Every rotary causal-LM type of the installed transformers, patched by four frequency methods.

For each type and method: the logits past the trained length change, they equal those of a model that transformers
itself configured, and undo puts every bit back. Apart from any reference: with positions interpolated by 4, position
4p must give what the unpatched model gives at p. A type works, or is refused by name; nothing else passes.

The outcome of each type goes to pytest's cache, from which `tools/sweep_table.py` makes docs/architectures.md. A file
for each type, since the tests of one sweep run in several processes.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_posext import LongRoPE, detect_scheme, patch_model
from hf_posext.errors import MethodNotApplicableError, PosExtError
from hf_posext.methods import Method
from tests.zoo import NOT_BUILT, TRAINED_LENGTH, build, candidate_types, has_frequencies, other_types

from .native import given_length, is_shipped_scaled, logits, native_model, text_config, why_no_reference

pytestmark = pytest.mark.sweep

METHODS = ("linear", "yarn", "llama3", "longrope")
FACTOR = 4
LENGTH = TRAINED_LENGTH + 16

WIDE_WINDOW = 4 * TRAINED_LENGTH
"""Sliding layers that see less than the trained length are left alone by design. Here all are to be patched."""

MOVED_BY_MORE_THAN_PHASES = {
    "beam": "its layers without phases scale their queries by position",
    "deepseek_v4": "its compressed keys are placed by counting tokens, not by position ids",
}
"""Types in which a position does more than turn phases, so that position 4p cannot equal p."""

# The smallest effect of any patch on any type is 6e-4 (jetmoe). Between position 4p and p only the order of float32
# sums inside one matrix product differs, at most 9e-7 after six layers. All other comparisons are exact.
CHANGED, EQUAL = 1e-4, 1e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return float((a - b).norm() / b.norm())


@dataclass
class Outcome:
    """The outcome of one type: the cells of its row in the table, and what must not be."""

    no_reference: str
    """Reason not to compare with transformers' own scaling, if there is one."""

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def expect(self, truth: bool, method: str, complaint: str) -> None:
        """Mark the method as failing unless `truth`."""
        if not truth:
            self.cells[method] = {"verdict": "fails", "reason": complaint}
            self.failures.append(f"{method}: {complaint}")

    @property
    def refused(self) -> set[str]:
        """The methods that were refused."""
        return {name for name, cell in self.cells.items() if cell["verdict"] == "refused"}


def check_method(model: PreTrainedModel, name: str, before: torch.Tensor, outcome: Outcome) -> None:
    """Patch, compare, undo, compare."""
    scheme, config = detect_scheme(model), model.config.to_dict()
    comparable = not is_shipped_scaled(model)  # asked before the patch, which may say in the config that it scales
    model_type = scheme.model_type
    long_factor = [1.0 + index for index in range(scheme.rotaries[0].pairs)]
    method: Method | str = LongRoPE(long_factor=long_factor) if name == "longrope" else name
    # Of the same tokens, not the start of a longer row: in some versions, models let a token see later ones.
    unpatched = logits(model, LENGTH // FACTOR)
    try:
        patch = patch_model(model, method, factor=FACTOR, trained_length=given_length(model))
    except PosExtError as error:
        outcome.cells[name] = {"verdict": "refused", "reason": str(error)}
        outcome.expect(model_type in str(error), name, f"the refusal does not name {model_type}: {error}")
        return
    outcome.cells[name] = {"verdict": "works"}
    after = logits(model, LENGTH)
    moved = relative(after[TRAINED_LENGTH:], before[TRAINED_LENGTH:])
    outcome.expect(moved > CHANGED, name, f"changes logits past the trained length by {moved:.1e} only")
    if name == "linear" and comparable and model_type not in MOVED_BY_MORE_THAN_PHASES:
        error = relative(logits(model, LENGTH // FACTOR, stride=FACTOR), unpatched)
        outcome.expect(error < EQUAL, name, f"position {FACTOR}p differs from unpatched p by {error:.1e}")
    patch.undo()
    outcome.expect(torch.equal(logits(model, LENGTH), before), name, "undo leaves other logits")
    outcome.expect(model.config.to_dict() == config, name, "undo leaves another config")
    if outcome.no_reference:
        return
    try:
        native = logits(native_model(model, name, FACTOR, long_factor), LENGTH)
    except UnboundLocalError as error:  # a fault of the code that raises: LongRoPE of deepseek_v4 in 5.10.1
        outcome.cells[name]["reason"] = f"transformers' own {name} fails: {error}"
        return
    outcome.cells[name]["equals_native"] = True
    outcome.expect(torch.equal(after, native), name, f"{relative(after, native):.1e} from transformers' own")


@pytest.mark.parametrize("model_type", candidate_types())
def test_rotary_type(model_type: str, request: pytest.FixtureRequest) -> None:
    model = build(model_type)
    if "sliding_window" in vars(text_config(model)):
        model = build(model_type, sliding_window=WIDE_WINDOW)
    assert has_frequencies(model), f"{model_type} has no rotary frequencies; list it in tests/zoo/schemes.py"
    before, outcome = logits(model, LENGTH), Outcome(why_no_reference(model))
    for name in METHODS:
        check_method(model, name, before, outcome)
    rotaries = detect_scheme(model).rotaries
    record = {
        "transformers": transformers_version,
        "sets": [
            {"name": rotary.name, "pairs": rotary.pairs, "theta": rotary.theta, "shipped_type": rotary.shipped_type}
            for rotary in rotaries
        ],
        "note": outcome.no_reference or MOVED_BY_MORE_THAN_PHASES.get(model_type, ""),
    }
    request.config.cache.set(f"sweep/rotary/{model_type}", record | {"cells": outcome.cells})
    assert not outcome.failures, "\n".join(outcome.failures)
    # One list of factors cannot fit sets of two widths.
    by_width = {"longrope"} if len({rotary.pairs for rotary in rotaries}) > 1 else set()
    assert outcome.refused == by_width, outcome.cells


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu"])
def test_temperature_inside_the_softmax_scale(model_type: str) -> None:
    """The DeepSeek family multiplies the temperature of a shipped YaRN into its softmax scale at construction."""
    shipped = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED_LENGTH}
    shipped |= {"rope_theta": 10_000.0, "mscale": 0.7, "mscale_all_dim": 1.0}
    model = build(model_type, rope_parameters=shipped, max_position_embeddings=2 * TRAINED_LENGTH)
    before, outcome = logits(model, LENGTH), Outcome(why_no_reference(model))
    for name in METHODS:
        check_method(model, name, before, outcome)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert not outcome.refused


@pytest.mark.parametrize("model_type", other_types())
def test_other_schemes_are_refused(model_type: str, request: pytest.FixtureRequest) -> None:
    model = build(model_type)
    assert not has_frequencies(model), f"{model_type} has rotary frequencies; take it out of tests/zoo/schemes.py"
    with pytest.raises(MethodNotApplicableError, match=model.config.model_type):
        patch_model(model, "yarn", factor=FACTOR)
    request.config.cache.set(f"sweep/other/{model_type}", other_types()[model_type])


def test_every_causal_type_is_accounted_for(request: pytest.FixtureRequest) -> None:
    absent = {name: reason for name, reason in NOT_BUILT.items() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert {*candidate_types(), *other_types(), *absent} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for model_type, reason in absent.items():
        request.config.cache.set(f"sweep/not_built/{model_type}", reason)
