"""The contract of every registered method on a model that others hold: hooks, twins, threads, the collector."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import PreTrainedModel

from hf_posext import detect_scheme, find_patch, patch_model, unpatch_model
from hf_posext.errors import AlreadyPatchedError
from hf_posext.testing import LENGTHS

from ..conftest import BUILDERS, TRAINED, logits, tokens
from .test_method_contract import CASES, build

LONG = tokens(2 * TRAINED)


def dispatched(model: PreTrainedModel) -> PreTrainedModel:
    """With a hook of accelerate on every leaf, as `device_map="auto"` makes it."""
    places = {
        path: "cpu"
        for path, module in model.named_modules()
        if path and not list(module.children()) and "Identity" not in type(module).__name__
    }
    hooked: PreTrainedModel = dispatch_model(model, places, force_hooks=True)
    return hooked


def traces(model: PreTrainedModel) -> set[tuple[str, object]]:
    """Classes, and attributes that a patch sets."""
    attributes = {(path, name) for path, module in model.named_modules() for name in vars(module) if "posext" in name}
    return attributes | {(path, type(module)) for path, module in model.named_modules()}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_hooks_change_nothing(name: str, kind: str) -> None:
    """Hooked before the patch or after it, and the hooks removed before the undo or not."""
    model, method = build(name, kind)
    before, untouched = logits(model, LONG), traces(model)
    with patch_model(model, method, **LENGTHS):
        patched = logits(model, LONG)

    patch = patch_model(dispatched(model), method, **LENGTHS)
    assert torch.equal(logits(model, LONG), patched), "hooked, then patched"
    patch.undo()
    assert torch.equal(logits(model, LONG), before), "hooked, patched, undone"
    patch = patch_model(model, method, **LENGTHS)
    remove_hook_from_submodules(model)
    patch.undo()
    assert torch.equal(logits(model, LONG), before), "hooked, patched, hooks removed, undone"

    model, method = build(name, kind)
    patch = patch_model(model, method, **LENGTHS)
    dispatched(model)
    assert torch.equal(logits(model, LONG), patched), "patched, then hooked"
    patch.undo()
    assert torch.equal(logits(model, LONG), before), "patched, hooked, undone"
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model, LONG), before), "patched, hooked, undone, hooks removed"
    assert traces(model) == untouched


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_model_that_shares_the_config_is_untouched(name: str, kind: str, tmp_path: Path) -> None:
    model, method = build(name, kind)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = model.generation_config
    assert twin.config is model.config
    before, config = logits(twin, LONG), twin.config.to_json_string(use_diff=False)
    limit = twin.generation_config.to_json_string()
    with patch_model(model, method, **LENGTHS):
        assert torch.equal(logits(twin, LONG), before)
        assert twin.config.to_json_string(use_diff=False) == config
        assert twin.generation_config.to_json_string() == limit
        twin.save_pretrained(tmp_path)
    assert model.config is twin.config and model.generation_config is twin.generation_config
    reopened = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(reopened, LONG), before)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_patch_is_one_from_every_handle(name: str, kind: str) -> None:
    model, method = build(name, kind)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    scheme, before = detect_scheme(model), logits(model, LONG)
    with patch_model(model, method, **LENGTHS):
        patched = logits(model, LONG)
    for handle in (model, model.base_model):
        patch = patch_model(handle, method, **LENGTHS)
        assert torch.equal(logits(model, LONG), patched)
        for part in (model, model.base_model) if handle is not model else parts:
            assert find_patch(part) is patch
            with pytest.raises(AlreadyPatchedError):
                patch_model(part, method, **LENGTHS)
        assert detect_scheme(model) == scheme
        unpatch_model(model)
        assert find_patch(model) is None and find_patch(model.base_model) is None
        assert torch.equal(logits(model, LONG), before)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_patched_model_is_freed_at_once(name: str, kind: str) -> None:
    model, method = build(name, kind)
    reference = weakref.ref(model)
    patch_model(model, method, **LENGTHS)
    logits(model, tokens(8))
    copied = copy.deepcopy(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None, "only the collector frees it"
    finally:
        gc.enable()
    unpatch_model(copied)  # refers to the copy, not to the model that is gone
    assert torch.equal(logits(copied, LONG), logits(BUILDERS[kind](), LONG))


@pytest.mark.parametrize("name", ["yarn", "rerope", "dynamic-ntk"])
def test_threads_that_patch_one_model_do_it_one_after_the_other(name: str) -> None:
    model, method = build(name, "rotary")
    before, wrong = logits(model, LONG), []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        for _ in range(4):
            try:
                patch = patch_model(model, method, **LENGTHS)
            except AlreadyPatchedError:
                continue
            try:
                patch.undo()
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and find_patch(model) is None
    assert torch.equal(logits(model, LONG), before)
