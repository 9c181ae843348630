"""Before and after: methods side by side on the same tokens, against the control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from ..errors import AlreadyPatchedError, InvalidParameterError
from ..patching import detect_scheme, patch_model
from ..patching.detect import unwrap
from ..patching.modes import evaluation_mode
from .control import CONTROL
from .passkey import passkey_accuracy, passkey_prompts
from .perplexity import collect, measure_method, work
from .protocols import DECODER_PROTOCOLS
from .results import Results
from .rows import make_rows
from .selection import plan_methods, try_plans
from .setup import check_positions, prepare

if TYPE_CHECKING:
    import datasets

    from ..methods.base import Method
    from .documents import Document


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
    start: int = 0,
    passkey: int = 0,
    seed: int = 0,
    on_method: Callable[[Results], None] | None = None,
) -> Results:
    """
    Perplexity, gain over the control, and pass-key retrieval of several methods on one model.

    All methods are planned before anything is measured, so that a mistake costs no hours; those that do not apply to
    the model are left out, with the reason in `provenance["not_applicable"]`. The control is measured once; `none`,
    where it is asked for, is measured first, since the others are compared with it. The model is restored after each
    method, also after an exception or Ctrl-C.

    | column | meaning |
    |---|---|
    | `perplexity`, `perplexity_tail` | of all tokens that the protocol scores, and of the second half of them |
    | `nll_sum`, `tokens`, `documents` | what the perplexity comes from; sums in nats |
    | `ci95` | 95 % bootstrap interval of `perplexity` over documents |
    | `perplexity_truncated`, `perplexity_truncated_tail` | the same, unpatched, context cut to the trained length |
    | `gain`, `gain_ci95` | `perplexity_truncated_tail / perplexity_tail`, paired: above 1 the longer context helps |
    | `change`, `change_ci95` | `perplexity / unpatched perplexity - 1`, paired; beyond that if `none` is measured |
    | `passkey`, `passkey_trials` | share of pass keys found, of how many |

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
        protocol (`str`, *optional*): see [`evaluate_perplexity`].
        stride (`int`, *optional*): see [`evaluate_perplexity`].
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document.
        passkey (`int`, *optional*, defaults to 0): pass-key trials per method and length; 0 for none.
        seed (`int`, *optional*, defaults to 0): of the bootstrap and of the pass keys.
        on_method (`Callable[[Results], None]`, *optional*): called with the results so far after each method, so that
            what is finished can be saved.

    Returns:
        [`Results`]: one row per method and length.

    Raises:
        AlreadyPatchedError: the model has a patch.
        InvalidParameterError: lengths, protocol, stride or methods that cannot be.
        DocumentError, UnsupportedModelError, EvaluationError: as [`evaluate_perplexity`].
        UnknownMethodError: no such method.
        MethodNotApplicableError: no method applies to the model, or none but `none`.
    """
    base = unwrap(model)
    present = getattr(base, "_posext_patch", None)
    if present is not None:
        raise AlreadyPatchedError(
            f"the model has the patch {present.plan.method!r} in force, and a comparison begins unpatched; "
            "call unpatch_model(model) first"
        )
    if passkey < 0:
        raise InvalidParameterError(f"passkey is {passkey}; give the number of trials per length, or 0 for none")
    scheme = detect_scheme(base)
    setup = prepare(
        model, tokenizer, documents, lengths, scheme, protocol=protocol, stride=stride, start=start, seed=seed
    )
    plans, not_applicable = plan_methods(
        scheme, methods, factor=factor, target_length=target_length, original_length=original_length
    )
    planned = try_plans(base, plans, not_applicable)
    for plan in planned:
        check_positions(scheme, plan, setup.lengths[-1])
    if passkey and setup.protocol.name not in DECODER_PROTOCOLS:
        raise InvalidParameterError(
            f"passkey is {passkey}, and {type(base).__name__} does not continue a text as a decoder does; give 0"
        )
    if passkey:
        for length in setup.lengths:
            passkey_prompts(tokenizer, length, 1, seed)
    trained_length = planned[0].original_length
    results = Results({**setup.provenance, "trained_length": trained_length, "not_applicable": not_applicable})
    steps = work(setup) * (1 + len(planned)) + len(planned) * len(setup.lengths) * (passkey > 0)
    with evaluation_mode(base), tqdm(total=steps, desc="control", unit="doc", disable=None) as progress:
        truncated = setup.protocol.measure_control(setup.scorer, setup.documents, setup.lengths, trained_length)
        control = collect(truncated, setup, CONTROL, 1.0, progress.update)
        results.per_document += control
        # Inside the trained length the control is the unpatched model itself, whether or not `none` is asked for.
        read_whole = setup.protocol.name != "sliding"
        baseline = [record for record in control if read_whole and record["length"] <= trained_length]
        for plan in planned:
            progress.set_description(plan.method)
            with patch_model(base, plan, tokenizer=tokenizer):
                times = 1.0 if plan.changes_nothing else plan.factor
                records = measure_method(setup, plan.method, times, plan.multipass, progress.update)
                found = {}
                if passkey:
                    found = passkey_accuracy(
                        base, tokenizer, setup.lengths, passkey, seed, on_length=lambda: progress.update(1)
                    )
            baseline = records if plan.changes_nothing else baseline
            rows = make_rows(records, protocol=setup.protocol.name, control=control, baseline=baseline, seed=seed)
            for row in rows if passkey else ():
                row |= {"passkey": found[row["length"]], "passkey_trials": passkey}
            results.rows += rows
            results.per_document += records
            if on_method is not None:
                on_method(results)
    return results
