"""From a model, documents and a budget to a recommendation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..deprecation import renamed_arguments
from ..diagnosis import Diagnosis, diagnose
from ..errors import InvalidParameterError, UnsupportedModelError
from ..evaluation.config import EvaluationConfig
from ..evaluation.journal import open_journal, run_identity
from ..evaluation.questions import Questions
from ..evaluation.setup import check_request, prepare
from ..patching import detect_scheme, unwrap
from ..patching.modes import evaluation_mode
from .candidates import Candidates, candidates
from .halving import Halving
from .recommendation import Recommendation
from .schedule import least_tokens
from .sweep import Sweep, name_of

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

    from ..evaluation import Document
    from ..methods import Method

SHARE = 0.25
"""Share of the cost of the exhaustive sweep: the budget where none is given."""


@renamed_arguments(original_length="trained_length")
def recommend(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    target_length: int,
    budget: int | None = None,
    *,
    methods: Sequence[str | Method] | None = None,
    short_limit: float = 0.01,
    trained_length: int | None = None,
    passkey: int = 5,
    start: int = 0,
    seed: int = 0,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> Recommendation:
    """
    Find the method and factor that read the target length best, by measuring where it matters.

    The diagnosis tells the trained length, and which methods leave rotary phases that training has never shown; those
    are not measured. The others, at one and two times the needed factor and with several windows, read documents by
    successive halving: all of them a few, the better third twice as many, and so on. Better is a lower perplexity of
    the second half of the target length, among those that change the perplexity inside the trained length by no more
    than the limit. At the end the control (the unpatched model with its context truncated to the trained length) tells
    whether the longer context is worth anything; pass keys decide between contenders that are level.

    Args:
        model (`PreTrainedModel`): a causal language model without a patch; as before afterwards.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): texts of the target length and more; six or
            more, as each is one draw of the intervals.
        target_length (`int`): tokens to read, above the trained length.
        budget (`int`, *optional*): tokens that may go through the model; by default a quarter of what the exhaustive
            sweep takes. It is never exceeded.
        methods (`Sequence[str | Method]`, *optional*): to choose from; all that apply where not given.
        short_limit (`float`, *optional*, defaults to 0.01): the largest increase of perplexity allowed inside the
            trained length; 0.01 is one per cent.
        trained_length (`int`, *optional*): trained length in tokens, where the diagnosis cannot find it.
        passkey (`int`, *optional*, defaults to 5): pass-key trials of finalists that are level; 0 for none.
        start (`int`, *optional*, defaults to 0): tokens to leave out at the beginning of each document (front matter).
        seed (`int`, *optional*, defaults to 0): of intervals and pass keys.
        journal (`str` or `Path`, *optional*): a file that gets what is measured at once, and from which a run goes on,
            also with a larger budget.
        accelerator (`Accelerator`, *optional*): of the processes that share the documents.

    Returns:
        [`Recommendation`]: with `answer`, `plan`, `text()`, `frame()`, `save_plan(path)`.

    Raises:
        InvalidParameterError: a target that is not above the trained length, a budget that does not pay for one
            comparison, or options that cannot be.
        MethodNotApplicableError: every method is refused.
        DocumentError: no documents, or none as long as the target.
        EvaluationError: the loss is no better than a guess.
        AlreadyPatchedError, UnsupportedModelError, JournalError: as [`evaluate_perplexity`].
    """
    check_options(target_length, trained_length, short_limit, passkey)
    with prepared(
        model, tokenizer, documents, target_length, methods=methods, trained_length=trained_length,
        passkey=passkey, start=start, seed=seed, journal=journal, accelerator=accelerator,
    ) as (sweep, choice):  # fmt: skip
        least = least_tokens(sweep.prices([name_of(plan) for plan in choice.plans]))
        share = max(least, round(SHARE * sweep.exhaustive_tokens))  # a quarter of very little pays for nothing
        return Halving(sweep, short_limit, share if budget is None else budget).run(choice)


def check_options(target_length: int, trained_length: int | None, short_limit: float, passkey: int) -> None:
    """Refuse options that no model allows; as in [`recommend`].

    Raises:
        InvalidParameterError: a limit or trials below 0, or a target that is not above a trained length that is given.
    """
    if short_limit < 0 or passkey < 0:
        raise InvalidParameterError(f"short_limit is {short_limit} and passkey {passkey}; give 0 or more of each")
    if trained_length is not None and target_length <= trained_length:
        raise InvalidParameterError(
            f"target_length is {target_length}, and the model was trained on {trained_length} tokens "
            "(trained_length=), so that it needs no method; give a target above that"
        )


@contextmanager
def prepared(
    model: nn.Module,
    tokenizer: Any,
    documents: Any,
    target_length: int,
    *,
    methods: Sequence[str | Method] | None = None,
    trained_length: int | None = None,
    passkey: int = 0,
    start: int = 0,
    seed: int = 0,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[tuple[Sweep, Candidates]]:
    """All that is checked before anything long begins, and a sweep that has measured nothing yet; as [`recommend`]."""
    base = unwrap(model)
    scheme = detect_scheme(base)
    found = diagnose(base, methods=[], trained_length=trained_length)
    trained = _trained_length(found, target_length)
    request = check_request(
        EvaluationConfig(lengths=[trained, target_length], start=start, seed=seed), scheme, base, accelerator
    )
    if request.protocol.name != "prefix":
        raise UnsupportedModelError(
            f"{type(base).__name__} is no causal language model, and recommend measures those; use hf-posext compare"
        )
    choice = candidates(base, scheme, methods, trained, target_length)
    Questions(passkey, seed=seed).check(tokenizer, [target_length])
    setup = prepare(request, model, tokenizer, documents)
    plans = [*choice.plans, *choice.unseen]
    identity = run_identity(setup, [base], plans, recommend={"trained": trained, "passkey": passkey})
    with evaluation_mode(base), open_journal(journal, identity, accelerator) as written:
        sweep = Sweep(base, setup, plans, passkey, seed, written, accelerator)
        yield sweep, choice


def _trained_length(found: Diagnosis, target_length: int) -> int:
    if found.trained_length is None:
        raise InvalidParameterError(
            f"nothing tells the trained length of {found.model} ({found.trained_length_source}); give "
            "trained_length= in tokens"
        )
    if target_length <= found.trained_length:
        raise InvalidParameterError(
            f"target_length is {target_length}, and the model was trained on {found.trained_length} tokens "
            f"({found.trained_length_source}), so that it needs no method; give a target above that, or "
            "trained_length= if it was trained on less"
        )
    return found.trained_length
