"""GGUF files with the positions of a plan: what is written can be read back, and means the same frequencies."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from hf_posext import LongRoPE, YaRN, patch_model
from hf_posext.errors import CheckpointError, ExportError
from hf_posext.export import export_checkpoint, read_gguf, write_gguf
from hf_posext.methods import as_method
from hf_posext.plan import ExtensionPlan
from tests.conftest import TRAINED, tiny_llama
from tests.export.gguf_helpers import tensors_of, write_llama

FACTOR = 4
LONG, SHORT = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0], [1.0] * 7 + [1.25]
METHODS = ["theta", "ntk", "linear", "yarn", "llama3", "yarn+resonance", "partial", YaRN(attention_factor=1.5), "nope"]
METHODS += [YaRN(truncate=False), LongRoPE(long_factor=LONG, short_factor=SHORT)]


def make(method: object, path: Path) -> tuple[ExtensionPlan, Path]:
    model = tiny_llama()
    source = write_llama(model, path / "source.gguf")
    plan = patch_model(model, method, factor=FACTOR).plan  # type: ignore[arg-type]
    return plan, write_gguf(plan, source, path / "model.gguf")


def llama_cpp(path: Path, length: int) -> tuple[torch.Tensor, float]:
    """Frequencies and temperature that llama.cpp 0c1e57098 makes of a file: `ggml_rope_cache_init`, `rope_yarn` and
    `llama_context` in a loop over channels."""
    rope, dim = read_gguf(path), 16
    keys, kind = rope.keys, rope.keys.get("rope.scaling.type", "linear")
    scale = 1 / keys.get("rope.scaling.factor", 1.0)
    long = length > keys.get("rope.scaling.original_context_length", math.inf)
    name = "rope_freqs.weight" if kind != "longrope" else f"rope_factors_{'long' if long else 'short'}.weight"
    divisors = rope.tensors.get(name, (1.0,) * (dim // 2))

    def bound(turns: float) -> float:
        trained = keys["rope.scaling.original_context_length"]
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(keys["rope.freq_base"]))

    frequencies = []
    for i in range(dim // 2):
        extrapolated = keys["rope.freq_base"] ** (-2 * i / dim) / divisors[i]
        frequency = scale * extrapolated
        if kind == "yarn":
            low, high = max(0, math.floor(bound(32))), min(dim - 1, math.ceil(bound(1)))
            mix = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
            frequency = frequency * (1 - mix) + extrapolated * mix
        frequencies.append(frequency)
    temperature = 1 - 0.1 * math.log(scale) if kind == "yarn" else 1.0
    return torch.tensor(frequencies), temperature * keys.get("rope.scaling.attn_factor", 1.0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_means_the_frequencies_of_the_plan(method: object, tmp_path: Path) -> None:
    plan, path = make(method, tmp_path)
    entry = plan.rotaries[0]
    lists = [(plan.target_length, entry.inv_freq)]
    if entry.short_inv_freq is not None:
        lists.append((plan.trained_length, entry.short_inv_freq))
    for length, expected in lists:
        frequencies, temperature = llama_cpp(path, length)
        # float32 divisors, and a power in another order
        torch.testing.assert_close(frequencies, torch.tensor(expected), rtol=1e-6, atol=1e-25)
        assert temperature == pytest.approx(entry.attention_factor, rel=1e-6)
    assert read_gguf(path).keys["context_length"] == FACTOR * TRAINED


def test_all_else_is_copied(tmp_path: Path) -> None:
    model = tiny_llama()
    plan = patch_model(model, "yarn+resonance", factor=FACTOR).plan
    source = write_llama(model, tmp_path / "source.gguf", quantized=True)
    before = tensors_of(source)
    path = write_gguf(plan, source, tmp_path / "model.gguf")
    after = tensors_of(path)
    added = after.pop("rope_freqs.weight")
    assert added.shape == (8,) and after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == gguf.GGMLQuantizationType.Q8_0
    written = ("rope.freq_base", "rope.scaling.", "context_length")
    fields = [
        {f.name: f.contents() for f in gguf.GGUFReader(file).fields.values() if not f.name.startswith("GGUF.")}
        for file in (source, path)
    ]
    copied = [{k: v for k, v in f.items() if not k.removeprefix("llama.").startswith(written)} for f in fields]
    assert copied[0] == copied[1] and copied[0]["tokenizer.ggml.model"] == "no_vocab"


def test_scaling_of_the_source_does_not_stay(tmp_path: Path) -> None:
    """A second plan replaces the first, keys and tensors."""
    _, first = make("yarn+resonance", tmp_path)
    plan = as_method("theta").plan(patch_model(tiny_llama(), "theta", factor=FACTOR).plan.scheme, factor=FACTOR)
    again = read_gguf(write_gguf(plan, first, tmp_path / "again.gguf"))
    assert again.tensors == {}
    assert set(again.keys) == {"context_length", "rope.freq_base"}


def test_export_says_how(tmp_path: Path) -> None:
    """The plan that an export wrote is the one that the second command reads."""
    model = tiny_llama()
    patch_model(model, "yarn+resonance", factor=FACTOR)
    serving = export_checkpoint(model, tmp_path / "out", "llama.cpp")
    assert serving.command_lines("out")[1] == "hf-posext gguf out converted.gguf model.gguf"
    source = write_llama(tiny_llama(), tmp_path / "converted.gguf")
    rope = read_gguf(write_gguf(tmp_path / "out", source, tmp_path / "model.gguf"))
    assert len(rope.tensors["rope_freqs.weight"]) == 8


def test_bounds_of_yarn_are_flags(tmp_path: Path) -> None:
    model = tiny_llama()
    patch_model(model, YaRN(beta_fast=16, beta_slow=2), factor=FACTOR)
    serving = export_checkpoint(model, tmp_path / "out", "llama.cpp")
    assert serving.command_lines("out")[-1].endswith("-c 256 --yarn-beta-fast 16 --yarn-beta-slow 2")


# Refusals


def test_architecture_that_loads_no_frequencies(tmp_path: Path) -> None:
    plan = patch_model(tiny_llama(), "yarn+resonance", factor=FACTOR).plan
    source = tmp_path / "qwen.gguf"
    writer = gguf.GGUFWriter(source, "qwen3")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    with pytest.raises(ExportError, match="of the architecture 'qwen3' it loads no tensor of frequencies"):
        write_gguf(plan, source, tmp_path / "new.gguf")
    yarn = patch_model(tiny_llama(), "yarn", factor=FACTOR).plan
    assert read_gguf(write_gguf(yarn, source, tmp_path / "new.gguf")).keys["rope.scaling.type"] == "yarn"


def test_the_longest_target_is_written(tmp_path: Path) -> None:
    plan = patch_model(tiny_llama(), "yarn", factor=2**24 // TRAINED).plan
    source = write_llama(tiny_llama(), tmp_path / "source.gguf")
    keys = read_gguf(write_gguf(plan, source, tmp_path / "copy.gguf")).keys
    assert keys["context_length"] == 2**24 and keys["rope.scaling.factor"] == 2**24 / TRAINED


def test_model_of_another_shape(tmp_path: Path) -> None:
    plan = patch_model(tiny_llama(head_dim=32), "yarn", factor=FACTOR).plan
    with pytest.raises(CheckpointError, match="rotates 32 channels of a head, as the plan does, got 16"):
        write_gguf(plan, write_llama(tiny_llama(), tmp_path / "source.gguf"), tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_files_are_never_written_over(tmp_path: Path) -> None:
    plan, path = make("yarn", tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="Choose another name"):
        write_gguf(plan, tmp_path / "source.gguf", path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"not a model" * 100])
def test_files_that_are_no_gguf(content: bytes, tmp_path: Path) -> None:
    plan = patch_model(tiny_llama(), "yarn", factor=FACTOR).plan
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a GGUF file|cannot read"):
        write_gguf(plan, tmp_path / "bad.gguf", tmp_path / "new.gguf")
    with pytest.raises(CheckpointError, match="cannot read"):
        write_gguf(plan, tmp_path / "no.gguf", tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()
