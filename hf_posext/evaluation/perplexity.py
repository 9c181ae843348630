"""Perplexity of one model, as it is, by context length."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..deprecation import renamed_arguments
from ..errors import AlreadyPatchedError, InvalidParameterError
from ..patching import detect_scheme, find_patch
from .comparison import measure_runs
from .config import EvaluationConfig
from .results.results import Results
from .running.key_search import check_key_search
from .running.setup import check_reads, check_request, prepare
from .running.tasks import MethodRun, control_run, title
from .scoring.boundaries import boundaries_of
from .scoring.scorer import model_name

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

    from .texts.documents import Document


@renamed_arguments(original_length="trained_length")
def evaluate_perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    lengths: Sequence[int] | None = None,
    config: EvaluationConfig | None = None,
    *,
    label: str | None = None,
    control: nn.Module | None = None,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
    **settings: Any,
) -> Results:
    """
    Perplexity of a model by context length, on the same documents at every length: [`compare`] with no other method.

    Every document is cut to `[BOS, if the tokenizer adds one] + its tokens from start on`, first `max(lengths)`
    tokens; shorter ones are left out and listed in the provenance, as are those on which the model fails. Log-softmax
    is float32 whatever the model's dtype, sums are float64, and every token weighs the same. Logits are projected in
    slices, so that the memory of the vocabulary side does not depend on the length.

    Args:
        model (`PreTrainedModel`): a language model (causal, masked or encoder-decoder), patched or not, fine-tuned or
            not, also inside a PEFT or DDP wrapper.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts. Ids that repeat are numbered.
        lengths (`Sequence[int]`, *optional*): context lengths in tokens, where `config` does not contain them.
        config ([`EvaluationConfig`], *optional*): the settings; `factor` and `target_length` are of [`compare`] only.
        label (`str`, *optional*): what rows call the model; by default the patch in force, else `"none"`, or `"model"`
            beside a control.
        control (`PreTrainedModel`, *optional*): an unpatched model whose truncated reading of the same tokens gives
            `perplexity_truncated` and `gain`, and inside its trained length `change`; of a model that was fine-tuned
            to read longer, the one it was made from. Both are in memory at the same time.
        journal, accelerator (*optional*): see [`compare`].
        settings: fields of [`EvaluationConfig`], which take precedence over `config`.

    Returns:
        [`Results`]: one row per length, on every process. Without a control its columns are `None`.

    Raises:
        InvalidParameterError: an unknown setting, or lengths, a protocol, its options or a control that cannot be.
        AlreadyPatchedError: the control has a patch.
        DocumentError: no documents, or all of them too short.
        UnsupportedModelError: a model without a language-model head.
        EvaluationError: every document failed, or two ways of measuring disagree.
        JournalError: the journal is of another run, corrupt, or being written by another run; or the disk is full.
    """
    if lengths is not None:
        settings["lengths"] = lengths
    settled = EvaluationConfig.of(config, **settings)
    for name in ("factor", "target_length"):
        if (value := getattr(settled, name)) is not None:
            raise InvalidParameterError(
                f"{name} is {value}, and a model is measured as it is; leave it out, or patch the model first"
            )
    patch = find_patch(model)
    plan = None if patch is None else patch.plan
    scheme = detect_scheme(model)
    request = check_request(settled, scheme, model, accelerator)
    check_reads(request, plan)
    control_length = _control_length(control, settled.trained_length)
    label = label or (plan.method if plan is not None else "none" if control is None else "model")
    factor = 1.0 if plan is None or plan.changes_nothing else plan.factor
    criterion = check_key_search(request, control_length or scheme.trained_length, [title(label, factor)])

    setup = prepare(request, model, tokenizer, documents)
    boundaries = boundaries_of(scheme, plan)
    run = MethodRun(setup, label, factor, setup.scorer, boundaries, questions=setup.questions)
    truncated, facts = None, {}
    if control is not None and control_length is not None:
        truncated = control_run(setup, setup.scorer_of(control), control_length)
        facts = {"control": model_name(truncated.scorer.model), "trained_length": control_length}
    return measure_runs(
        setup,
        [(run, nullcontext)],
        truncated,
        [plan],
        criterion,
        facts=facts,
        identity={"label": label, **facts},
        models=[one for one in (model, control) if one is not None],
        journal=journal,
        accelerator=accelerator,
    )


def _control_length(control: nn.Module | None, trained_length: int | None) -> int | None:
    """Trained length of the control, checked; `None` without one."""
    if control is None:
        if trained_length is not None:
            raise InvalidParameterError(
                f"trained_length is {trained_length}, and there is no control; give control= too, or leave it out"
            )
        return None
    if find_patch(control) is not None:
        raise AlreadyPatchedError("the control has a patch in force; give the model as it was trained")
    length = trained_length or detect_scheme(control).trained_length
    if length is None or length < 2:
        raise InvalidParameterError(
            f"the trained length of the control is {length}; give trained_length=, in tokens, 2 or more"
        )
    return length
