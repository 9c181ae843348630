"""Arguments that people type into `patch_model`, right and wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from hf_posext import Patch, SelfExtend, YaRN, detect_scheme, list_methods, patch_model
from hf_posext.errors import (
    InvalidParameterError,
    NoEffectError,
    PlanError,
    UnknownMethodError,
    UnsupportedModelError,
)
from hf_posext.methods import as_method, methods
from hf_posext.methods import base as registry

from ..conftest import TRAINED, logits, tiny_gpt2, tiny_llama, tokens

LONG = tokens(3 * TRAINED)
HUGE = 10**400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": "8"}, "Expected a number above 0 and up to 16,777,216, got factor='8'"),
        ({"factor": torch.tensor(8.0)}, r"got factor=tensor\(8.\)"),
        ({"factor": True}, "got factor=True"),
        ({"factor": math.nan}, "got factor=nan"),
        ({"factor": HUGE}, "got factor=1000"),
        ({"factor": 1e9}, "a number above 0 and up to 16,777,216, got factor=1000000000.0"),
        ({"factor": 2**18 + 1}, "a target of at most 16,777,216 tokens, got 64 trained x 262145. Pass a smaller"),
        ({"factor": -2}, "got factor=-2"),
        ({"target_length": "4096"}, "Expected a whole number of tokens above 0 .*, got target_length='4096'"),
        ({"target_length": 512.5}, "a whole number of tokens .*, got target_length=512.5"),
        ({"target_length": math.nan}, "got target_length=nan"),
        ({"target_length": torch.tensor(512)}, r"got target_length=tensor\(512\)"),
        ({"target_length": 2**24 + 1}, "got target_length=16777217"),
        ({"factor": 8, "trained_length": "512"}, "got trained_length='512'"),
        ({"factor": 8, "trained_length": 512.5}, "got trained_length=512.5"),
        ({"factor": 8, "trained_length": 10**30}, "got trained_length=1000"),
        ({"factor": 8, "target_length": 1000}, "factor 8 means 512 tokens, and target_length is 1000. Pass one of"),
        ({"factor": 8, "beta_fast": "16"}, "yarn beta_fast to be a number, got '16'"),
        ({"factor": 8, "beta_fast": math.nan}, "yarn beta_fast to be a number, got nan"),
        ({"factor": 8, "beta_fast": HUGE}, "yarn beta_fast to be a number, got 1000"),
        ({"factor": 8, "beta_fats": 16}, "yarn has no parameter 'beta_fats'; did you mean 'beta_fast'"),
        ({"factor": 8, "beta_fast": 0.5}, "Expected 0 < beta_slow < beta_fast"),
    ],
)
@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_numbers_that_cannot_be(llama: LlamaForCausalLM, method: str, arguments: dict[str, Any], message: str) -> None:
    if method != "yarn" and not arguments.keys() <= {"factor", "target_length", "trained_length"}:
        arguments, message = arguments | {"window": "16"}, "rerope (window to be .*, got '16'|has no parameter)"
    before = logits(llama, LONG)
    with pytest.raises(InvalidParameterError, match=message):
        patch_model(llama, method, **arguments)
    assert torch.equal(logits(llama, LONG), before)


def test_numbers_of_numpy_and_whole_floats_are_numbers(llama: LlamaForCausalLM) -> None:
    with patch_model(llama, "yarn", factor=np.float32(8), beta_fast=np.int64(16)) as patch:
        plan = patch.plan
    with patch_model(llama, YaRN(beta_fast=16), target_length=512.0) as patch:  # type: ignore[arg-type]
        assert patch.plan == plan and type(patch.plan.target_length) is int
    plan.to_dict()


def test_hyper_parameters_are_keywords(llama: LlamaForCausalLM) -> None:
    scheme = detect_scheme(llama)
    for name, parameters, method in (
        ("yarn", {"beta_fast": 16}, YaRN(beta_fast=16)),
        ("self-extend", {"group": 8, "window": 32}, SelfExtend(group=8, window=32)),
        ("yarn(beta_slow=2)", {"beta_fast": 16}, YaRN(beta_slow=2, beta_fast=16)),
    ):
        with patch_model(llama, name, factor=8, **parameters) as patch:
            assert patch.plan == method.plan(scheme, factor=8)
    with patch_model(llama, "theta", theta=5e5, factor=8) as patch:
        assert patch.plan.rotaries[0].rope_parameters["rope_theta"] == 5e5  # type: ignore[index]
    for method, message in (
        ("yarn+log-n", r"composes 2 methods, got beta_fast. Write .* as in yarn\(...\)\+log-n"),
        (YaRN(), "a method object has its hyper-parameters already, got beta_fast"),
        (YaRN().plan(scheme, factor=8), "a plan has its lengths already, got beta_fast"),
        ("yarn(beta_fast=8)", "Expected one beta_fast, got 8 in the name and 16 as the argument. Pass one."),
    ):
        with pytest.raises(InvalidParameterError, match=message):
            patch_model(llama, method, beta_fast=16)


@pytest.mark.parametrize(
    ("text", "same", "other"),
    [
        ("yarn(factor=4)", {"factor": 4}, {"factor": 8}),
        ("yarn(factor=4)", {"factor": np.float32(4)}, {"factor": np.float32(4.5)}),
        ("yarn(factor=4)", {"target_length": 4 * TRAINED}, {"target_length": 8 * TRAINED}),
        ("ntk(factor=2)+rerope(factor=4)", {"factor": 4.0}, {"factor": 2}),
        ("self-extend(group=8, factor=4)", {"group": 8}, {"group": 4}),
        ("dpe(scales=[4, 8], window=32, factor=4)", {"scales": (4, 8)}, {"scales": torch.tensor([4, 8])}),
        ("yarn(variant='paper', factor=4)", {"variant": "paper"}, {"variant": "code"}),
        ("dynamic-ntk(factor=4)", {"factor": 4}, {"factor": 4, "target_length": TRAINED}),
    ],
)
def test_a_parameter_given_twice_has_to_be_the_same(
    llama: LlamaForCausalLM, text: str, same: dict[str, Any], other: dict[str, Any]
) -> None:
    with patch_model(llama, text) as patch:
        expected = patch.plan
    with patch_model(llama, text, **same) as patch:
        assert patch.plan == expected
    with pytest.raises(InvalidParameterError, match="Expected one |Pass one of the two"):
        patch_model(llama, text, **other)


@pytest.mark.parametrize("name", ["YaRN", "ReRoPE", "NTK", "SelfExtend", "self_extend", "Dynamic-NTK", "LogN"])
def test_case_and_hyphens_do_not_count(name: str) -> None:
    plain = "".join(letter for letter in name.lower() if letter.isalpha())
    assert as_method(name).name.replace("-", "") == plain
    with pytest.raises(UnknownMethodError):
        as_method(name + "x")


def test_original_length_is_the_former_name(llama: LlamaForCausalLM) -> None:
    scheme = detect_scheme(llama)
    plan = YaRN().plan(scheme, factor=8, trained_length=32)
    with pytest.warns(DeprecationWarning, match="pass trained_length=") as caught:
        assert YaRN().plan(scheme, factor=8, original_length=32) == plan
    with pytest.warns(DeprecationWarning, match="pass trained_length=") as also:
        patch_model(llama, "yarn", factor=8, original_length=32)
    assert {entry.filename for entry in (*caught, *also)} == {__file__}
    with pytest.raises(InvalidParameterError, match="Pass trained_length only"):
        YaRN().plan(scheme, factor=8, original_length=32, trained_length=32)


def test_a_patch_says_what_it_is_and_is_opened_by_its_class(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    before = logits(llama, LONG)
    patch = patch_model(llama, "yarn", factor=8)
    assert repr(patch) == "Patch(LlamaForCausalLM, yarn: 64 -> 512 tokens (x8), " + repr(patch).split("(x8), ")[1]
    assert repr(patch).endswith("in force)")
    patched = logits(llama, LONG)
    patch.save_pretrained(tmp_path / "yarn")
    patch.undo()
    assert repr(patch).endswith("undone)")
    again = Patch.from_pretrained(tmp_path / "yarn")
    assert again.active and again.plan == patch.plan
    torch.testing.assert_close(logits(again.model, LONG), patched, atol=2e-5, rtol=0)  # weights at other addresses
    again.undo()
    torch.testing.assert_close(logits(again.model, LONG), before, atol=2e-5, rtol=0)


def test_a_patch_is_pushed_to_the_hub(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            uploaded["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> None:
            uploaded["repository"] = (repo_id, options)

        def upload_folder(self, *, folder_path: str, commit_message: str, **options: Any) -> Any:
            uploaded["files"] = {path.name for path in Path(folder_path).iterdir()}
            uploaded["message"] = commit_message
            return type("Commit", (), {"commit_url": "https://hub/me/model/commit/1"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    patch = patch_model(llama, "yarn", factor=8)
    assert patch.push_to_hub("me/model", private=True) == "https://hub/me/model/commit/1"
    assert uploaded["repository"] == ("me/model", {"private": True, "exist_ok": True})
    assert {"posext_plan.json", "config.json", "model.safetensors"} <= uploaded["files"]
    assert uploaded["message"] == "Upload yarn 64 -> 512"


def test_a_plan_asks_for_no_more_than_can_be_made() -> None:
    """Bytes are counted, not rows; before anything is made, and wherever the plan comes from."""
    model = tiny_gpt2()
    scheme = detect_scheme(model)
    assert 2**23 * 64 * 4 == 2**31  # the most positions that a table of width 64 may have
    with pytest.raises(InvalidParameterError, match="2147483904 bytes; at most 2147483648 .* 8388608 positions"):
        patch_model(model, "table-linear", target_length=2**23 + 1)
    plan = as_method("table-linear").plan(scheme, target_length=2**23)
    data = plan.to_dict() | {"target_length": 2**23 + 64, "factor": 2**17 + 1.0}
    with pytest.raises(PlanError, match="at most 2147483648"):
        type(plan).from_dict(data)
    with pytest.raises(PlanError, match="at most 2147483648"):
        patch_model(model, replace(plan, target_length=2**23 + 64, factor=2**17 + 1.0))


def test_a_factor_whose_temperature_rounds_to_one_is_applied_or_changes_nothing(llama: LlamaForCausalLM) -> None:
    with pytest.raises(
        NoEffectError,
        match="the phases of model.rotary_emb of llama, got yarn: .* without effect. Pass a larger factor",
    ):
        patch_model(llama, "yarn", factor=1 + 1e-7)
    with patch_model(llama, "yarn(attention_factor=1.00000001)", factor=4) as patch:
        tempered = logits(llama, LONG)
    with patch_model(llama, "yarn(attention_factor=1.0)", factor=4):
        assert torch.equal(logits(llama, LONG), tempered) and patch.plan.rotaries[0].attention_factor > 1


def test_a_model_without_weights_is_refused_in_one_line() -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_llama().config)
    for method in ("yarn", "rerope", "dynamic-ntk"):
        with pytest.raises(UnsupportedModelError, match="got LlamaForCausalLM on the meta device. Load its weights"):
            patch_model(skeleton, method, factor=8)


@pytest.mark.parametrize(
    "text",
    [
        *(f"linear+{name}" for name in ("linear", "ntk", "yarn", "llama3", "theta", "dynamic-ntk", "dynamic-yarn")),
        *("yarn+yarn", "nope+yarn", "resonance+yarn", "dynamic-yarn+resonance", "dynamic-ntk+partial", "none+yarn"),
    ],
)
def test_a_part_of_a_composition_that_leaves_no_trace_is_refused(text: str, llama: LlamaForCausalLM) -> None:
    name = text.split("+")[0]
    with pytest.raises(InvalidParameterError, match=f"{name} leaves no trace in {text}".replace("+", r"\+")):
        patch_model(llama, text, factor=4)


@pytest.mark.parametrize("text", ["yarn+resonance", "yarn+log-n", "ntk+rerope", "yarn+nope", "dynamic-yarn+log-n"])
def test_other_compositions_are_more_than_each_part(text: str, llama: LlamaForCausalLM) -> None:
    scheme = detect_scheme(llama)
    composed = as_method(text).plan(scheme, factor=4).to_dict()
    for part in text.split("+"):
        alone = as_method(part).plan(scheme, factor=4).to_dict()
        assert any(composed[key] != alone[key] for key in ("rotaries", "parts", "query_scale"))


def test_a_plan_without_effect_is_refused() -> None:
    windows = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, **windows)).eval()
    with pytest.raises(NoEffectError, match="no layer that rotates sees farther back than 16 tokens, .* 64"):
        patch_model(model, "yarn", factor=4)
    with patch_model(model, "none"):
        pass
    with pytest.raises(NoEffectError, match="Pass a larger factor"):
        patch_model(tiny_llama(), "yarn", factor=1)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Entry points of packages that are not there."""

    def install(**values: str) -> None:
        entries = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in values.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)
        monkeypatch.setattr(registry, "_pending", True)
        monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    return install


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nosuchmodule:X", "ModuleNotFoundError"),
        ("os.path:join", "expected a subclass of Method"),
        ("json:nothing", "AttributeError"),
        ("tests.patching.test_patch_arguments:Shadow", "method 'yarn' is registered as hf_posext.methods.yarn"),
        ("tests.patching.test_patch_arguments:leave", "expected a subclass"),
    ],
)
def test_a_broken_entry_point_is_left_out_by_name(installed: Any, value: str, reason: str) -> None:
    names = [info.name for info in list_methods()]
    installed(boom=value, good="tests.patching.test_patch_arguments:Good")
    with pytest.warns(UserWarning, match="the method 'boom' of an unknown package is left out") as caught:
        first = [info.name for info in list_methods()]
    assert reason in str(caught[0].message) and len(caught) == 1
    assert first == [info.name for info in list_methods()] == sorted([*names, "good-one"])
    assert methods()["yarn"] is YaRN


class Shadow(YaRN):
    name = "yarn"


class Good(YaRN):
    name = "good-one"


def leave() -> None:
    raise SystemExit
