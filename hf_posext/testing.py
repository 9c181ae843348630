"""The contract of a method, for those who write one elsewhere.

```python
from hf_posext.testing import check_method

def test_my_method():
    check_method(MyMethod())
```

Each check builds a tiny random model of a kind of scheme that the method extends, and raises `AssertionError` where a
promise is broken. The one test that no contract can contain stays with the author: that the numbers equal a reference
which does not come from the method's own code.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
    XGLMForCausalLM,
)
from transformers.utils import logging as transformers_logging

from .methods import Method, as_method, methods
from .patching import detect_scheme, load_patched, patch_model, unpatch_model
from .patching.modes import cache_of, with_cache
from .plan import ExtensionPlan

__all__ = [
    "MODELS",
    "TRAINED",
    "check_cached_decoding",
    "check_effect",
    "check_method",
    "check_plan",
    "check_rows",
    "check_saved",
    "check_undo",
]

TRAINED = 64
"""Tokens that the tiny models claim to be trained on."""

VOCABULARY = 128
LENGTHS: dict[str, Any] = {"factor": 8, "trained_length": TRAINED}
"""Not every config contains the trained length, and a table may have more rows than were trained."""


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Make weights larger, so that attention depends on positions well above rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


def _builder(cls: Any, **sizes: Any) -> Callable[..., Any]:
    """Return a function that builds a tiny model with random weights, or with other sizes."""

    def build(**overrides: object) -> Any:
        torch.manual_seed(0)
        return sharpen(cls(cls.config_class(**{"vocab_size": VOCABULARY, **sizes, **overrides})))

    return build


tiny_llama = _builder(
    LlamaForCausalLM, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=TRAINED, pad_token_id=0,
)  # fmt: skip
"""Model of two layers whose positions are rotary."""

tiny_gpt2 = _builder(GPT2LMHeadModel, n_embd=64, n_layer=2, n_head=4, n_positions=TRAINED)
"""Model of two layers with a learned table of positions."""

tiny_bloom = _builder(BloomForCausalLM, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0)
"""Model of two layers with ALiBi's biases."""

tiny_t5 = _builder(
    T5ForConditionalGeneration, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
    relative_attention_max_distance=32, decoder_start_token_id=0,
)  # fmt: skip
"""Encoder-decoder of two layers each with relative biases in buckets."""

tiny_xglm = _builder(
    XGLMForCausalLM, d_model=64, ffn_dim=64, num_layers=2, attention_heads=4, pad_token_id=0,
    max_position_embeddings=TRAINED,
)  # fmt: skip
"""Model of two layers with sinusoidal positions."""


longer_gpt2 = partial(tiny_gpt2, n_positions=3 * TRAINED)
"""A learned table with rows past the trained length, so that the model runs there before it is patched."""

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "rotary": tiny_llama,
    "learned": longer_gpt2,
    "alibi": tiny_bloom,
    "relative": tiny_t5,
    "sinusoidal": tiny_xglm,
}
"""Builder of the model of each kind of scheme."""


def tokens(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids of shape `(rows, count)`, without the pad token."""
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def arguments(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a forward: the ids, or a fixed text to encode and the ids to decode."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"input_ids": tokens(3 * TRAINED, seed=9).expand(len(ids), -1), "decoder_input_ids": ids}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, cache: object = None, **kwargs: object) -> torch.Tensor:
    """Logits of shape `(rows, tokens, vocabulary)`."""
    output: torch.Tensor = model(**arguments(model, ids), **with_cache(model.forward, cache), **kwargs).logits
    return output


def text() -> torch.Tensor:
    """Token ids of shape `(1, 3 * TRAINED)`."""
    return tokens(3 * TRAINED)


def check_plan(method: Method, kind: str) -> None:
    """Planning is pure, and the plan survives JSON."""
    model = MODELS[kind]()
    scheme, before = detect_scheme(model), logits(model, text())
    plan = method.plan(scheme, **LENGTHS)
    assert plan == method.plan(scheme, **LENGTHS), "two plans of one method differ"
    assert torch.equal(logits(model, text()), before), "planning touched the model"
    assert ExtensionPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
    assert (plan.trained_length, plan.target_length) == (TRAINED, 8 * TRAINED)


def check_effect(method: Method, kind: str) -> None:
    """The patch changes logits past the trained length."""
    model = MODELS[kind]()
    before = logits(model, text())
    patch_model(model, method, **LENGTHS)
    change = (logits(model, text()) - before)[:, TRAINED:].abs().max()
    # the weakest effect measured on this model is above 0.1 of logits that spread by 4; rounding is 1e-6
    assert change > 1e-2 * before.std(), f"logits past {TRAINED} tokens change by {change:.1g}"


def check_undo(method: Method, kind: str) -> None:
    """Undo is exact, also after an exception."""
    model = MODELS[kind]()
    before, config = logits(model, text()), model.config.to_json_string(use_diff=False)
    attributes = {path: {*vars(module), type(module)} for path, module in model.named_modules()}
    patch_model(model, method, **LENGTHS).undo()
    try:
        with patch_model(model, method, **LENGTHS):
            raise KeyError("in the middle")
    except KeyError:
        pass
    patch_model(model, method, **LENGTHS)
    unpatch_model(model)
    assert torch.equal(logits(model, text()), before), "logits after undo differ"
    assert model.config.to_json_string(use_diff=False) == config
    assert {path: {*vars(module), type(module)} for path, module in model.named_modules()} == attributes


def check_cached_decoding(method: Method, kind: str) -> None:
    """Decoding with a cache gives the logits of one forward."""
    model = MODELS[kind]()
    # ALiBi's biases and XGLM's sines are float32 whatever the model is; the others are compared in float64, since T5's
    # float32 sums differ by up to 1e-3 here where the float64 ones differ by 1e-14
    tolerance = 2e-4 if kind in ("alibi", "sinusoidal") else 1e-9
    if tolerance == 1e-9:
        model.double()
    plan = patch_model(model, method, **LENGTHS).plan
    # positions that follow the length of a row are exact within the trained length only
    follows = plan.follows_rows or any(rotary.short_inv_freq is not None for rotary in plan.rotaries)
    end = TRAINED if follows else TRAINED + 12
    whole = logits(model, text()[:, :end])
    with torch.no_grad():
        out = model(**arguments(model, text()[:, : TRAINED - 4]), use_cache=True)
        steps = [out.logits]
        for i in range(TRAINED - 4, end):  # across the trained length
            step = arguments(model, text()[:, i : i + 1])
            out = model(**step, use_cache=True, **with_cache(model.forward, cache_of(out)))
            steps.append(out.logits)
    # sums in another order; logits spread by 4
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=tolerance, rtol=0)


def check_rows(method: Method, kind: str) -> None:
    """A row depends on nothing but itself: not on earlier calls, its batch-mates, or padding at its left."""
    model = MODELS[kind]()
    patch_model(model, method, **LENGTHS)
    long, short = text(), tokens(2 * TRAINED, seed=1)
    alone = logits(model, short)
    logits(model, long)
    assert torch.equal(logits(model, short), alone), "an earlier, longer call left state behind"

    padded = torch.cat([torch.zeros(1, long.shape[1] - short.shape[1], dtype=torch.long), short], 1)
    mask = (torch.cat([padded, long]) != 0).long()
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if model.config.is_encoder_decoder:
        given = {"decoder_attention_mask": mask}
    taken = inspect.signature(model.forward).parameters
    both = logits(model, torch.cat([padded, long]), **{name: value for name, value in given.items() if name in taken})
    # float32 sums in another order; logits spread by 4
    torch.testing.assert_close(both[:1, -short.shape[1] :], alone, atol=2e-4, rtol=0)
    torch.testing.assert_close(both[1:], logits(model, long), atol=2e-4, rtol=0)


def save_case(method: Method, kind: str, directory: Path) -> None:
    """Save a patched model, and beside it the logits that it gave."""
    model = MODELS[kind]()
    patch = patch_model(model, method, **LENGTHS)
    patch.save_pretrained(directory)
    answer = {"native": patch.native_obstacle is None, "logits": logits(model, text())}
    answer |= {"class": type(model).__name__, "arguments": arguments(model, text())}
    torch.save(answer, directory.with_suffix(".pt"))


def read_again(root: Path) -> None:
    """Open every saved case in a new process: without this package where plain transformers can, then with it."""
    subprocess.run([sys.executable, "-c", _READER, str(root)], check=True)


_READER = """
import sys; sys.modules["hf_posext"] = None  # importing it would raise
import pathlib, torch, transformers
transformers.utils.logging.disable_progress_bar()
answers = {path: torch.load(path) for path in pathlib.Path(sys.argv[1]).glob("*.pt")}
with torch.no_grad():
    for path, answer in answers.items():
        if answer["native"]:
            model = getattr(transformers, answer["class"]).from_pretrained(path.with_suffix(""))
            answer["plain"] = model(**answer["arguments"]).logits
    del sys.modules["hf_posext"]
    from hf_posext import load_patched
    for path, answer in answers.items():
        answer["ours"] = load_patched(path.with_suffix(""))(**answer["arguments"]).logits
        torch.save(answer, path)
"""


def check_saved(directory: Path, kind: str) -> None:
    """A case that was saved and read again gave equal logits, without pickles, and is undone after loading."""
    answer = torch.load(directory.with_suffix(".pt"))
    assert torch.equal(answer["ours"], answer["logits"]), "logits after loading differ"
    assert answer["native"] == ("plain" in answer)
    if answer["native"]:
        assert torch.equal(answer["plain"], answer["logits"]), "plain transformers computes other logits"
    files = {path.suffix for path in directory.rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors"}

    model = load_patched(directory)
    unpatch_model(model)
    assert torch.equal(logits(model, text()), logits(MODELS[kind](), text())), "logits after loading and undo differ"


CHECKS = (check_plan, check_effect, check_undo, check_cached_decoding, check_rows)


def cases(method: str | Method | type[Method]) -> Iterator[tuple[Method, str]]:
    """Yield the method with example values where its parameters have no defaults, for each kind that it extends."""
    known = methods().get(method, method) if isinstance(method, str) else method
    tried = known if isinstance(known, type) else as_method(known)
    for kind in filter(MODELS.__contains__, tried.kinds):
        yield tried.example(detect_scheme(MODELS[kind]())) if isinstance(tried, type) else tried, kind


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_method(method: str | Method | type[Method]) -> None:
    """Check a method against the whole contract, on a tiny model of each kind of scheme that it extends.

    Args:
        method (`str`, [`Method`] or its class): a name or class is tried with example values of its parameters. A
            method or class need not be registered.

    Raises:
        AssertionError: a promise is broken.
        PosExtError: the method refuses a model of a kind that it names, or changes nothing.

    Example:

    ```python
    >>> check_method("yarn")
    ```
    """
    with tempfile.TemporaryDirectory() as folder, _without_progress_bars():
        saved = []
        for tried, kind in cases(method):
            for check in CHECKS:
                check(tried, kind)
            saved.append((Path(folder) / kind, kind))
            save_case(tried, kind, saved[-1][0])
        assert saved, f"{method} extends no kind of scheme that has a tiny model: {', '.join(MODELS)}"
        read_again(Path(folder))
        for directory, kind in saved:
            check_saved(directory, kind)
