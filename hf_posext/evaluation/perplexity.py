"""Perplexity of one model, as it is, by context length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from ..patching.detect import detect_scheme, unwrap
from ..patching.modes import evaluation_mode
from .protocols import Measurement
from .results import Results
from .rows import Record, document_record, make_rows
from .setup import Setup, check_positions, prepare

if TYPE_CHECKING:
    import datasets

    from .documents import Document


def evaluate_perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    lengths: Sequence[int],
    *,
    protocol: str | None = None,
    stride: int | None = None,
    start: int = 0,
) -> Results:
    """
    Perplexity of a model by context length, on the same documents at every length.

    Every document is cut to `[BOS, if the tokenizer adds one] + its tokens from start on`, first `max(lengths)`
    tokens; shorter ones are left out and listed in the provenance. Log-softmax is float32 whatever the model's dtype,
    sums are float64, and every token weighs the same. Logits are projected in slices, so that the memory of the
    vocabulary side does not depend on the length.

    Args:
        model (`PreTrainedModel`): a language model (causal, masked or encoder-decoder), patched or not, also inside a
            PEFT or DDP wrapper.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts.
        lengths (`Sequence[int]`): context lengths in tokens.
        protocol (`str`, *optional*): `"prefix"` ([`Prefix`]) or `"sliding"` ([`Sliding`]) for a causal language model,
            `"pseudo"` ([`Pseudo`]) for an encoder, `"seq2seq"` ([`Seq2Seq`]) for an encoder-decoder; the first that
            fits the model if not given.
        stride (`int`, *optional*): of the sliding window, in tokens; required there, refused elsewhere.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each (front matter).

    Returns:
        [`Results`]: one row per length, labelled with the patch in force (`"none"` without one). The columns of the
        control are `None`: see [`compare`].

    Raises:
        InvalidParameterError: lengths, protocol or stride that cannot be.
        DocumentError: no documents, or all of them too short.
        UnsupportedModelError: a model without a language-model head.
        EvaluationError: logits that are not finite, or two ways of measuring that disagree.
    """
    patch = getattr(unwrap(model), "_posext_patch", None)
    plan = None if patch is None else patch.plan
    scheme = detect_scheme(model)
    setup = prepare(
        model, tokenizer, documents, lengths, scheme, protocol=protocol, stride=stride, start=start, seed=0
    )
    check_positions(scheme, plan, setup.lengths[-1])
    method, factor = ("none", 1.0) if plan is None else (plan.method, plan.factor)
    multipass = any(rotary.multipass for rotary in scheme.rotaries) if plan is None else plan.multipass
    with (
        evaluation_mode(setup.scorer.model),
        tqdm(total=work(setup), desc=method, unit="doc", disable=None) as progress,
    ):
        records = measure_method(setup, method, factor, multipass, progress.update)
    return Results(setup.provenance, make_rows(records, protocol=setup.protocol.name), records)


def work(setup: Setup) -> int:
    """Steps of the progress bar that one method takes: documents x lengths."""
    return len(setup.documents.ids) * len(setup.lengths)


def measure_method(
    setup: Setup, method: str, factor: float, multipass: bool, on_step: Callable[[int], Any]
) -> list[Record]:
    """Records of every document at every length, of the model as it is now."""
    measurements = setup.protocol.measure(setup.scorer, setup.documents, setup.lengths, multipass)
    return collect(measurements, setup, method, factor, on_step)


def collect(
    measurements: Iterator[Measurement], setup: Setup, method: str, factor: float, on_step: Callable[[int], Any]
) -> list[Record]:
    """Measurements as records, one step of the progress bar each."""
    records = []
    for measurement in measurements:
        is_longest = measurement.length == setup.lengths[-1]
        records.append(document_record(measurement, setup.documents, method, factor, with_positions=is_longest))
        on_step(1)
    return records
