"""A plan survives JSON; a corrupt, hostile or newer one is refused with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hf_posext.plan as plan_module
from hf_posext import ExtensionPlan, YaRN, detect_scheme
from hf_posext.errors import PlanError
from hf_posext.methods import DPE, Composition, LogN, RemapMethod, ReRoPE, as_method
from hf_posext.plan import Band, BucketPlan, Edit, PositionMap, QueryScale, Sinusoids, Slopes, TablePlan

from ..conftest import tiny_bloom, tiny_gpt2, tiny_llama, tiny_t5


@pytest.fixture(scope="module")
def plan() -> ExtensionPlan:
    return YaRN().plan(detect_scheme(tiny_llama()), factor=8)


SCHEMA_3 = {
    "method": "rerope+log-n",
    "parameters": [{"name": "rerope", "factor": None, "window": None}, {"name": "log-n", "factor": None}],
    "factor": 8.0,
    "trained_length": 64,
    "target_length": 512,
    "rotaries": [],
    "query_scale": {**vars(QueryScale(length=64, log=True))},
    "table": None,
    "slopes": [],
    "buckets": None,
    "sinusoids": None,
}
"""A file as it was written when plans had a field for each type of edit, without its scheme and bands."""


def test_files_have_a_field_for_each_type_of_edit() -> None:
    plan = as_method("rerope+log-n").plan(detect_scheme(tiny_llama()), factor=8)
    data = plan.to_dict()
    assert {key: data[key] for key in SCHEMA_3} == SCHEMA_3
    assert data.keys() - SCHEMA_3.keys() == {"schema", "scheme", "parts"}
    assert [(part["low"], part["high"]) for part in data["parts"]] == [(0, 48), (48, None)]
    for builder, text, field in (
        (tiny_gpt2, "table-linear", "table"),
        (tiny_bloom, "alibi-linear", "slopes"),
        (tiny_t5, "bucket-linear", "buckets"),
    ):
        plan = as_method(text).plan(detect_scheme(builder()), factor=8, trained_length=64)
        written = {key for key in ("rotaries", *SCHEMA_3, "parts") if plan.to_dict()[key]} - {"method", "parameters"}
        assert written == {"factor", "trained_length", "target_length", field}
        assert ExtensionPlan.from_dict(plan.to_dict()) == plan


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
    with pytest.raises(PlanError, match="Expected plan.parts.0 to be an object of Band, got 1"):
        ExtensionPlan.from_dict(data)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"span": 0, "beyond": 0}, r"row_group.span to be a whole number of at least 1, got 0"),
        ({"span": 1, "beyond": -1}, r"row_group.beyond to be a whole number of at least 0, got -1"),
    ],
)
def test_groups_that_follow_rows_are_checked(group: dict[str, int], message: str) -> None:
    data = as_method("jet-long").plan(detect_scheme(tiny_llama()), factor=8).to_dict()
    data["parts"][1]["key"]["row_group"] = group
    with pytest.raises(PlanError, match=message):
        ExtensionPlan.from_dict(data)
    table = as_method("table-linear").plan(detect_scheme(tiny_gpt2()), factor=8).to_dict()
    table["table"]["position"]["row_group"] = {"span": 9, "beyond": 0}
    with pytest.raises(PlanError, match="a table has no rows of text"):
        ExtensionPlan.from_dict(table)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"pair_groups": [1, 2, 0, 1, 1, 1, 1, 1]},
            "plan.parts.1.key.pair_groups.2 to be a whole number of at least 1, got 0",
        ),
        ({"pair_groups": [1, 2]}, "another number than its scheme has"),
        ({"pair_groups": [], "pair_shares": [0.5] * 8}, "shares of pairs without a group that follows rows"),
        (
            {"pair_groups": [], "pair_shares": [1.5] * 8, "row_group": {"span": 9, "beyond": 0}},
            "pair_shares.0 to be a number from 0 to 1, got 1.5",
        ),
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
        ({"fade": {"strength": 0, "reference": 9}}, "plan.parts.1.fade.strength to be a number above 0, got 0"),
        ({"fade": {"strength": 1, "reference": 0}}, "fade.reference to be a whole number of at least 1, got 0"),
        ({"fade": {"strength": 1, "reference": 9}, "high": 99}, "does not contain all farther keys"),
        ({"fade": {"strength": 1, "reference": 9}, "low": 0}, "does not contain all farther keys"),
        ({"fade": {"strength": 1}}, "parts.1.fade lacks \\['reference'\\]"),
        ({"decay": {"strength": -1, "start": 9}}, "decay.strength to be a number above 0, got -1"),
        ({"decay": {"strength": 1, "start": 0}}, "decay.start to be a whole number of at least 1, got 0"),
        ({"decay": {"strength": 1, "start": 9}, "chunk": 4}, "chunks of 4 decay by distance"),
        ({"decay": {"strength": 1, "start": 1.5}}, "decay.start to be a whole number of at least 1, got 1.5"),
    ],
)
def test_what_is_taken_from_logits_is_checked(edit: dict[str, Any], message: str) -> None:
    plan = as_method("rerope+fade").plan(detect_scheme(tiny_llama()), factor=8)
    data = plan.to_dict()
    data["parts"][1] |= edit
    with pytest.raises(PlanError, match=message):
        ExtensionPlan.from_dict(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (QueryScale(length=1), "QueryScale.length to be a whole number of at least 2, got 1"),
        (QueryScale(length=64, step=0), "QueryScale.step to be a whole number of at least 1 or None, got 0"),
        (QueryScale(length=64, first_layer=-1), "QueryScale.first_layer to be a whole number of at least 0, got -1"),
        (TablePlan(PositionMap(modulo=0)), "PositionMap.modulo to be a whole number of at least 1 or None, got 0"),
        (TablePlan(PositionMap(), alpha=1.0), "TablePlan.alpha to be a number from 0 up to, but not including, 1"),
        (BucketPlan(factor=math.nan), "BucketPlan.factor to be a number above 0, got nan"),
        (Slopes((0.5, -1.0)), "Slopes.values to be a list of numbers of at least 0, got"),
    ],
)
def test_edits_in_memory_are_checked_as_those_of_a_file(edit: Edit, message: str) -> None:
    plan = as_method("yarn").plan(detect_scheme(tiny_llama()), factor=8)
    with pytest.raises(PlanError, match=f"Expected {message}"):
        replace(plan, edits=(*plan.edits, edit)).check()


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
        (change("factor", 1e300), "plan.factor to be a number above 0, got 1e\\+300. Pass at most"),
        (change("factor", True), "plan.factor to be a number above 0, got True"),
        (change("target_length", "4096"), "plan.target_length to be a whole number, got '4096'"),
        (change("target_length", 10**30), "plan.target_length to be a whole number, got 10000.* Pass at most"),
        (change("method", ["yarn"]), "plan.method to be text, got "),
        (change("rotaries", "x" * 99), "plan.rotaries to be a list, got 'xxx"),
        (change("rotaries.0.inv_freq", [0.1]), "1 numbers for ''; its scheme has 8"),
        (change("rotaries.0.inv_freq", [-1.0] * 8), "inv_freq.0 to be a number from 0 to 2 pi, got -1.0"),
        (change("rotaries.0.inv_freq", [99.0] * 8), "inv_freq.0 to be a number from 0 to 2 pi, got 99.0"),
        (change("rotaries.0.name", "layer"), "'layer', which its own scheme does not have"),
        (change("scheme.rotaries.0.surprise", 1), "unknown \\['surprise'\\]"),
        (change("scheme", []), "plan.scheme to be an object of PositionalScheme, got \\[\\]"),
        (change("target_length", 3), "from 64 to 3 tokens"),
        (change("rotaries.0.attention_factor", 0), "attention_factor to be a number above 0, got 0"),
        (change("scheme.kind", "magic"), "kind is magic"),
        (change("scheme.rotaries.0.theta", "1e4"), "theta to be a number, got '1e4'"),
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


def test_former_names() -> None:
    with pytest.warns(DeprecationWarning, match="Part is now called Band"):
        assert plan_module.Part is plan_module.Band
    with pytest.warns(DeprecationWarning, match="MAX_PARTS is now called MAX_BANDS"):
        assert plan_module.MAX_PARTS == plan_module.MAX_BANDS
    plan = as_method("rerope+log-n").plan(detect_scheme(tiny_llama()), factor=8)
    with pytest.warns(DeprecationWarning, match="parts is now called bands"):
        assert plan.parts == plan.bands
    with pytest.warns(DeprecationWarning, match="parts is now called bands"):
        assert ReRoPE().parts(plan) == plan.bands
    with pytest.warns(DeprecationWarning, match="parts is now called components"):
        composition = Composition(parts=(ReRoPE(), LogN()))  # type: ignore[call-arg]
    assert composition == as_method("rerope+log-n")
    with pytest.warns(DeprecationWarning, match="parts is now called components"):
        assert composition.parts == (ReRoPE(), LogN())


def test_former_fields() -> None:
    """Methods of other packages give them to `dataclasses.replace`."""
    plan = as_method("rerope+log-n").plan(detect_scheme(tiny_llama()), factor=8)
    with pytest.warns(DeprecationWarning, match=r"parts, query_scale is now called edits; call plan.with_edits"):
        assert replace(plan, parts=plan.bands[:1], query_scale=None).edits == plan.bands[:1]  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="slopes, sinusoids is now called edits"):
        extended = replace(plan, slopes=(0.5,), sinusoids=PositionMap(rate=2))  # type: ignore[call-arg]
    assert extended.edits == (*plan.edits, Slopes((0.5,)), Sinusoids(PositionMap(rate=2)))
    assert (extended.slopes, extended.sinusoids) == ((0.5,), PositionMap(rate=2))

    class Former(RemapMethod):
        name = "former"

        def parts(self, plan: ExtensionPlan) -> tuple[Band, ...]:
            return (Band(PositionMap(group=2), PositionMap(group=2)),)

    with pytest.warns(DeprecationWarning, match="rename the method of Former"):
        assert Former().plan(detect_scheme(tiny_llama()), factor=8).bands == Former().parts(plan)


def test_edits_have_one_order_and_are_bounded() -> None:
    plan = as_method("yarn+rerope+log-n").plan(detect_scheme(tiny_llama()), factor=8)
    assert replace(plan, edits=plan.edits[::-1]).edits == (*plan.rotaries, *plan.bands[::-1], plan.query_scale)
    with pytest.raises(PlanError, match="2 edits of the type QueryScale; at most 1"):
        replace(plan, edits=(*plan.edits, QueryScale(length=9))).check()
