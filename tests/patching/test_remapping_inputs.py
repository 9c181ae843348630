"""Inputs of users to a patched model: masks, padding, positions on several axes, caches that other code has changed,
and arguments of trainers."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralModel,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from hf_posext import patch_model
from hf_posext.errors import EvaluationError, NoEffectError, PosExtError, UnsupportedModelError
from hf_posext.methods import (
    DualChunk,
    DynamicNTK,
    DynamicYaRN,
    LogN,
    LongRoPE,
    Method,
    ReRoPE,
    SelfExtend,
    Sinks,
    YaRN,
)
from hf_posext.patching.modes import cache_of, with_cache

from ..conftest import TRAINED, logits, sharpen, tiny_llama, tokens
from ..helpers import padded, positions_of
from ..zoo import build
from ..zoo.builder import tiny_config

ALL: dict[str, Method] = {
    "rerope": ReRoPE(window=8),
    "self-extend": SelfExtend(group=4, window=8),
    "dual-chunk": DualChunk(chunk=12, local=4),
    "sinks": Sinks(window=12),
    "log-n": LogN(),
    "dynamic-ntk": DynamicNTK(),
    "dynamic-yarn": DynamicYaRN(),
}
CLOSE = {"atol": 1e-5, "rtol": 0.0}  # float32 sums in another order; logits spread by 4
BASES = ["sdpa", "eager"]
IDS = tokens(60)


def patch(model: PreTrainedModel, name: str) -> None:
    patch_model(model, ALL[name], factor=8, trained_length=16)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passed", ["mask", "mask and positions"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", ALL)
def test_a_row_equals_itself_alone_whatever_padding(name: str, kind: str, side: str, passed: str) -> None:
    model = build(kind)
    patch(model, name)
    short, long = tokens(20, seed=1), tokens(90, seed=2)
    ids, mask = padded(short, long, side=side)
    inputs = {"attention_mask": mask}
    if passed != "mask":
        inputs["position_ids"] = positions_of(mask)
    rows = logits(model, ids, **inputs)
    torch.testing.assert_close(rows[:1, mask[0].bool()], logits(model, short), **CLOSE)
    torch.testing.assert_close(rows[1:], logits(model, long), **CLOSE)


def mask_of_pairs(mask: torch.Tensor, form: str) -> Any:
    """Return the 4D mask (batch, 1, tokens, tokens) that transformers makes of a mask (batch, tokens)."""
    pairs = mask.bool()[:, None, None] & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    if form == "rows of padding see all":
        return pairs | ~pairs.any(-1, keepdim=True)
    return torch.where(pairs, 0.0, torch.finfo(torch.float32).min) if form == "additive" else pairs


@pytest.mark.parametrize("form", ["bool", "additive", "rows of padding see all"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_a_mask_of_pairs_shows_padding(name: str, side: str, form: str) -> None:
    model = tiny_llama()
    patch(model, name)
    short, long = tokens(20, seed=1), tokens(90, seed=2)
    ids, mask = padded(short, long, side=side)
    rows = logits(model, ids, attention_mask=mask_of_pairs(mask, form))
    torch.testing.assert_close(rows[:1, mask[0].bool()], logits(model, short), **CLOSE)
    torch.testing.assert_close(rows[1:], logits(model, long), **CLOSE)
    unpadded = logits(model, short.expand(2, -1), attention_mask=mask_of_pairs(torch.ones(1, 20), form))
    torch.testing.assert_close(unpadded[1:], logits(model, short), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_decoding_after_padding(name: str, side: str) -> None:
    """Compare padded rows with each row alone. Left padding needs no positions, like in the unpatched model."""
    model = tiny_llama()
    patch(model, name)
    text = tokens(24, seed=1)
    short, steps = text[:, :14], text[:, 14:]
    pad = torch.zeros(1, 30).long()
    ids = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    mask, cache, steps_read = (ids != 0).long(), DynamicCache(config=model.config), []
    logits(model, ids, attention_mask=mask, **with_cache(model.forward, cache))
    for index in range(steps.shape[1]):
        mask = torch.cat([mask, torch.ones(1, 1).long()], 1)
        where = {} if side == "left" else {"position_ids": torch.tensor([[14 + index]])}
        step = steps[:, index : index + 1]
        steps_read.append(logits(model, step, attention_mask=mask, **where, **with_cache(model.forward, cache)))
    for index, step_logits in enumerate(steps_read):
        # dynamic methods give each step the frequencies of its own length, and cached keys have none of their own
        alone = logits(model, text[:, : 15 + index])[:, -1:]
        limit = 0.1 if "dynamic" in name else 1e-5
        torch.testing.assert_close(step_logits, alone, atol=limit, rtol=0)


@pytest.mark.parametrize("bounds", [[0, 1, 2, 3, 11, 12, 13, 14], [0, 7, 14], [0, 5, 7, 10, 14], [0, 9, 10, 14]])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v32"])
@pytest.mark.parametrize("name", ["rerope", "self-extend", "dual-chunk", "sinks", "log-n"])
def test_rows_whose_first_pieces_are_padding(name: str, kind: str, bounds: list[int]) -> None:
    """They begin in the first, a later, or no piece of the prompt. Rows are swapped between the pieces."""
    model, texts = build(kind), [tokens(count, seed=count) for count in (40, 31, 29, 26)]
    patch(model, name)
    (ids, _), order = padded(*texts), torch.tensor([2, 0, 3, 1])
    cache, pieces = DynamicCache(config=model.config), []
    for start, stop in itertools.pairwise([*bounds, 20, 21, 22, 40]):
        cached = with_cache(model.forward, cache)
        pieces.append(logits(model, ids[:, start:stop], attention_mask=ids[:, :stop].ne(0).long(), **cached))
        cache.reorder_cache(order)
        ids, texts, pieces = ids[order], [texts[row] for row in order], [piece[order] for piece in pieces]
    for text, row in zip(texts, torch.cat(pieces, 1), strict=True):
        torch.testing.assert_close(row[None, -text.shape[1] :], logits(model, text), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["dynamic-ntk", "dynamic-yarn", "dual-chunk"])
def test_classifiers_read_rows_as_if_alone(name: str, side: str) -> None:
    torch.manual_seed(0)
    model = sharpen(LlamaForSequenceClassification(tiny_llama().config))
    patch(model, name)
    short, long = tokens(20, seed=1), tokens(90, seed=2)
    ids, mask = padded(short, long, side=side)
    scores = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(scores, torch.cat([logits(model, short), logits(model, long)]), **CLOSE)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cls", [LlamaModel, MistralModel])
@pytest.mark.parametrize("name", ALL)
def test_models_without_a_head(name: str, cls: Any, base: str) -> None:
    """Compare with the published use of self-extend on embedding models."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED}
    config = MistralConfig(**sizes, **heads, sliding_window=None, attn_implementation=base)
    torch.manual_seed(0)
    model = sharpen(cls(config if cls is MistralModel else tiny_llama(attn_implementation=base).config))

    def states(ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden: torch.Tensor = model(ids, **kwargs).last_hidden_state
        return hidden

    before = states(IDS)
    patch(model, name)
    expected, cache = states(IDS), DynamicCache(config=model.config)
    assert (expected - before).abs().max() > 1e-3
    if "dynamic" not in name:  # these differ between steps and a whole text
        steps = [states(piece, **with_cache(model.forward, cache)) for piece in IDS.split([50, 1, 1, 8], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=0)  # states spread by 10


# --- both sides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["rerope", "dual-chunk", "sinks", "self-extend"])
def test_models_and_calls_that_attend_to_both_sides_are_refused(name: str, base: str) -> None:
    model = tiny_llama(attn_implementation=base)
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="causal attention for .*, got llama, which attends to both sides"):
        patch(model, name)
    model.config.is_causal = True
    patch(model, name)
    with pytest.raises(UnsupportedModelError, match="attends to both sides"):
        logits(model, IDS, is_causal=False)
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="attends to both sides"):
        logits(model, IDS)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", [LogN(), DynamicNTK()])
def test_what_does_not_remap_attends_to_both_sides(method: Method, base: str) -> None:
    """Method that changes nothing within the trained length."""
    model = tiny_llama(attn_implementation=base)
    causal, right = logits(model, IDS), logits(model, IDS, is_causal=False)
    assert (causal - right).abs().max() > 0.1
    patch_model(model, method, factor=8)
    torch.testing.assert_close(logits(model, IDS, is_causal=False), right, **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_a_mask_of_the_users_own_is_honoured(base: str) -> None:
    model = tiny_llama(attn_implementation=base)
    tree = torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()
    tree[..., 40:, 20:40] = False  # two branches behind one beginning
    mask = tree if base == "sdpa" else torch.where(tree, 0.0, torch.finfo(torch.float32).min)
    where = torch.cat([torch.arange(40), torch.arange(20, 40)])[None]
    right = logits(model, IDS, attention_mask=mask, position_ids=where)
    patch_model(model, ReRoPE(window=TRAINED), factor=8)
    torch.testing.assert_close(logits(model, IDS, attention_mask=mask, position_ids=where), right, **CLOSE)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # the second has a softcap, which only plain PyTorch supports
@pytest.mark.parametrize("name", ["rerope", "dual-chunk"])
def test_a_picture_sees_its_later_tokens(
    name: str, kind: str, learning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma-3 and other models let the tokens of a picture attend to each other. Here it is longer than a block of
    queries. All pairs are within the window, so that nothing may change."""
    monkeypatch.setattr("hf_posext.patching.kernels.banded.SCORE_BYTES", 1)  # blocks of 16 queries
    model = build(kind, **({} if kind == "llama" else {"layer_types": ["full_attention"] * 6}))
    ids = tokens(300)
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    causal = logits(model, ids)
    mask[..., 130:250, 130:250] = True
    if kind == "gemma2":  # runs on eager attention, which adds its mask
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(learning)
        with torch.set_grad_enabled(learning):
            out = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
        return out.detach(), torch.autograd.grad(out.square().sum(), embedded)[0] if learning else out

    right, slope = outputs()
    assert (right - causal).abs().max() > 0.1
    method = ReRoPE(window=400) if name == "rerope" else DualChunk(chunk=400, local=8)
    patch_model(model, method, factor=8, trained_length=512)
    remapped, along = outputs()
    torch.testing.assert_close(remapped, right, **CLOSE)
    torch.testing.assert_close(along, slope, atol=1e-5 * float(slope.abs().max()), rtol=0)


def test_a_picture_that_is_longer_than_the_window_is_remapped() -> None:
    """Its tokens see all of it. That is the same whether a layer has a window of its own or gets it from the mask."""
    full = torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()
    full[..., 5:50, 5:50] = True
    masks = {"full_attention": full, "sliding_attention": full & ~full.tril(-16)}
    masks["sliding_attention"][..., 5:50, 5:50] = True
    narrow, wide = (build("gemma3_text", sliding_window=window) for window in (16, 64))
    for model in (narrow, wide):
        patch_model(model, ReRoPE(window=20), factor=4)
    by_layer, by_mask = (logits(model, IDS, attention_mask=masks, use_cache=False) for model in (narrow, wide))
    torch.testing.assert_close(by_layer, by_mask, **CLOSE)


# --- positions on several axes ---------------------------------------------------------------------------------------


def olmoe(window: int | None, base: str) -> PreTrainedModel:
    """Check a model that passes a window to its attention and has none in its masks."""
    config = tiny_config("olmoe")
    config.sliding_window, config._attn_implementation = window, base
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sharpen(OlmoeForCausalLM(config).eval())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", [ReRoPE(window=20), SelfExtend(group=4, window=16)])
def test_windows_are_those_of_the_masks(method: Method, base: str) -> None:
    """Check the masks of the model, and one that the caller passes."""
    asks, plain = olmoe(16, base), olmoe(None, base)
    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    for model in (asks, plain):
        patch_model(model, method, factor=4)
    for inputs in ({}, {"attention_mask": mask}):
        assert torch.equal(logits(asks, IDS, **inputs), logits(plain, IDS, **inputs))
    narrow, wide = (build("gemma3_text", sliding_window=window) for window in (16, 64))
    everything = mask_of_pairs(torch.ones_like(IDS), "bool")
    for model in (narrow, wide):
        patch_model(model, method, factor=4)
    by_layer, by_mask = (logits(model, IDS, attention_mask=everything) for model in (narrow, wide))
    torch.testing.assert_close(by_layer, by_mask, **CLOSE)
    assert not torch.allclose(logits(narrow, IDS), by_mask, atol=0.1)  # its own masks have windows


@pytest.mark.parametrize("has_skeleton", [True, False])
def test_a_window_that_is_longer_than_the_probe_counts(has_skeleton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check layers that see no pair that the plan changes, with and without a skeleton."""
    if not has_skeleton:
        monkeypatch.setattr("hf_posext.patching.remap.probe.skeleton_of", lambda backbone: None)
    model = build("mistral", sliding_window=40)
    with pytest.raises(NoEffectError, match="rerope"):
        patch_model(model, ReRoPE(window=64), factor=4)
    patch_model(model, ReRoPE(window=20), factor=4).undo()


def test_an_encoder_and_decoder_that_rotate_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="got t5gemma, which rotates in an encoder as well"):
        patch_model(build("t5gemma", task="seq2seq-lm"), "log-n", factor=4)


def vision_model(kind: str) -> Any:
    torch.manual_seed(0)
    text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122}
    sizes = {"depth": 1, "num_heads": 2, "patch_size": 4}
    if kind == "qwen2_vl":
        vision = {**sizes, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        return sharpen(Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)))
    vision = {**sizes, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return sharpen(Qwen2_5_VLForConditionalGeneration(config))


class Picture:
    """Return a text of 40 tokens, eight of which are an image of 2 x 4."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ids = tokens(40) % 100 + 1
        self.ids[0, 6:14] = 120
        torch.manual_seed(1)
        self.types = (self.ids == 120).int()
        self.image = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 8]])}
        grid = {"image_grid_thw": self.image["image_grid_thw"], "attention_mask": torch.ones_like(self.ids)}
        self.positions, _ = model.model.get_rope_index(self.ids, self.types, **grid)

    def whole(self, positions: torch.Tensor) -> torch.Tensor:
        return logits(self.model, self.ids, position_ids=positions, mm_token_type_ids=self.types, **self.image)

    def steps(self) -> torch.Tensor:
        """Read the last ten tokens one by one."""
        cache, pieces = DynamicCache(config=self.model.config.get_text_config()), []
        cached = with_cache(self.model.forward, cache)
        first = {"position_ids": self.positions[..., :30], "mm_token_type_ids": self.types[:, :30], **self.image}
        logits(self.model, self.ids[:, :30], **first, **cached)
        for i in range(30, 40):
            inputs = {"position_ids": self.positions[..., i : i + 1], "attention_mask": torch.ones(1, i + 1).long()}
            pieces.append(logits(self.model, self.ids[:, i : i + 1], **inputs, **cached))
        return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_height_and_width_are_kept(kind: str) -> None:
    """Check that nothing changes below the window or trained length, in one forward, in steps, and in text alone."""
    picture = Picture(vision_model(kind))
    right, flat = (picture.whole(p) for p in (picture.positions, picture.positions[:1].expand(3, -1, -1)))
    assert (right - flat).abs().max() > 1e-3, "the axes show"
    text = logits(picture.model, IDS)
    for method in (ReRoPE(window=TRAINED), SelfExtend(group=4, window=TRAINED), LogN(), DynamicNTK()):
        with patch_model(picture.model, method, factor=4):
            torch.testing.assert_close(picture.whole(picture.positions), right, **CLOSE)
            torch.testing.assert_close(picture.steps(), right[:, 30:], **CLOSE)
            torch.testing.assert_close(logits(picture.model, IDS), text, **CLOSE)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ["rerope", "self-extend", "dual-chunk", "sinks", "log-n"])
def test_steps_behind_an_image_equal_one_forward(name: str, kind: str) -> None:
    picture = Picture(vision_model(kind))
    before = picture.whole(picture.positions)
    patch(picture.model, name)
    expected = picture.whole(picture.positions)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(picture.steps(), expected[:, 30:], **CLOSE)
    # a text, and a picture in a later turn of the same conversation
    text, cache = tokens(20, seed=4) % 100 + 1, DynamicCache(config=picture.model.config.get_text_config())
    cached, pieces = with_cache(picture.model.forward, cache), []
    ids = torch.cat([text, picture.ids], 1)
    types = torch.cat([torch.zeros_like(text), picture.types], 1).int()
    where = torch.cat([torch.arange(20).expand(3, 1, -1), picture.positions + 20], -1)
    for start, stop in ((0, 15), (15, 16), (16, 17), (17, 60)):
        image = picture.image if stop == 60 else {}
        inputs = {"position_ids": where[..., start:stop], "mm_token_type_ids": types[:, start:stop], **image}
        pieces.append(logits(picture.model, ids[:, start:stop], **inputs, **cached))
    at_once = logits(picture.model, ids, position_ids=where, mm_token_type_ids=types, **picture.image)
    torch.testing.assert_close(torch.cat(pieces, 1), at_once, **CLOSE)


# --- frequencies that follow the length of the input -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_remapping_of_frequencies_that_follow_the_input(kind: str) -> None:
    """Check the refusal of bands over two frequency lists: steps would be rotated by another list than a text."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [1, 1.5, 2, 3, 4, 4, 4, 4.0]}
        rope |= {"original_max_position_embeddings": TRAINED}
    model = tiny_llama(max_position_embeddings=4 * TRAINED, rope_parameters=rope)
    for name in ("rerope", "self-extend", "dual-chunk", "sinks"):
        with pytest.raises(UnsupportedModelError, match=r"Pass a method .* as in 'yarn\+"):
            patch(model, name)
    patch_model(model, YaRN() + ReRoPE(window=8), factor=8, trained_length=16)
    ids, cache = tokens(TRAINED + 20), DynamicCache(config=model.config)
    steps = [
        logits(model, piece, **with_cache(model.forward, cache)) for piece in ids.split([TRAINED - 2, *[1] * 22], 1)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, ids, use_cache=False), **CLOSE)


def test_a_text_that_passes_the_first_longrope_list(llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    """Check the warning at the change of lists: once, and only with keys of the first list in the cache."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    patch_model(llama, LongRoPE(short_factor=[1.0] * 8, long_factor=[1, 1.5, 2, 3, 4, 4, 4, 4.0]), factor=4)
    ids, counts = tokens(TRAINED + 10), []
    for _ in range(2):
        logits(llama, ids)
        cache = DynamicCache(config=llama.config)
        for piece in ids.split([TRAINED - 1, 1, 1, 9], 1):
            logits(llama, piece, **with_cache(llama.forward, cache))
            counts.append(sum("second LongRoPE list" in record.getMessage() for record in caplog.records))
    assert counts == [0, 0, 1, 1, 1, 1, 1, 1]


# --- replicas --------------------------------------------------------------------------------------------------------


def replicas(model: PreTrainedModel, count: int) -> list[Any]:
    """Return copies of a model like those of `DataParallel`: new modules with the same attributes and hooks."""
    modules = list(model.modules())
    copies = [[module._replicate_for_data_parallel() for module in modules] for _ in range(count)]
    number = {module: index for index, module in enumerate(modules)}
    for replica in copies:
        for module, twin in zip(modules, replica, strict=True):
            twin._modules = {name: child and replica[number[child]] for name, child in module._modules.items()}
            twin._parameters = dict(module._parameters)
    return [replica[0] for replica in copies]


@pytest.mark.parametrize("name", ALL)
def test_replicas_of_data_parallel(name: str) -> None:
    """Check replicas that each read some rows, in their own threads."""
    model = build("llama")
    patch(model, name)
    rows = [tokens(count, seed=count) for count in (60, 33, 47)]
    right = [logits(model, ids) for ids in rows]
    twins = replicas(model, len(rows))
    for _ in range(3):
        with ThreadPoolExecutor(len(rows)) as pool:
            outs = list(pool.map(logits, twins, rows))
        assert all(torch.equal(out, reference) for out, reference in zip(outs, right, strict=True))


# --- caches that other code has changed ------------------------------------------------------------------------------


def keep(cache: DynamicCache, indices: torch.Tensor, dim: int) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(dim, indices), layer.values.index_select(dim, indices)


@torch.inference_mode()
def write_in_inference_mode(cache: DynamicCache) -> None:
    cache.layers[-1].keys[:, :, 3].zero_()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", ALL)
def test_evicted_and_rearranged_keys_are_found_out(name: str, kind: str) -> None:
    model = build(kind)
    patch(model, name)
    two = torch.cat([IDS, tokens(60, seed=5)])
    mask = torch.ones_like(two)
    mask[0, :9] = 0
    for change in (
        lambda cache: keep(cache, torch.cat([torch.arange(4), torch.arange(30, 60)]), 2),  # kvpress, H2O
        lambda cache: keep(cache, torch.tensor([1, 0]), 0),  # beams, by hand
        lambda cache: keep(cache, torch.arange(59), 2),  # a crop, by hand
        lambda cache: [layer.keys.copy_(layer.keys.flip(0)) for layer in cache.layers],  # beams, in place
        lambda cache: cache.layers[-1].keys[:, :, 3].zero_(),
        write_in_inference_mode,
    ):
        cache = DynamicCache() if kind == "llama" else DynamicCache(config=model.config)
        logits(model, two, attention_mask=mask, **with_cache(model.forward, cache))
        if kind != "llama" and cache.layers[0].keys.shape[2] < 60:
            for layer in cache.layers:
                layer.keys = layer.keys.clone()
        else:
            change(cache)
        with pytest.raises(EvaluationError, match="evicted, replaced, overwritten or added by other code"):
            logits(model, two[:, :1], **with_cache(model.forward, cache))


@torch.inference_mode()
@pytest.mark.parametrize("origin", ["by the user", "by the model", "in a step", "rows", "copy", "pickle"])
def test_writes_into_copies_and_under_inference_mode_are_found_out(origin: str) -> None:
    """Check keys of inference mode: a forward that reads them is right until other code writes into them."""
    model = tiny_llama()
    expected = logits(model, IDS[:, :42])
    with patch_model(model, ReRoPE(window=64), factor=4):  # as unpatched
        for write in (False, True):
            cache = DynamicCache(config=model.config) if origin != "by the model" else None
            cache = cache_of(model(IDS[:, :40], use_cache=True, **with_cache(model.forward, cache)))
            if origin == "in a step":
                logits(model, IDS[:, 40:41], **with_cache(model.forward, cache))
            elif origin == "rows":
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([1]))
            elif origin in ("copy", "pickle"):
                cache = copy.deepcopy(cache) if origin == "copy" else pickle.loads(pickle.dumps(cache))
            count = cache.get_seq_length()
            if write:
                cache.layers[1].keys[:, :, 3] = 0.0
                with pytest.raises(EvaluationError, match="overwritten"):
                    logits(model, IDS[:, count : count + 1], **with_cache(model.forward, cache))
            else:
                step = logits(model, IDS[:, count : count + 1], **with_cache(model.forward, cache))
                torch.testing.assert_close(step[:, 0], expected[:, count], **CLOSE)


def test_keys_that_are_evicted_while_a_forward_runs() -> None:
    """Check eviction in a hook of each attention layer, like in kvpress. Layers may keep different numbers of keys."""
    model = tiny_llama()
    patch(model, "rerope")

    def evict(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        layer.keys, layer.values = layer.keys[:, :, 10:], layer.values[:, :, 10:]

    for evicting in (model.model.layers[:], model.model.layers[1:]):
        cache = DynamicCache(config=model.config)
        handles = [layer.self_attn.register_forward_hook(evict, with_kwargs=True) for layer in evicting]
        logits(model, IDS, **with_cache(model.forward, cache))
        for handle in handles:
            handle.remove()
        with pytest.raises(EvaluationError):
            logits(model, IDS[:, :1], **with_cache(model.forward, cache))


@torch.no_grad()
def own_loop(model: LlamaForCausalLM, ids: torch.Tensor, start: int, cache: DynamicCache | None) -> torch.Tensor:
    """Check a loop over the layers, like in layer-wise inference."""
    states, count = model.model.embed_tokens(ids), ids.shape[1]
    positions = torch.arange(start, start + count)[None]
    phases = model.model.rotary_emb(states, positions)
    mask = (torch.arange(start + count)[None] <= positions[0][:, None])[None, None]
    for layer in model.model.layers:
        inputs = {"attention_mask": mask, "position_ids": positions, "position_embeddings": phases}
        states = layer(states, **inputs, **with_cache(layer.forward, cache))
    out: torch.Tensor = model.lm_head(model.model.norm(states))
    return out


@pytest.mark.parametrize("name", ALL)
def test_loops_over_the_layers(name: str) -> None:
    """Check a loop over the layers without a cache, and its refusal with one, whose positions are not known."""
    model = tiny_llama()
    patch(model, name)
    expected = logits(model, IDS)
    torch.testing.assert_close(own_loop(model, IDS, 0, None), expected, **CLOSE)
    cache = DynamicCache(config=model.config)
    torch.testing.assert_close(own_loop(model, IDS[:, :50], 0, cache), logits(model, IDS[:, :50]), **CLOSE)
    with pytest.raises(EvaluationError, match="Call the model itself"):
        own_loop(model, IDS[:, 50:51], 50, cache)
    with pytest.raises(EvaluationError, match="called one by one"):
        logits(model, IDS[:, 50:51], **with_cache(model.forward, DynamicCache([*cached_pairs(cache)])))
    filled = DynamicCache(config=model.config)
    logits(model, IDS[:, :50], **with_cache(model.forward, filled))
    with pytest.raises(EvaluationError, match="called one by one"):
        own_loop(model, IDS[:, 50:51], 50, filled)


def cached_pairs(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft 0.21 calls it that
def test_prefix_tuning_is_refused_for_what_it_is(llama: LlamaForCausalLM) -> None:
    model = get_peft_model(llama, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    before = model(input_ids=IDS).logits
    for method in ("rerope", "log-n"):
        with pytest.raises(UnsupportedModelError, match=f"for {method}.*an adapter of the type PREFIX_TUNING"):
            patch_model(model, method, factor=2)
    with patch_model(model, "yarn", factor=2):
        assert not torch.equal(model(input_ids=IDS).logits, before)
    assert torch.equal(model(input_ids=IDS).logits, before)
    patch(llama, "rerope")  # the adapter around the model cannot be seen from inside
    with pytest.raises(EvaluationError, match="positions are not known: .*prefix tuning"):
        model(input_ids=IDS)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ALL)
def test_arguments_that_do_not_change_attention_pass(name: str, base: str) -> None:
    """Check arguments of trainers and collators, and one that is unknown."""
    model = tiny_llama(attn_implementation=base)
    patch(model, name)
    where = torch.cat([torch.arange(25), torch.arange(35)])[None]
    expected = logits(model, IDS, position_ids=where, use_cache=False)
    lengths = torch.tensor([0, 25, 60], dtype=torch.int32)
    extras: dict[str, Any] = {
        "seq_idx": torch.cat([torch.zeros(25), torch.ones(35)])[None].int(),
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": 35,
        "max_length_k": 35,
        "num_items_in_batch": 60,
        "something_new": 1,
    }
    assert torch.equal(logits(model, IDS, position_ids=where, use_cache=False, **extras), expected)
    loss = model(IDS, labels=IDS, shift_labels=IDS.roll(-1, 1), ignore_index=-100, use_cache=False, **extras).loss
    loss.backward()
    assert torch.isfinite(loss) and model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_arguments_that_change_attention_are_refused(llama: LlamaForCausalLM) -> None:
    """Check the refusal of biases, which transformers' sdpa attention adds and attention over bands would ignore."""
    patch(llama, "rerope")
    with pytest.raises(
        UnsupportedModelError, match="passes position_bias to its attention, which remapping does not support"
    ):
        logits(llama, IDS, position_bias=torch.zeros(1, 4, 60, 60))


def eager(kind: str) -> Any:
    model = build(kind)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", ["rerope", "dual-chunk", "sinks", "log-n"])
def test_attention_weights(name: str, kind: str) -> None:
    """Check weights of eager attention: rows sum to one, and equal those of the unpatched model within the window."""
    model = eager(kind)
    with torch.no_grad():
        right = model(IDS, output_attentions=True).attentions
        patch_model(model, ReRoPE(window=TRAINED), factor=4)
        unmoved = model(IDS, output_attentions=True).attentions
        for actual, reference in zip(unmoved, right, strict=True):
            torch.testing.assert_close(actual, reference, **CLOSE)
    model = eager(kind)
    patch(model, name)
    expected = logits(model, IDS)
    with torch.no_grad():
        out = model(IDS, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)  # two ways to sum
    assert len(out.attentions) == model.config.num_hidden_layers
    for weights in out.attentions:
        assert weights.shape == (1, model.config.num_attention_heads, 60, 60)
        assert not weights.triu(1).any()
        if kind != "gpt_oss":  # its learned sinks take a share
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), **CLOSE)


def test_attention_weights_that_sdpa_does_not_have(llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:

    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    patch(llama, "rerope")
    for _ in range(2):
        logits(llama, IDS, output_attentions=True)
    assert sum("set_attn_implementation('eager')" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["rerope", "dual-chunk", "dynamic-ntk"])
def test_a_trace_of_one_text_is_refused(name: str, llama: LlamaForCausalLM) -> None:
    """A trace of chunks that was run on a longer text divided by 0 and ended the process."""
    patch(llama, name)
    llama.config.return_dict = False
    llama.config.use_cache = False
    with pytest.raises(UnsupportedModelError, match="torch.export"):
        torch.jit.trace(llama, (IDS,), check_trace=False)


def exported(model: PreTrainedModel, dynamic: dict[int, Any]) -> Any:
    """Return an export of a model with some dimensions of its input open. ONNX files are made of one as well."""
    given = {"input_ids": IDS.expand(2, -1).contiguous(), "use_cache": False}
    shapes = {"input_ids": dynamic, "use_cache": None}
    with torch.no_grad():
        return torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()


@pytest.mark.parametrize("name", ["rerope", "dual-chunk", "dynamic-ntk"])
def test_an_export_is_of_one_length(name: str, llama: LlamaForCausalLM) -> None:
    patch(llama, name)
    rows = tokens(60, rows=3)
    output = exported(llama, {0: torch.export.Dim("rows", max=9)})(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(output, logits(llama, rows, use_cache=False), **CLOSE)
    with pytest.raises(UnsupportedModelError, match="Leave the tokens out of dynamic_shapes"):
        exported(llama, {1: torch.export.Dim("tokens", max=200)})


def test_an_export_of_other_frequencies_is_of_any_length(llama: LlamaForCausalLM) -> None:
    patch_model(llama, "yarn", factor=8)
    rows = tokens(90, rows=2)
    output = exported(llama, {1: torch.export.Dim("tokens", max=200)})(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(output, logits(llama, rows, use_cache=False), **CLOSE)


def test_refusals_are_errors_of_the_package() -> None:
    assert issubclass(EvaluationError, PosExtError) and issubclass(UnsupportedModelError, PosExtError)
