"""Adapters that remember their positions: saved, opened again, and refused where they do not belong."""

from __future__ import annotations

import ast
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_posext import load_patched, patch_model, unpatch_model
from hf_posext.adapters import load_adapter, save_adapter, verify_adapter
from hf_posext.adapters.save import adapter_readme
from hf_posext.errors import (
    AlreadyPatchedError,
    CheckpointError,
    InvalidParameterError,
    NotPatchedError,
    PlanMismatchError,
    UnsupportedModelError,
)
from hf_posext.patching import find_patch
from tests.adapters.helpers import KINDS, files, structure, train, with_adapter
from tests.conftest import TRAINED, logits, realigned, tiny_gpt2, tiny_llama, tokens

IDS = tokens(3 * TRAINED)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of it, trained under yarn x4."""
    return make_adapter(base, tmp_path / "adapter")


def open_base(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def make_adapter(base: Path, path: Path, method: str = "yarn", **options: Any) -> Path:
    model = open_base(base)
    patch_model(model, method, factor=4)
    return save_adapter(with_adapter(model, **options), path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["yarn", "self-extend"])
def test_opens_to_the_same_logits(method: str, kind: str, base: Path, tmp_path: Path) -> None:
    model = open_base(base)
    patch_model(model, method, factor=4)
    peft = with_adapter(model, **KINDS[kind])
    train(peft, 2 * TRAINED)
    expected = logits(realigned(peft), IDS)
    save_adapter(peft, tmp_path / "adapter")
    opened = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(realigned(opened), IDS), expected)
    assert verify_adapter(opened, tmp_path / "adapter")
    plain = open_base(base)
    assert (logits(load_adapter(tmp_path / "adapter", base=plain), IDS) - expected).abs().max() < 1e-5
    assert find_patch(plain) is not None


def test_merging_keeps_the_patch_and_the_checkpoint_is_plain(adapter: Path, tmp_path: Path) -> None:
    model = load_adapter(adapter)
    expected = logits(model, IDS)
    merged = model.merge_and_unload()
    # one product of matrices instead of three, in float32
    torch.testing.assert_close(logits(merged, IDS), expected, atol=1e-5, rtol=1e-5)
    patch = find_patch(merged)
    assert patch is not None and patch.active
    patch.save_pretrained(tmp_path / "merged")
    plain = open_base(tmp_path / "merged")
    assert torch.equal(logits(realigned(plain), IDS), logits(realigned(merged), IDS))
    assert plain.config.max_position_embeddings == 4 * TRAINED


@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_merging_in_bfloat16_is_as_exact_as_not_merging(method: str) -> None:
    model = tiny_llama().to(torch.bfloat16)
    base = {name: weight.double() for name, weight in model.named_parameters()}
    patch_model(model, method, factor=4)
    network = with_adapter(model, target_modules="all-linear")  # which PEFT keeps in float32
    exact = copy.deepcopy(network).double()
    expected = logits(exact, IDS)
    weights = dict(exact.merge_and_unload().named_parameters())
    before = logits(network, IDS)
    merged = network.merge_and_unload()
    for name, weight in merged.named_parameters():
        # PEFT rounds the product of its matrices to 8 bits, and then the sum.
        product = (weights[name] - base[name]).abs()
        assert ((weight - weights[name]).abs() <= 2**-8 * (1 + 2**-8) * (weights[name].abs() + product)).all()
    errors = [(result - expected).square().mean().sqrt() for result in (before, logits(merged, IDS))]
    # Activations are rounded before they are multiplied. Now the weights are, too: two equal and independent errors.
    assert 0 < errors[1] < 2**0.5 * errors[0]


def test_trained_on_where_asked(adapter: Path) -> None:
    frozen, trainable = load_adapter(adapter), load_adapter(adapter, is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert any("lora_A" in name and p.requires_grad for name, p in trainable.named_parameters())


def test_base_that_carries_the_same_plan(adapter: Path, base: Path) -> None:
    model = open_base(base)
    patch_model(model, "yarn", factor=4)
    opened = load_adapter(adapter, base=model)
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(load_adapter(adapter)), IDS))


def test_arguments_for_a_base_that_is_given_are_refused(adapter: Path, base: Path) -> None:
    with pytest.raises(InvalidParameterError, match="beside a base, got dtype, trainable. Load the base with them"):
        load_adapter(adapter, open_base(base), dtype=torch.bfloat16, trainable=True)


def test_undone_patch_leaves_the_adapter_on_the_plain_base(adapter: Path, base: Path) -> None:
    opened = load_adapter(adapter)
    unpatch_model(opened)
    opened.save_pretrained(adapter / "plain")  # there is no plan any more, so that PEFT writes what it always writes
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = AutoPeftModelForCausalLM.from_pretrained(adapter / "plain")
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(plain), IDS))


# What does not belong together


def test_other_factor_is_refused_with_both_plans(adapter: Path, base: Path) -> None:
    model = open_base(base)
    patch_model(model, "yarn", factor=2)
    before = logits(model, IDS)
    with pytest.raises(PlanMismatchError) as caught:
        load_adapter(adapter, base=model)
    message = str(caught.value)
    assert "trained under (yarn: 64 -> 256 tokens (x4)" in message
    assert "carries (yarn: 64 -> 128 tokens (x2)" in message
    assert "keeps the factor that it was trained with" in message
    assert torch.equal(logits(model, IDS), before)


def test_other_method_is_refused_with_both_plans(adapter: Path, base: Path) -> None:
    model = open_base(base)
    patch_model(model, "linear", factor=4)
    with pytest.raises(PlanMismatchError, match=r"under \(yarn.*carries \(linear.*undo that first, unpatch_model"):
        load_adapter(adapter, base=model)


def test_other_weights_are_refused_and_nothing_is_left_on_them(adapter: Path) -> None:
    torch.manual_seed(7)
    stranger = type(tiny_llama())(tiny_llama().config).eval()
    before = logits(stranger, IDS)
    with pytest.raises(PlanMismatchError, match="another base model: its .* has other values"):
        load_adapter(adapter, base=stranger)
    assert find_patch(stranger) is None and torch.equal(logits(stranger, IDS), before)
    patch_model(stranger, "yarn", factor=4)
    assert not verify_adapter(stranger, adapter)


@pytest.mark.parametrize("beside", [False, True])
def test_an_error_of_peft_leaves_nothing_on_the_model(
    beside: bool, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if beside:
        model = load_adapter(adapter, model)
    before = structure(model)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory left for the adapter")

    monkeypatch.setattr("peft.peft_model.load_peft_weights", fail)
    with pytest.raises(MemoryError):
        load_adapter(adapter, model, adapter_name="second", is_trainable=True)
    assert structure(model) == before
    monkeypatch.undo()
    again = load_adapter(adapter, model, adapter_name="second")
    again.set_adapter("second")
    assert torch.equal(logits(realigned(again), IDS), logits(realigned(load_adapter(adapter)), IDS))


def test_base_in_half_precision_is_the_same_base(adapter: Path, base: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        assert not [r for r in verify_adapter(half, adapter).reasons if "another base" in r]


def test_other_architecture_is_refused(adapter: Path) -> None:
    with pytest.raises(PlanMismatchError, match="the adapter is for .llama.*the model is .gpt2"):
        load_adapter(adapter, base=tiny_gpt2())


def test_other_theta_is_refused(adapter: Path) -> None:
    model = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    with pytest.raises(PlanMismatchError, match="theta 10000.*theta 500000"):
        load_adapter(adapter, base=model)


def test_verify_tells_every_reason(adapter: Path, base: Path) -> None:
    fit = verify_adapter(open_base(base), adapter)
    assert not fit and fit.in_force is None and fit.plan.method == "yarn"
    assert [reason for reason in fit.reasons if "carries no patch" in reason]
    assert verify_adapter(load_adapter(adapter), adapter).reasons == ()


def test_adapter_that_has_no_place_is_refused(base: Path, tmp_path: Path) -> None:
    path = make_adapter(base, tmp_path / "adapter")
    weights = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(weights.replace(b"layers.1.self_attn.q", b"layers.9.self_attn.q"))
    with pytest.raises(CheckpointError, match="lacks 2 weights of its own config, .*layers.1.self_attn.q_proj.lora_A"):
        verify_adapter(open_patched(base), path)
    (path / "adapter_model.safetensors").write_bytes(weights)
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"base_model.model.model.layers.9.weight": torch.ones(2)}, path / "adapter_model.safetensors")
    assert "it has no place for model.layers.9.weight" in verify_adapter(open_patched(base), path).reasons[0]
    with pytest.raises(PlanMismatchError, match="has no place for model.layers.9"):
        load_adapter(path)


def open_patched(base: Path) -> PreTrainedModel:
    model = open_base(base)
    patch_model(model, "yarn", factor=4)
    return model


def test_second_adapter_or_none_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = open_base(base)
    with pytest.raises(NotPatchedError, match="got one without a patch"):
        save_adapter(with_adapter(model), tmp_path / "new")
    with pytest.raises(UnsupportedModelError, match="patch.save_pretrained"):
        save_adapter(open_base(base), tmp_path / "new")
    with pytest.raises(UnsupportedModelError, match="without an adapter"):
        load_adapter(adapter, base=model)
    assert not (tmp_path / "new").exists()


def test_checkpoint_of_a_model_with_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    model = open_base(base)
    patch = patch_model(model, "yarn", factor=4)
    with_adapter(model)
    with pytest.raises(UnsupportedModelError, match=r"save_adapter\(model, path\)\. To merge"):
        patch.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What others see in the directory


def test_plain_transformers_refuses_the_directory(adapter: Path) -> None:
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(adapter)


def test_plain_peft_with_the_config_beside_the_adapter(adapter: Path, base: Path) -> None:
    """Follow the README of the adapter without this package."""
    code = (adapter / "README.md").read_text().split("```python\n")[2].split("```")[0].replace("PATH", str(adapter))
    names: dict[str, Any] = {}
    exec(code.replace('from_pretrained("base"', f'from_pretrained("{base}"'), names)
    plain = names["model"].eval()
    assert torch.equal(logits(realigned(plain), IDS), logits(realigned(load_adapter(adapter)), IDS))


def test_base_that_says_the_positions_itself(base: Path, tmp_path: Path) -> None:
    patch = patch_model(open_base(base), "yarn", factor=4)
    patch.save_pretrained(tmp_path / "extended")
    (tmp_path / "extended" / "posext_plan.json").unlink()  # nothing but transformers' own files
    peft = with_adapter(open_patched(base))
    save_adapter(peft, tmp_path / "adapter", base_model=str(tmp_path / "extended"))
    expected = logits(realigned(peft), IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for opener in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            assert torch.equal(logits(realigned(opener.from_pretrained(tmp_path / "adapter").eval()), IDS), expected)
    assert torch.equal(logits(realigned(load_adapter(tmp_path / "adapter")), IDS), expected)
    assert "AutoPeftModelForCausalLM" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(PlanMismatchError, match="does not say the positions"):
        save_adapter(peft, tmp_path / "new", base_model=str(base))


def test_readme_says_what_can_be_done_without_us(base: Path, tmp_path: Path) -> None:
    native = (make_adapter(base, tmp_path / "a") / "README.md").read_text()
    assert "yarn: 64 -> 256 tokens" in native and "AutoConfig.from_pretrained" in native
    late = (make_adapter(base, tmp_path / "b", method="self-extend") / "README.md").read_text()
    assert "not possible, since positions are remapped inside attention" in late
    assert "AutoConfig" not in late


# Tables of positions that the adapter trains too (modules_to_save)


def gpt2_adapter(model: PreTrainedModel) -> PeftModel:
    return with_adapter(model, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["wpe"])


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
def test_table_that_the_adapter_trains(order: str, tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "base")
    model = open_base(tmp_path / "base")
    steps: list[Callable[[], Any]] = [
        lambda: patch_model(model, "table-linear", factor=4),
        lambda: gpt2_adapter(model),
    ]
    peft = [step() for step in (steps if order == "patch first" else steps[::-1])][order == "patch first"]
    train(peft, 2 * TRAINED)
    expected = logits(peft, IDS)
    save_adapter(peft, tmp_path / "adapter")
    opened = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(realigned(opened), IDS), logits(realigned(peft), IDS))

    merged = opened.merge_and_unload()
    torch.testing.assert_close(logits(merged, IDS), expected, atol=1e-5, rtol=1e-5)
    patch = find_patch(merged)
    assert patch is not None
    patch.save_pretrained(tmp_path / "merged")
    for again in (open_base(tmp_path / "merged"), load_patched(tmp_path / "merged")):
        assert torch.equal(logits(realigned(again), IDS), logits(realigned(merged), IDS))
    shipped = open_base(tmp_path / "base").transformer.wpe.weight
    unpatch_model(again)
    assert torch.equal(again.transformer.wpe.weight, shipped)


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
def test_undo_of_a_table_that_an_adapter_trains(order: str) -> None:
    model = tiny_gpt2()
    shipped = model.transformer.wpe.weight.clone()
    if order == "patch first":
        patch = patch_model(model, "table-linear", factor=4)
        peft = gpt2_adapter(model)
        with pytest.raises(UnsupportedModelError, match="got a copy that an adapter trains.*merge_and_unload"):
            patch.undo()
        assert patch.active
    else:
        peft = gpt2_adapter(model)
        patch = patch_model(peft, "table-linear", factor=4)
        with pytest.raises(AlreadyPatchedError):
            patch_model(peft, "table-linear", factor=4)
    merged = peft.merge_and_unload()
    assert merged.transformer.wpe.num_embeddings == 4 * TRAINED
    patch.undo()
    assert torch.equal(merged.transformer.wpe.weight, shipped)
    assert merged.transformer.wpe.num_embeddings == merged.config.n_positions == TRAINED
    assert torch.isfinite(logits(merged, tokens(TRAINED))).all()


def test_saving_never_writes_over_files(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "README.md").write_text("keep me")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        make_adapter(base, path)
    assert files(path) == {"README.md": b"keep me"}


def test_names_from_outside_mark_up_nothing_in_the_readme(base: Path, tmp_path: Path) -> None:
    path = make_adapter(base, tmp_path / "adapter")
    entries = json.loads((path / "adapter_config.json").read_text())
    name = 'org/<img src=x>](http://x) """ \n``` {{ 7 * 7 }}'
    (path / "adapter_config.json").write_text(json.dumps(entries | {"base_model_name_or_path": name}))
    text = adapter_readme(path).partition("\n---\n")[2]
    assert "**org/&lt;img" in text and "](http" not in text.replace(json.dumps(name), "").replace("](https://pypi", "")
    code = [block.partition("\n```")[0] for block in text.split("```python\n")[1:]]
    constants = [node.value for block in code for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert name in constants
