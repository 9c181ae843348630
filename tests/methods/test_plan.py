"""A plan survives JSON; a corrupt, hostile or newer one is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_posext.plan as plan_module
from hf_posext import ExtensionPlan, YaRN, detect_scheme
from hf_posext.errors import PlanError
from hf_posext.methods import DPE, as_method

from ..conftest import tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def plan() -> ExtensionPlan:
    return YaRN().plan(detect_scheme(tiny_llama()), factor=8)


def test_plans_of_older_schemas_are_read() -> None:
    plan = as_method("rerope+log-n").plan(detect_scheme(tiny_llama()), factor=8)
    data = {**plan.to_dict(), "schema": 2}
    for part in data["parts"]:
        for side in ("query", "key"):
            del part[side]["row_curve"], part[side]["pair_groups"], part[side]["pair_shares"]
    del data["query_scale"]["row"]
    assert ExtensionPlan.from_dict(data) == plan
    data["schema"], data["original_length"] = 1, data.pop("trained_length")
    for part in data["parts"]:
        del part["fade"], part["decay"]
        for side in ("query", "key"):
            del part[side]["row_group"], part[side]["kept"]
    del data["query_scale"]["step"], data["query_scale"]["first_layer"]
    assert ExtensionPlan.from_dict(data) == plan
    data["parts"] = [1]
    with pytest.raises(PlanError, match="parts.0 is 1"):
        ExtensionPlan.from_dict(data)


@pytest.mark.parametrize("group", [{"span": 0, "beyond": 0}, {"span": 1, "beyond": -1}])
def test_groups_that_follow_rows_are_checked(group: dict[str, int]) -> None:
    data = as_method("jet-long").plan(detect_scheme(tiny_llama()), factor=8).to_dict()
    data["parts"][1]["key"]["row_group"] = group
    with pytest.raises(PlanError, match="follow rows with a span below 1"):
        ExtensionPlan.from_dict(data)
    table = as_method("table-linear").plan(detect_scheme(tiny_gpt2()), factor=8).to_dict()
    table["table"]["position"]["row_group"] = {"span": 9, "beyond": 0}
    with pytest.raises(PlanError, match="a table has no rows of text"):
        ExtensionPlan.from_dict(table)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"pair_groups": [1, 2, 0, 1, 1, 1, 1, 1]}, "groups of pairs below 1"),
        ({"pair_groups": [1, 2]}, "another number than its scheme has"),
        ({"pair_groups": [], "pair_shares": [0.5] * 8}, "shares of pairs without a group that follows rows"),
        ({"pair_groups": [], "pair_shares": [1.5] * 8, "row_group": {"span": 9, "beyond": 0}}, "outside 0 to 1"),
    ],
)
def test_maps_by_pair_are_checked(edit: dict[str, Any], message: str) -> None:
    data = DPE(scales=[2, 4], window=32).plan(detect_scheme(tiny_llama()), factor=8).to_dict()
    assert ExtensionPlan.from_dict(data).to_dict() == data
    data["parts"][1]["key"] |= edit
    with pytest.raises(PlanError, match=message):
        ExtensionPlan.from_dict(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"fade": {"strength": 0, "reference": 9}}, "fades a band by strength 0 from 9 keys"),
        ({"fade": {"strength": 1, "reference": 0}}, "fades a band by strength 1 from 0 keys"),
        ({"fade": {"strength": 1, "reference": 9}, "high": 99}, "of all farther keys"),
        ({"fade": {"strength": 1, "reference": 9}, "low": 0}, "of all farther keys"),
        ({"fade": {"strength": 1}}, "parts.1.fade lacks \\['reference'\\]"),
        ({"decay": {"strength": -1, "start": 9}}, "decay by strength -1 from distance 9"),
        ({"decay": {"strength": 1, "start": 0}}, "decay by strength 1 from distance 0"),
        ({"decay": {"strength": 1, "start": 9}, "chunk": 4}, "not of chunks"),
        ({"decay": {"strength": 1, "start": 1.5}}, "decay.start is 1.5"),
    ],
)
def test_what_is_taken_from_logits_is_checked(edit: dict[str, Any], message: str) -> None:
    plan = as_method("rerope+fade").plan(detect_scheme(tiny_llama()), factor=8)
    data = plan.to_dict()
    data["parts"][1] |= edit
    with pytest.raises(PlanError, match=message):
        ExtensionPlan.from_dict(data)


def test_file_round_trip(plan: ExtensionPlan, tmp_path: Path) -> None:
    path = plan.save(tmp_path)
    assert ExtensionPlan.load(path) == ExtensionPlan.load(tmp_path) == plan


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            data = data[int(key) if key.isdigit() else key]  # type: ignore[index]
        data[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("schema", 4), "schema 4; this version of hf_posext reads 1 to 3"),
        (change("surprise", 1), "unknown \\['surprise'\\]"),
        (lambda data: data.pop("factor"), "lacks \\['factor'\\]"),
        (change("factor", 1e300), "factor is 1e\\+300"),
        (change("factor", True), "factor is True"),
        (change("target_length", "4096"), "target_length is 4096"),
        (change("target_length", 10**30), "target_length is 10000"),
        (change("method", ["yarn"]), "method is"),
        (change("rotaries", "x" * 99), "rotaries is xxx"),
        (change("rotaries.0.inv_freq", [0.1]), "1 frequencies for ''; its scheme has 8"),
        (change("rotaries.0.inv_freq", [-1.0] * 8), "frequencies -1.0"),
        (change("rotaries.0.inv_freq", [99.0] * 8), "99.0; 0 to 2 pi"),
        (change("rotaries.0.name", "layer"), "'layer', which its own scheme does not have"),
        (change("scheme.rotaries.0.surprise", 1), "unknown \\['surprise'\\]"),
        (change("scheme", []), "scheme is \\[\\]"),
        (change("target_length", 3), "from 64 to 3 tokens"),
        (change("rotaries.0.attention_factor", 0), "attention_factor 0"),
        (change("scheme.kind", "magic"), "kind is magic"),
        (change("scheme.rotaries.0.theta", "1e4"), "theta is 1e4"),
    ],
)
def test_corrupt_plans_are_refused(
    plan: ExtensionPlan, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = plan.to_dict()
    edit(data)
    file = tmp_path / "posext_plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        ExtensionPlan.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not a plan in JSON"),
        ("[]", "schema None"),
        ('{"schema": NaN}', "NaN is not a number"),
        ("[" * 100_000, "not a plan in JSON"),
        (" " * (4 * 2**20 + 1), "at most 4194304"),
    ],
)
def test_files_that_are_no_plan(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "posext_plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        ExtensionPlan.load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan at"):
        ExtensionPlan.load(tmp_path)


def test_describe_tells_lengths_and_parameters(plan: ExtensionPlan) -> None:
    assert plan.describe().startswith("yarn: 64 -> 512 tokens (x8), variant=code, beta_fast=32")


def test_the_former_name_of_a_band() -> None:
    with pytest.warns(DeprecationWarning, match="Part is now called Band"):
        assert plan_module.Part is plan_module.Band
