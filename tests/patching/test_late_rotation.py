"""Rotation in attention under generation, caches, packed rows, training, copies, and compilers."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

import hf_posext.patching.kernels.banded as banded
from hf_posext import patch_model, unpatch_model
from hf_posext.errors import EvaluationError
from hf_posext.methods import DualChunk, DynamicNTK, LogN, Method, ReRoPE, SelfExtend
from hf_posext.patching.modes import cache_of, with_cache

from ..conftest import TRAINED, logits, tiny_llama, tokens
from ..helpers import positions_of
from ..zoo import build

ACTIVE: dict[str, Method] = {
    "rerope": ReRoPE(window=8),
    "dual-chunk": DualChunk(chunk=12, local=4),
    "log-n": LogN(),
}
"""Methods that act within the 32 tokens of these tests, at a trained length of 16."""

PROMPT = tokens(20, rows=2)
PROMPT[0, :7] = 0  # padded at its left
MASK = PROMPT.ne(0).long()

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "gemma2": functools.partial(build, "gemma2"),  # softcap; window of 16 in every other layer
    "gpt_oss": functools.partial(build, "gpt_oss"),  # a learned sink in each head; window of 16 in every other layer
}


def generate(model: PreTrainedModel, cached: bool = True, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and scores of generation, for the padded batch, or for its full row if the mode takes one row.

    Without a cache, each token is one full forward.
    """
    ways = ("prompt_lookup_num_tokens", "assistant_model", "cache_implementation", "prefill_chunk_size")
    rows = slice(1, 2) if kwargs.keys() & set(ways[:2]) else slice(0, 2)
    if not cached:
        kwargs = {name: value for name, value in kwargs.items() if name not in ways} | {"use_cache": False}
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, **kwargs}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    out = model.generate(PROMPT[rows], attention_mask=MASK[rows], **settings)
    return out.sequences, torch.stack(out.scores)


def same(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Return whether tokens are equal, and scores within float32 sums in another order. Scores spread by 4."""
    return torch.equal(actual[0], expected[0]) and torch.allclose(actual[1], expected[1], atol=1e-4, rtol=0)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "draft model": {"assistant_model": tiny_llama(num_hidden_layers=1)},
    "static cache": {"cache_implementation": "static", "num_beams": 2},
    "prompt in chunks": {"prefill_chunk_size": 7},
    "prompt in chunks, static cache": {"prefill_chunk_size": 7, "cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_generation(mode: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Compare with the unpatched model if the plan keeps positions, otherwise with one full forward per token."""
    if mode == "draft model":
        caplog.set_level("ERROR", "transformers.generation.utils")  # it calls its own generate in a deprecated way
    model = MODELS[kind]()
    plain = generate(model, **MODES[mode])
    with patch_model(model, ReRoPE(window=TRAINED) + LogN(), factor=8, trained_length=TRAINED):
        assert same(generate(model, **MODES[mode]), plain)
    for method in ACTIVE.values():
        with patch_model(model, method, factor=8, trained_length=16):
            generated = generate(model, **MODES[mode])
            assert same(generated, generate(model, cached=False, **MODES[mode]))
            assert not same(generated, plain)
    assert same(generate(model, **MODES[mode]), plain)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_pieces_of_a_prompt_without_padding(kind: str, static: bool) -> None:
    """Check that bands are stripes, even if a static cache has free slots or a sliding cache has dropped keys."""
    model, ids = MODELS[kind](), tokens(60)
    for method in ACTIVE.values():
        with patch_model(model, method, factor=8, trained_length=16):
            cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
            steps = [logits(model, piece, cache=cache) for piece in ids.split([21, 19, 12, 1, 1, 4, 1, 1], 1)]
            torch.testing.assert_close(torch.cat(steps, 1), logits(model, ids, use_cache=False), atol=1e-4, rtol=0)


class Lossless(QuantizedLayer):
    """Layer with the bookkeeping of a quantized cache, without its loss."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.clone()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("beams", [1, 3])
def test_quantised_cache(beams: int) -> None:
    model = tiny_llama()
    patch_model(model, ReRoPE(window=8), factor=8)
    cache = Cache(layers=[Lossless(residual_length=5) for _ in range(2)])
    generated = generate(model, **with_cache(model.forward, cache), num_beams=beams)
    assert same(generated, generate(model, cached=False, num_beams=beams))


@pytest.mark.parametrize("method", [ReRoPE(window=8), DualChunk(chunk=12, local=4), DynamicNTK(), "yarn"])
def test_offloaded_cache(method: Method | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps, the keys are on another device: other tensors than those that attention read."""

    def away(layer: Any) -> None:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    monkeypatch.setattr(torch, "Stream", MagicMock)
    monkeypatch.setattr(torch.cuda, "default_stream", MagicMock())
    monkeypatch.setattr(DynamicLayer, "offload", away)
    model = tiny_llama()
    patch_model(model, method, factor=8, trained_length=16)
    cache = DynamicCache(config=model.config, offloading=True)
    ids = tokens(40, rows=2)
    steps = [logits(model, piece, cache=cache) for piece in ids.split([21, 1, 1, 12, 1, 4], 1)]
    # dynamic NTK keeps, in deeper layers, what was computed under a smaller factor: compare with an ordinary cache
    plain = DynamicCache(config=model.config)
    expected = [logits(model, piece, cache=plain) for piece in ids.split([21, 1, 1, 12, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), torch.cat(expected, 1), atol=1e-4, rtol=0)
    if not isinstance(method, DynamicNTK):
        torch.testing.assert_close(torch.cat(steps, 1), logits(model, ids, use_cache=False), atol=1e-4, rtol=0)


def test_fp8_cache_loses_no_more_than_unpatched(llama: LlamaForCausalLM) -> None:
    """Cache for the only backend of transformers' quantized caches that needs no other package."""

    def loss(ids: torch.Tensor) -> float:
        cache = QuantizedCache(backend="fp8", config=llama.config)
        steps = [logits(llama, piece, cache=cache) for piece in ids.split([60, 1, 1, 1, 1], 1)]
        return float((torch.cat(steps, 1) - logits(llama, ids)).abs().max())

    ids = tokens(64)
    unpatched = loss(ids)
    patch_model(llama, ReRoPE(window=8), factor=8)
    assert 0 < loss(ids) < 1.5 * unpatched


def test_caches_do_not_pass_between_patched_and_unpatched(llama: LlamaForCausalLM) -> None:
    ids = tokens(30)

    def steps(cache: Cache | None, count: int = 2) -> Cache:
        with torch.no_grad():
            for i in range(count):
                cache = cache_of(llama(ids[:, i : i + 1], use_cache=True, **with_cache(llama.forward, cache)))
        assert cache is not None
        return cache

    static = StaticCache(config=llama.config, max_cache_len=32)
    for rotated in (steps(None), steps(static)):
        with (
            patch_model(llama, ReRoPE(window=8), factor=8),
            pytest.raises(EvaluationError, match="from before the patch"),
        ):
            steps(rotated)
    patch = patch_model(llama, ReRoPE(window=8), factor=8)
    static.reset()
    unrotated = [steps(None), steps(static)]
    patch.undo()
    for cache in unrotated:
        with pytest.raises(EvaluationError, match="keys of a patched model"):
            steps(cache)
    static.reset()
    steps(static)


def test_a_cache_follows_its_rows(llama: LlamaForCausalLM) -> None:
    """Check padded rows that are repeated, swapped, selected and copied, crops, and positions passed once."""
    patch_model(llama, ReRoPE(window=8), factor=8)
    ids, mask = torch.cat([PROMPT, tokens(2, rows=2, seed=3)], 1), torch.cat([MASK, torch.ones(2, 2).long()], 1)
    positions = positions_of(mask)
    expected = logits(llama, ids, attention_mask=mask, position_ids=positions)[:, -1]
    cache = DynamicCache(config=llama.config)

    def run(rows: list[int], start: int, stop: int) -> torch.Tensor:
        inputs = {"attention_mask": mask[rows, :stop], "position_ids": positions[rows, start:stop]}
        return logits(llama, ids[rows, start:stop], cache=cache, **inputs)[:, -1]

    run([0, 1], 0, 20)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    rows = [1, 0, 1, 0]
    run(rows, 20, 21)
    torch.testing.assert_close(run(rows, 21, 22), expected[rows], atol=1e-5, rtol=0)  # float32 sums in another order
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.crop(-2)
    cache = copy.deepcopy(cache)
    run([0, 1], 20, 21)
    torch.testing.assert_close(run([0, 1], 21, 22), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [*ACTIVE.values(), SelfExtend(group=4, window=8), DynamicNTK()])
def test_packed_documents_do_not_see_each_other(method: Method, llama: LlamaForCausalLM) -> None:
    patch_model(llama, method, factor=8, trained_length=16)
    documents = [tokens(count, seed=count) for count in (40, 13, 27)]
    positions = torch.cat([torch.arange(document.shape[1])[None] for document in documents], 1)
    packed = logits(llama, torch.cat(documents, 1), position_ids=positions, use_cache=False)
    alone = torch.cat([logits(llama, document) for document in documents], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)  # float32 sums in another order; logits spread by 4


def gradients(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Check gradients of the loss of several forwards before one backward."""
    model.zero_grad()
    loss = sum(model(**batch, labels=batch["input_ids"], use_cache=False).loss for batch in batches)
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name came in 5.2x
@pytest.mark.parametrize("kind", [*MODELS, "llama4_text", "cohere_compass_text", "persimmon", "diffllama"])
@pytest.mark.parametrize("method", [*ACTIVE.values(), DynamicNTK()])
def test_gradient_checkpointing_with_several_forwards(
    method: Method, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a layer that runs again in backward uses the positions of its own forward.

    Other forwards are packed, shorter, or longer. The last four kinds do not pass position_ids to their attention.
    """
    monkeypatch.setattr(banded, "SCORE_BYTES", 1)  # blocks of 16 queries, which banded attention computes again, too
    model = MODELS[kind]() if kind in MODELS else build(kind)
    patch_model(model, method, factor=8, trained_length=16)
    packed = {"input_ids": tokens(40, seed=1), "position_ids": torch.arange(20).repeat(2)[None]}
    batches = [{"input_ids": tokens(40)}, packed, {"input_ids": tokens(24)}]
    model.train()
    plain = gradients(model, batches)
    model.gradient_checkpointing_enable()
    for again, once in zip(gradients(model, batches), plain, strict=True):
        assert torch.equal(again, once)


def test_lora_on_a_patched_model_trains_and_disables(llama: LlamaForCausalLM) -> None:
    ids = tokens(60)
    with patch_model(llama, ReRoPE(window=8), factor=8):
        expected = logits(llama, ids)
    peft = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "v_proj"]))
    patch_model(peft, ReRoPE(window=8), factor=8)
    torch.testing.assert_close(logits(peft, ids), expected, atol=1e-5, rtol=0)  # a sum with the adapter's zeros
    assert any(grad.abs().max() > 0 for grad in gradients(peft, [{"input_ids": ids}]))
    with peft.disable_adapter():
        assert torch.equal(logits(peft, ids), expected)
    merged = peft.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5, rtol=0)
    unpatch_model(merged)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    return pickle.load(file)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "deepseek_v32"])
def test_copies_live_on_their_own(copied: Callable[[PreTrainedModel], PreTrainedModel], kind: str) -> None:
    model = MODELS[kind]() if kind in MODELS else build(kind)
    ids = tokens(40)
    before = logits(model, ids)
    patch = patch_model(model, ReRoPE(window=8), factor=8, trained_length=16)
    expected = logits(model, ids)
    twin, third = copied(model), copied(model)
    patch.undo()
    assert torch.equal(logits(model, ids), before)
    for copied_model in (twin, third):
        assert torch.equal(logits(copied_model, ids), expected)
        with torch.no_grad():
            assert torch.isfinite(copied_model.generate(ids[:, :20], max_new_tokens=3, do_sample=False)).all()
        unpatch_model(copied_model)
        assert torch.equal(logits(copied_model, ids), before)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied_model.modules())


def test_a_step_leaves_nothing_that_cannot_be_learned_from(llama: LlamaForCausalLM) -> None:
    """Check gradients after inference mode, whose tensors autograd does not accept."""
    patch_model(llama, ReRoPE(window=8), factor=8)
    token = tokens(1)
    with torch.inference_mode():
        expected = llama(token).logits
    out = llama(token).logits
    out.sum().backward()
    assert torch.equal(out, expected) and llama.model.layers[0].self_attn.v_proj.weight.grad.any()


class Scored(Dataset[torch.Tensor]):
    """Data set that calls a patched model in the worker."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return logits(self.model, tokens(40, seed=index))[0]


def test_patched_model_in_a_data_loader_worker(llama: LlamaForCausalLM) -> None:
    patch_model(llama, ReRoPE(window=8), factor=8)
    (scores,) = DataLoader(Scored(llama), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    for index in range(2):
        torch.testing.assert_close(scores[index], logits(llama, tokens(40, seed=index))[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [*ACTIVE.values(), DynamicNTK()])
def test_compiled_forward_in_one_graph(method: Method, llama: LlamaForCausalLM) -> None:
    patch_model(llama, method, factor=8, trained_length=16)
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    for length in (40, 24):
        ids = tokens(length)
        out = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(out, logits(llama, ids, use_cache=False), atol=1e-5, rtol=0)


def test_compiled_decoding(llama: LlamaForCausalLM) -> None:
    patch_model(llama, ReRoPE(window=8), factor=8)
    expected = generate(llama)
    torch._dynamo.reset()
    llama.forward = torch.compile(llama.forward, backend="eager")
    assert same(generate(llama, cache_implementation="static"), expected)
