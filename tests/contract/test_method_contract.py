"""What every registered method promises; a new method is covered the moment it exists."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_posext import detect_scheme, load_patched, patch_model, unpatch_model
from hf_posext.evaluation.scoring.boundaries import Boundaries, boundaries_of
from hf_posext.methods import Method, methods
from hf_posext.patching.signatures import cache_of, with_cache
from hf_posext.plan import ExtensionPlan

from ..conftest import BUILDERS, TRAINED, arguments, logits, tokens

LENGTHS = {"factor": 8, "trained_length": TRAINED}
"""Not every config tells the trained length, and a table may have more rows than were trained."""
CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, cls in methods().items()
    for kind in cls.kinds
    if name != "none" and kind in BUILDERS
]
LONG = tokens(3 * TRAINED)


def build(name: str, kind: str) -> tuple[PreTrainedModel, Method]:
    model = BUILDERS[kind]()
    return model, methods()[name].example(detect_scheme(model))


def test_every_method_has_a_model_to_run_on() -> None:
    assert {kind for cls in methods().values() if cls.name != "none" for kind in cls.kinds} <= set(BUILDERS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_plan_is_pure_and_survives_json(name: str, kind: str) -> None:
    model, method = build(name, kind)
    scheme = detect_scheme(model)
    before = logits(model, LONG)
    plan = method.plan(scheme, **LENGTHS)
    assert plan == method.plan(scheme, **LENGTHS)
    assert torch.equal(logits(model, LONG), before), "planning touched the model"
    assert ExtensionPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    assert (plan.original_length, plan.target_length) == (TRAINED, 8 * TRAINED)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_changes_logits_past_the_trained_length(name: str, kind: str) -> None:
    model, method = build(name, kind)
    before = logits(model, LONG)
    patch_model(model, method, **LENGTHS)
    change = (logits(model, LONG) - before)[:, TRAINED:].abs().max()
    # the weakest effect measured on this model is above 0.1 of logits that spread by 4; rounding is 1e-6
    assert change > 1e-2 * before.std()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_undo_is_exact_also_after_an_exception(name: str, kind: str) -> None:
    model, method = build(name, kind)
    before, config = logits(model, LONG), model.config.to_json_string(use_diff=False)
    attributes = {path: {*vars(module), type(module)} for path, module in model.named_modules()}
    patch_model(model, method, **LENGTHS).undo()
    with pytest.raises(KeyError), patch_model(model, method, **LENGTHS):
        raise KeyError("in the middle")
    patch_model(model, method, **LENGTHS)
    unpatch_model(model)
    assert torch.equal(logits(model, LONG), before)
    assert model.config.to_json_string(use_diff=False) == config
    assert {path: {*vars(module), type(module)} for path, module in model.named_modules()} == attributes


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_cached_decoding_equals_one_forward(name: str, kind: str) -> None:
    model, method = build(name, kind)
    # ALiBi's biases and XGLM's sines are float32 whatever the model is; the others are compared in float64, since T5's
    # float32 sums differ by up to 1e-3 here where the float64 ones differ by 1e-14
    tolerance = 2e-4 if kind in ("alibi", "sinusoidal") else 1e-9
    if tolerance == 1e-9:
        model.double()
    patch = patch_model(model, method, **LENGTHS)
    # a method that follows the length of the row is exact within the trained length; what remains past it is measured
    # in test_remapping.py
    steps_past = 12 if boundaries_of(patch.plan.scheme, patch.plan) == Boundaries() else 0
    whole = logits(model, LONG[:, : TRAINED + steps_past])
    with torch.no_grad():
        out = model(**arguments(model, LONG[:, : TRAINED - 4]), use_cache=True)
        steps = [out.logits]
        for i in range(TRAINED - 4, TRAINED + steps_past):  # across the trained length
            step = arguments(model, LONG[:, i : i + 1])
            out = model(**step, use_cache=True, **with_cache(model.forward, cache_of(out)))
            steps.append(out.logits)
    # sums in another order; logits spread by 4
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_row_depends_on_nothing_but_itself(name: str, kind: str) -> None:
    """Not on earlier calls, not on its batch-mates, not on padding at its left."""
    model, method = build(name, kind)
    patch_model(model, method, **LENGTHS)
    short = tokens(2 * TRAINED, seed=1)
    alone = logits(model, short)
    logits(model, LONG)
    assert torch.equal(logits(model, short), alone), "an earlier, longer call left state behind"

    width = LONG.shape[1]
    padded = torch.cat([torch.zeros(1, width - short.shape[1], dtype=torch.long), short], 1)
    mask = (torch.cat([padded, LONG]) != 0).long()
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if model.config.is_encoder_decoder:
        given = {"decoder_attention_mask": mask}
    taken = inspect.signature(model.forward).parameters
    both = logits(model, torch.cat([padded, LONG]), **{name: value for name, value in given.items() if name in taken})
    # float32 sums in another order; logits spread by 4
    torch.testing.assert_close(both[:1, -short.shape[1] :], alone, atol=2e-4, rtol=0)
    torch.testing.assert_close(both[1:], logits(model, LONG), atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method's patched model on disk, with the logits that it gave, and the same re-read by a new process."""
    root = tmp_path_factory.mktemp("saved")
    for case in CASES:
        name, kind = case.values
        model, method = build(str(name), str(kind))
        patch = patch_model(model, method, **LENGTHS)
        directory = root / f"{name}-{kind}"
        patch.save_pretrained(directory)
        answer = {"native": patch.native_obstacle is None, "logits": logits(model, LONG)}
        answer |= {"class": type(model).__name__, "arguments": arguments(model, LONG)}
        torch.save(answer, root / f"{name}-{kind}.pt")
    for reader in (PLAIN_READER, OUR_READER):
        subprocess.run([sys.executable, "-c", reader, str(root)], check=True)
    return root


PLAIN_READER = """
import sys; sys.modules["hf_posext"] = None  # importing it would raise
import pathlib, torch, transformers
for answer in pathlib.Path(sys.argv[1]).glob("*.pt"):
    wanted = torch.load(answer)
    if wanted["native"]:
        model = getattr(transformers, wanted["class"]).from_pretrained(answer.with_suffix(""))
        with torch.no_grad():
            wanted["plain"] = model(**wanted["arguments"]).logits
        torch.save(wanted, answer)
"""
OUR_READER = """
import sys, pathlib, torch
from hf_posext import load_patched
for answer in pathlib.Path(sys.argv[1]).glob("*.pt"):
    wanted = torch.load(answer)
    with torch.no_grad():
        wanted["ours"] = load_patched(answer.with_suffix(""))(**wanted["arguments"]).logits
    torch.save(wanted, answer)
"""


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_saved_model_is_equal_in_a_new_process(name: str, kind: str, saved: Path) -> None:
    answer = torch.load(saved / f"{name}-{kind}.pt")
    assert torch.equal(answer["ours"], answer["logits"])
    assert answer["native"] == ("plain" in answer)
    if answer["native"]:
        assert torch.equal(answer["plain"], answer["logits"])
    files = {path.suffix for path in (saved / f"{name}-{kind}").rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors"}

    model = load_patched(saved / f"{name}-{kind}")
    unpatch_model(model)
    assert torch.equal(logits(model, LONG), logits(BUILDERS[kind](), LONG)), "undone after loading"
