"""Perplexity of one model, as it is, by context length."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import AlreadyPatchedError, InvalidParameterError
from ..patching import detect_scheme, find_patch
from ..patching.modes import evaluation_mode, outer_weights
from .results.results import Results
from .running.asking import Asked, check_asking
from .running.assembly import Assembly
from .running.engine import State, measure
from .running.identity import run_identity
from .running.key_search import Evaluator, key_search
from .running.readings import Reading, control_reading
from .running.run_journal import open_journal
from .running.setup import Options, Setup, prepare
from .scoring.boundaries import boundaries_of, check_positions
from .scoring.context_parallel import memory_for
from .scoring.prefill import check_prefill
from .scoring.scorer import model_name

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

    from .texts.documents import Document


def evaluate_perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    lengths: Sequence[int],
    *,
    label: str | None = None,
    control: nn.Module | None = None,
    original_length: int | None = None,
    protocol: str | None = None,
    stride: int | None = None,
    tail: int | None = None,
    start: int = 0,
    passkey: int = 0,
    retrieval: int = 0,
    tasks: Sequence[str] | None = None,
    depths: Sequence[float] | None = None,
    longppl: Evaluator | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    short_length: int | None = None,
    prefill_chunk: int | None = None,
    offload_cache: bool = False,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
) -> Results:
    """
    Perplexity of a model by context length, on the same documents at every length.

    Every document is cut to `[BOS, if the tokenizer adds one] + its tokens from start on`, first `max(lengths)`
    tokens; shorter ones are left out and listed in the provenance, as are those on which the model fails. Log-softmax
    is float32 whatever the model's dtype, sums are float64, and every token weighs the same. Logits are projected in
    slices, so that the memory of the vocabulary side does not depend on the length.

    Args:
        model (`PreTrainedModel`): a language model (causal, masked or encoder-decoder), patched or not, fine-tuned or
            not, also inside a PEFT or DDP wrapper.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts.
        lengths (`Sequence[int]`): context lengths in tokens.
        label (`str`, *optional*): what rows call the model; by default the patch in force, else `"none"`, or `"model"`
            beside a control.
        control (`PreTrainedModel`, *optional*): an unpatched model whose truncated reading of the same tokens gives
            `perplexity_truncated` and `gain`, and inside its trained length `change`; of a model that was fine-tuned
            to read longer, the one it was made from. Both are in memory at the same time.
        original_length (`int`, *optional*): the control's trained length, where its config is wrong about it.
        protocol (`str`, *optional*): for a causal language model `"prefix"` ([`Prefix`]), `"sliding"` ([`Sliding`]),
            `"rolling"` ([`Rolling`]), `"tail"` ([`Tail`]), or an average as once published, `"legacy-yarn"` or
            `"legacy-longlora"`; `"pseudo"` ([`Pseudo`]) for an encoder, `"seq2seq"` ([`Seq2Seq`]) for an
            encoder-decoder. The first that fits the model if not given.
        stride (`int`, *optional*): of windows that overlap (`"sliding"`, legacy ones), in tokens; required there,
            refused elsewhere.
        tail (`int`, *optional*): tokens that protocol `"tail"` counts; required there, refused elsewhere.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each (front matter).
        passkey (`int`, *optional*, defaults to 0): pass-key trials at each length; 0 for none.
        retrieval (`int`, *optional*, defaults to 0): trials of each task at each length and depth; 0 for none.
        tasks (`Sequence[str]`, *optional*): of retrieval, see [`task_prompt`]; all by default.
        depths (`Sequence[float]`, *optional*): of retrieval, from 0 (beginning) to 1 (end); by default five, evenly.
        longppl (`str`, `PreTrainedModel` or `tuple`, *optional*): what finds the key tokens of LongPPL: another model,
            or one with its tokenizer, or the label of this one; see [`compare`].
        alpha, beta, short_length (*optional*): of LongPPL, see [`compare`].
        prefill_chunk (`int`, *optional*): tokens that go through the model at a time, the ones before them in a KV
            cache; bounds memory. All at once if not given.
        offload_cache (`bool`, *optional*, defaults to `False`): keep that cache on the CPU.
        journal (`str` or `Path`, *optional*): a file, `journal.jsonl` say, to which every finished document is
            appended; if it is there, the run continues from it. It is kept at the end.
        accelerator (`Accelerator`, *optional*): shares the documents out over its processes; results are the same to
            the bit on any number of them. The model is on each, on `accelerator.device`.
        seed (`int`, *optional*, defaults to 0): of the bootstrap and of the pass keys.

    Returns:
        [`Results`]: one row per length, on every process. Without a control its columns are `None`.

    Raises:
        InvalidParameterError: lengths, protocol, its options or a control that cannot be.
        AlreadyPatchedError: the control has a patch.
        DocumentError: no documents, or all of them too short.
        UnsupportedModelError: a model without a language-model head.
        EvaluationError: every document failed, or two ways of measuring disagree.
        JournalError: the journal is of another run or corrupt, or the disk is full.
    """
    patch = find_patch(model)
    plan = None if patch is None else patch.plan
    scheme = detect_scheme(model)
    memory = memory_for(accelerator, prefill_chunk, offload_cache)
    options = Options(protocol, stride, tail, start, memory, seed, accelerator)
    setup = prepare(model, tokenizer, documents, lengths, scheme, options)
    check_positions(scheme, plan, setup.lengths[-1])
    check_prefill(scheme, plan, setup.lengths[-1], prefill_chunk)
    questions = check_asking(setup, passkey, retrieval, tasks, depths)
    truncated = _control(setup, control, original_length)

    label = label or (plan.method if plan is not None else "none" if control is None else "model")
    factor = 1.0 if plan is None or plan.changes_nothing else plan.factor
    asked = Asked(setup, label, factor, passkey, questions)
    reading = Reading(setup, label, factor, setup.scorer, boundaries_of(scheme, plan), asked=asked)
    provenance: dict[str, Any] = dict(questions.facts)
    if truncated is not None:
        provenance |= {"control": model_name(truncated.scorer.model), "trained_length": truncated.truncated}
    trained_length = truncated.truncated if truncated is not None else scheme.trained_length
    criterion = {"alpha": alpha, "beta": beta, "short_length": short_length}
    search = key_search(setup, longppl, criterion, trained_length, [(reading, nullcontext)])
    models = [one.scorer.model for one in (truncated, reading) if one is not None]
    beside = {"label": label, "passkey": passkey, **provenance, **(search.identity if search else {})}
    identity = run_identity(setup, [*models, *(search.others if search else [])], [plan], **beside)
    with ExitStack() as stack:
        for sharded in (model, control):
            stack.enter_context(outer_weights(sharded) if sharded is not None else nullcontext())
        for model_read in models:
            stack.enter_context(evaluation_mode(model_read))
        written = stack.enter_context(open_journal(journal, identity, accelerator))
        if search is not None:
            found = search.run(accelerator, written)
            reading = replace(reading, keys=found.keys)
            truncated = truncated and replace(truncated, keys=found.keys)
            provenance |= found.facts
        readings = [reading] if truncated is None else [truncated, reading]
        states = [State(one.name, nullcontext, one.units()) for one in readings]
        outcomes = measure(states, accelerator=accelerator, journal=written)
    return Assembly([reading], truncated, provenance=provenance).results(outcomes)


def _control(setup: Setup, control: nn.Module | None, original_length: int | None) -> Reading | None:
    """The control, checked."""
    if control is None:
        if original_length is not None:
            raise InvalidParameterError(
                f"original_length is {original_length}, and there is no control; give control= too, or leave it out"
            )
        return None
    if find_patch(control) is not None:
        raise AlreadyPatchedError("the control has a patch in force; give the model as it was trained")
    trained_length = original_length or detect_scheme(control).trained_length
    if trained_length is None or trained_length < 2:
        raise InvalidParameterError(
            f"the trained length of the control is {trained_length}; give original_length=, in tokens, 2 or more"
        )
    return control_reading(setup, setup.scorer_of(control), trained_length)
