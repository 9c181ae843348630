"""Directories that somebody else wrote: refused with a reason, nothing executed, nothing changed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_posext import load_patched, patch_model
from hf_posext.adapters import load_adapter, save_adapter, verify_adapter
from hf_posext.decode import MAX_TOKENS
from hf_posext.errors import CheckpointError, PlanError, PlanMismatchError, PosExtError
from hf_posext.patching.untrusted import MAX_JSON_BYTES
from hf_posext.plan import MAX_BANDS, PositionMap
from tests.adapters.helpers import files, with_adapter
from tests.conftest import TRAINED, logits, tiny_gpt2, tiny_llama, tokens

MARKER = "executed"


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it, and two patched checkpoints."""
    root = tmp_path_factory.mktemp("originals")
    tiny_llama().save_pretrained(root / "base")
    model = type(tiny_llama()).from_pretrained(root / "base")
    patch_model(model, "yarn", factor=4)
    save_adapter(with_adapter(model, modules_to_save=["norm"]), root / "adapter")
    patch_model(tiny_llama(), "yarn", factor=4).save_pretrained(root / "checkpoint")
    patch_model(tiny_gpt2(), "table-linear", factor=4).save_pretrained(root / "table")
    return root


@pytest.fixture
def adapter(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "adapter", tmp_path / "adapter"))


@pytest.fixture
def checkpoint(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "checkpoint", tmp_path / "checkpoint"))


def refused(load: Callable[[Path], Any], path: Path, error: type[PosExtError], message: str) -> None:
    """The directory is refused for that reason; nothing in it was executed or changed."""
    before = files(path)
    with pytest.raises(error, match=message):
        load(path)
    assert files(path) == before
    assert not list(path.parent.rglob(MARKER))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_untouched_directories_open(adapter: Path, checkpoint: Path) -> None:
    assert verify_adapter(load_adapter(adapter), adapter)
    assert load_patched(checkpoint).config.max_position_embeddings == 4 * TRAINED


# Pickles


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_adapter_of_pickles(adapter: Path, name: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(pickle.dumps(Bomb(adapter.parent / MARKER)))
    refused(load_adapter, adapter, CheckpointError, f"contains only {name}, which could execute code")


def test_pickle_beside_the_weights_is_not_opened(adapter: Path, checkpoint: Path) -> None:
    for path, name in ((adapter, "adapter_model.bin"), (checkpoint, "pytorch_model.bin")):
        (path / name).write_bytes(pickle.dumps(Bomb(path.parent / MARKER)))
    load_adapter(adapter)
    load_patched(checkpoint)
    assert not list(adapter.parent.rglob(MARKER))


def test_checkpoint_of_pickles(checkpoint: Path, adapter: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(checkpoint.parent / MARKER)))
    refused(load_patched, checkpoint, CheckpointError, "pytorch_model.bin, which could execute code")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(checkpoint))  # the same as somebody's base
    refused(load_adapter, adapter, CheckpointError, "pytorch_model.bin, which could execute code")


def test_pickle_named_safetensors(adapter: Path, checkpoint: Path) -> None:
    bomb = pickle.dumps(Bomb(adapter.parent / MARKER))
    (adapter / "adapter_model.safetensors").write_bytes(bomb)
    refused(load_adapter, adapter, CheckpointError, "is not a safetensors file")
    (checkpoint / "model.safetensors").write_bytes(bomb)
    with pytest.raises(Exception, match="(?i)header"):  # safetensors' own refusal
        load_patched(checkpoint)
    assert not list(adapter.parent.rglob(MARKER))


def test_code_beside_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    (checkpoint / "evil.py").write_text(f"import pathlib\npathlib.Path({str(checkpoint.parent / MARKER)!r}).touch()\n")
    edit(checkpoint / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_patched(checkpoint)
    assert not list(checkpoint.parent.rglob(MARKER))


MINE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_beside_a_checkpoint_runs_where_it_is_trusted(tmp_path: Path) -> None:
    folder, saved, adapted = (tmp_path / name for name in ("mine", "saved", "adapter"))
    tiny_llama().save_pretrained(folder)
    (folder / "modeling_mine.py").write_text(MINE)
    places = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit(folder / "config.json", model_type="mine", architectures=["MineForCausalLM"], auto_map=places)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    patch = patch_model(model, "yarn", factor=2)
    patch.save_pretrained(saved)
    expected = logits(model, tokens(60))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_patched(saved)
    opened = load_patched(saved, trust_remote_code=True)
    assert type(opened).__name__ == "MineForCausalLM" and torch.equal(logits(opened, tokens(60)), expected)
    trained = with_adapter(model)
    expected = logits(trained, tokens(60))
    save_adapter(trained, adapted)
    with pytest.raises(CheckpointError, match="contains custom code"):
        load_adapter(adapted)
    assert torch.equal(logits(load_adapter(adapted, trust_remote_code=True), tokens(60)), expected)


def test_module_that_peft_would_import(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="antigravity")
    refused(load_adapter, adapter, CheckpointError, "imports a module that it names")


# Names


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", 3])
def test_shards_outside_of_the_directory(checkpoint: Path, name: object) -> None:
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(load_patched, checkpoint, CheckpointError, "which is outside of the directory")


def test_tables_that_the_model_does_not_have(originals: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals / "table", tmp_path / "table"))
    tables = path / "posext_replaced" / "tables.safetensors"
    (rows,) = load_file(tables).values()
    save_file({"../../lm_head": rows}, tables)
    refused(load_patched, path, PosExtError, "holds other tables")


@pytest.mark.parametrize("name", ["../../nowhere", "/nowhere/base", "", None, 7])
def test_base_that_is_not_there(adapter: Path, name: object) -> None:
    edit(adapter / "adapter_config.json", base_model_name_or_path=name)
    refused(load_adapter, adapter, CheckpointError, r"Pass it: load_adapter\(path, base=model\)")


def test_directory_that_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "no", "./no", "a/b/c", "../no"):
        with pytest.raises(CheckpointError, match="no such directory"):
            load_adapter(name)
    with pytest.raises(CheckpointError, match="neither a directory nor a repository"):
        load_adapter("nobody/nothing")  # the tests are offline
    with pytest.raises(CheckpointError, match="no such directory"):
        load_patched(tmp_path / "no")


# JSON bombs


@pytest.mark.parametrize("name", ["adapter_config.json", "posext_base.json", "config.json", "posext_plan.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{} " + " " * MAX_JSON_BYTES, "[]", "\\", "1" * 9999]
)
def test_json_that_is_no_object_or_without_end(adapter: Path, name: str, text: str) -> None:
    (adapter / name).write_text(text)
    refused(load_adapter, adapter, (CheckpointError, PlanError), "not JSON|bytes|object|schema")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["config.json", "posext_plan.json", "generation_config.json"])
def test_checkpoint_with_json_without_end(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("[" * 100_000)
    refused(load_patched, checkpoint, (CheckpointError, PlanError), "not JSON|not a plan")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adapter_config.json", "posext_plan.json", "posext_base.json"])
def test_files_that_are_missing(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    if name != "adapter_config.json":  # the configs say the same, as other writers write no more
        assert verify_adapter(load_adapter(adapter), adapter)
        for config in (adapter / "adapter_config.json", adapter / "config.json"):
            entries = json.loads(config.read_text())
            entries.pop(name.removesuffix(".json"), None)
            config.write_text(json.dumps(entries))
    refused(load_adapter, adapter, (CheckpointError, PlanError), f"no {name}|no plan at")  # type: ignore[arg-type]


def test_a_corrupt_fingerprint_says_what_to_do(adapter: Path) -> None:
    edit(adapter / "posext_base.json", samples=3)
    refused(load_adapter, adapter, CheckpointError, r"is corrupt: .*. Save the adapter again: save_adapter")


# Numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema 99; this version of hf_posext reads 1"),
        ({"factor": 1e9}, "lengths grow from 1 or more, up to 16777216"),
        ({"factor": 1e6}, "factor 1e\\+06, but goes from 64 to 256"),
        ({"target_length": 2**41}, "plan.target_length to be a whole number, got 2199.* Pass at most"),
        ({"factor": 8.0}, "factor 8, but goes from 64 to 256"),
        ({"target_length": 2**24 + 1}, "lengths grow from 1 or more, up to 16777216"),
        ({"trained_length": 0}, "lengths grow from 1"),
        ({"parts": None}, "Expected plan.parts to be a list, got None"),
        ({"unknown": 1}, "has unknown"),
    ],
)
def test_plans_out_of_bounds(adapter: Path, checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    for path, load in ((adapter, load_adapter), (checkpoint, load_patched)):
        edit(path / "posext_plan.json", **changes)
        refused(load, path, PlanError, message)


def test_two_plans_in_one_directory(adapter: Path, checkpoint: Path) -> None:
    for path, load in ((adapter, load_adapter), (checkpoint, load_patched)):
        edit(path / "posext_plan.json", method="other")
        refused(load, path, PlanMismatchError, "two plans")


def test_table_too_long_to_make(originals: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals / "table", tmp_path / "table"))
    edit(path / "posext_plan.json", target_length=MAX_TOKENS, factor=MAX_TOKENS / TRAINED)
    refused(load_patched, path, PlanError, f"a table of {MAX_TOKENS} positions x 64 numbers has .* at most {2**31}")


def test_too_many_parts(adapter: Path) -> None:
    position_map = asdict(PositionMap())
    part = {
        "query": position_map,
        "key": position_map,
        "low": 0,
        "high": None,
        "chunk": 1,
        "keys_below": None,
        "fade": None,
        "decay": None,
    }
    edit(adapter / "posext_plan.json", parts=[part] * (MAX_BANDS + 1))
    refused(load_adapter, adapter, PlanError, f"has {MAX_BANDS + 1} edits of the type Band; at most {MAX_BANDS}")


@pytest.mark.parametrize("rank", [10**9, 0, -1, "8", None])
def test_ranks_that_the_weights_do_not_have(adapter: Path, rank: object) -> None:
    edit(adapter / "adapter_config.json", posext_replaced={"peft_type": "LORA", "r": rank})
    refused(load_adapter, adapter, CheckpointError, "a rank of 1 to 4 in .*, as the weights have, got")
    entries = {"peft_type": "LORA", "r": 10**9}
    edit(adapter / "adapter_config.json", posext_replaced=entries, rank_pattern={"q_proj": rank})
    refused(load_adapter, adapter, CheckpointError, "a rank of 1 to 4 in .*, as the weights have, got")


@pytest.mark.parametrize("entries", ["LORA", ["r"], 8])
def test_replaced_entries_that_are_none(adapter: Path, entries: object) -> None:
    edit(adapter / "adapter_config.json", posext_replaced=entries)
    refused(load_adapter, adapter, CheckpointError, "Expected entries of PEFT under posext_replaced")


@pytest.mark.parametrize("changes", [{"rank_pattern": [4]}, {"modules_to_save": "norm"}, {"modules_to_save": [1]}])
def test_config_of_other_types(adapter: Path, changes: dict[str, Any]) -> None:
    edit(adapter / "adapter_config.json", **changes)
    refused(load_adapter, adapter, CheckpointError, f"Expected {next(iter(changes))} in .* to be a ")


# Weights that are missing


def test_modules_to_save_that_are_missing(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if ".norm." not in name}, path)
    refused(load_adapter, adapter, CheckpointError, "lacks 'norm', which adapter_config.json lists in modules_to_save")


def test_adapter_weights_that_are_missing(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(
        {name: weight for name, weight in weights.items() if "layers.1.self_attn.q_proj.lora_B" not in name}, path
    )
    refused(load_adapter, adapter, CheckpointError, "lacks 1 weights of its own config, .*q_proj.lora_B")


def test_modules_to_save_of_another_size(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if ".norm." in name)
    save_file(weights | {name: torch.ones(2**20)}, path)
    refused(load_adapter, adapter, PosExtError, r"its model.norm.weight has shape \(64,\), the adapter's \(1048576,\)")


def test_refusal_leaves_the_base_as_it_was(adapter: Path) -> None:
    model = tiny_llama()
    before = logits(model, tokens(TRAINED))
    edit(adapter / "adapter_config.json", modules_to_save=["norm", "embed_tokens"])
    with pytest.raises(CheckpointError, match="lacks 'embed_tokens'"):
        load_adapter(adapter, base=model)
    assert torch.equal(logits(model, tokens(TRAINED)), before)
