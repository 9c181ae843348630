"""Before and after: methods side by side on the same tokens, against the control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import AlreadyPatchedError
from ..patching import detect_scheme, find_patch, patch_model, unwrap
from ..patching.modes import evaluation_mode, outer_weights
from .results.results import Results
from .running.asking import check_asking
from .running.assembly import Assembly
from .running.engine import Outcomes, State, measure
from .running.identity import run_identity
from .running.key_search import Evaluator, key_search
from .running.readings import control_reading, method_reading
from .running.run_journal import open_journal
from .running.selection import plan_methods, try_plans
from .running.setup import Options, prepare
from .scoring.boundaries import check_positions
from .scoring.context_parallel import memory_for
from .scoring.prefill import check_prefill

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

    from ..methods.base import Method
    from .texts.documents import Document


def compare(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    methods: Sequence[str | Method],
    *,
    lengths: Sequence[int],
    factor: float | None = None,
    target_length: int | None = None,
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
    on_method: Callable[[Results], None] | None = None,
) -> Results:
    """
    Perplexity, gain over the control, and what is retrieved, of several methods on one model.

    All methods are planned before anything is measured, so that a mistake costs no hours; those that do not apply to
    the model are left out, with the reason in `provenance["not_applicable"]`. The control is measured once; `none`,
    where it is asked for, is measured first, since the others are compared with it. A document that fails under one
    method (logits that are not finite, a lack of memory) is left out of all, with the reason in
    `provenance["left_out"]`. The model is restored after each method, also after an exception or Ctrl-C.

    | column | meaning |
    |---|---|
    | `perplexity`, `perplexity_tail` | of all tokens that the protocol scores, and of the second half of them |
    | `bits_per_byte` | NLL in bits by bytes of the scored text, across tokenizers; not of `legacy-longlora` |
    | `nll_sum`, `tokens`, `documents` | what the perplexity comes from; sums in nats |
    | `protocol`, `bos`, `dtype` | how it was measured |
    | `ci95` | 95 % bootstrap interval of `perplexity` over documents |
    | `perplexity_truncated`, `perplexity_truncated_tail` | the same, unpatched, context cut to the trained length |
    | `gain`, `gain_ci95` | `perplexity_truncated_tail / perplexity_tail`, paired: above 1 the longer context helps |
    | `change`, `change_ci95` | `perplexity / unpatched perplexity - 1`, paired; beyond that if `none` is measured |
    | `longppl`, `longppl_ci95`, `key_tokens` | perplexity of the key tokens at the longest length; how many they are |
    | `longppl_truncated` | of the same tokens, unpatched, context cut to the trained length |
    | `passkey`, `passkey_trials` | share of pass keys found, of how many |

    What `retrieval` asked for is in `results.retrieval`, by method, task, length and depth.

    Args:
        model (`PreTrainedModel`): a language model (causal, masked or encoder-decoder) without a patch.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts.
        methods (`Sequence[str | Method]`): names, with hyper-parameters or without (`"rerope(window=384)"`), or method
            objects; of any schemes.
        lengths (`Sequence[int]`): context lengths in tokens.
        factor (`float`, *optional*): of methods that do not say their own.
        target_length (`int`, *optional*): in tokens, instead of a factor.
        original_length (`int`, *optional*): trained length, where the config is wrong about it; the control's, too.
        protocol, stride, tail, start, passkey, retrieval, tasks, depths (*optional*): see [`evaluate_perplexity`].
        longppl (`str`, `PreTrainedModel` or `tuple`, *optional*): what finds the key tokens of LongPPL
            ([`find_key_tokens`]): once, at the longest length, for all methods and the control. The label of one of
            the methods (`"yarn"`, or `"yarn x8"` where it has several factors), which is thereby favoured; or another
            model that reads this length well; or `(model, tokenizer)`, if its tokenizer is another.
        alpha (`float`, *optional*): nats that the long context must gain for a token to be key; the paper's 2 if not
            given.
        beta (`float`, *optional*): log-probability, in nats, that a key token must have given the long context; the
            paper's -2 if not given.
        short_length (`int`, *optional*): tokens of LongPPL's short context, which moves by a quarter of it; by default
            half of the trained length, or of the longest if that is less, at most the paper's 4096.
        prefill_chunk, offload_cache, journal, accelerator (*optional*): see [`evaluate_perplexity`].
        seed (`int`, *optional*, defaults to 0): of the bootstrap and of the pass keys.
        on_method (`Callable[[Results], None]`, *optional*): called with the results so far after each method, so that
            what is finished can be saved; on several processes once, on each, at the end.

    Returns:
        [`Results`]: one row per method and length, on every process.

    Raises:
        AlreadyPatchedError: the model has a patch.
        InvalidParameterError: lengths, protocol, its options or methods that cannot be.
        DocumentError, UnsupportedModelError, EvaluationError, JournalError: as [`evaluate_perplexity`].
        UnknownMethodError: no such method.
        MethodNotApplicableError: no method applies to the model, or none but `none`.
    """
    base = unwrap(model)
    present = find_patch(base)
    if present is not None:
        raise AlreadyPatchedError(
            f"the model has the patch {present.plan.method!r} in force, and a comparison begins unpatched; "
            "call unpatch_model(model) first"
        )
    scheme = detect_scheme(base)
    memory = memory_for(accelerator, prefill_chunk, offload_cache)
    options = Options(protocol, stride, tail, start, memory, seed, accelerator)
    setup = prepare(model, tokenizer, documents, lengths, scheme, options)
    questions = check_asking(setup, passkey, retrieval, tasks, depths)
    plans, not_applicable = plan_methods(
        scheme, methods, factor=factor, target_length=target_length, trained_length=original_length
    )
    planned = try_plans(base, plans, not_applicable)
    for plan in planned:
        check_positions(scheme, plan, setup.lengths[-1])
        check_prefill(scheme, plan, setup.lengths[-1], prefill_chunk)

    trained_length = planned[0].original_length
    provenance = {"trained_length": trained_length, "not_applicable": not_applicable, **questions.facts}
    control = control_reading(setup, setup.scorer, trained_length)
    readings = [method_reading(setup, plan, passkey, questions) for plan in planned]
    patches = [partial(patch_model, base, plan, tokenizer=tokenizer) for plan in planned]
    criterion = {"alpha": alpha, "beta": beta, "short_length": short_length}
    search = key_search(setup, longppl, criterion, trained_length, list(zip(readings, patches, strict=True)))
    beside = {"passkey": passkey, **questions.facts, **(search.identity if search else {})}
    models = [base, *(search.others if search else [])]
    identity = run_identity(setup, models, planned, trained_length=trained_length, **beside)
    with outer_weights(model), evaluation_mode(base), open_journal(journal, identity, accelerator) as written:
        if search is not None:
            found = search.run(accelerator, written)
            control, *readings = (replace(reading, keys=found.keys) for reading in (control, *readings))
            provenance |= found.facts
        unpatched = readings[0] if planned[0].changes_nothing else None
        assembly = Assembly(readings, control, unpatched, provenance)

        def tell(outcomes: Outcomes) -> None:
            so_far = assembly.results(outcomes)
            if on_method is not None and so_far.rows:
                on_method(so_far)

        states = [State(control.name, nullcontext, control.units())]
        states += [State(one.name, enter, one.units()) for one, enter in zip(readings, patches, strict=True)]
        return assembly.results(measure(states, accelerator=accelerator, journal=written, on_state=tell))
