"""Comparison of methods on the same tokens against the control, and evaluation of a single model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn

from ..errors import AlreadyPatchedError, InvalidParameterError, renamed_arguments
from ..methods import Method
from ..patching import detect_scheme, find_patch
from ..patching.modes import evaluation_mode, outer_weights
from ..patching.patch import unpatched
from ..plan import ExtensionPlan
from .config import EvaluationConfig, checked
from .key_tokens import check_key_search, key_search
from .results import Results
from .rows import title
from .runner import measure, open_journal
from .scorer import model_name
from .setup import Refusals, Request, check_reads, check_request, plan_comparison, prepare, run_identity, try_plans
from .tasks import Assembly, MethodRun, Outcomes, control_run, method_run, name_of
from .windows import CONTROL

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from .config import Criterion
    from .documents import Document


@renamed_arguments(original_length="trained_length")
@checked
def compare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document] | Sequence[str] | datasets.Dataset | str,
    methods: Sequence[str | Method],
    config: EvaluationConfig | None = None,
    *,
    journal: str | Path | None = None,
    accelerator: Accelerator | None = None,
    on_method: Callable[[Results], None] | None = None,
    **settings: Any,
) -> Results:
    """Measure perplexity, gain over the control, and retrieval of several methods on one model.

    All methods are planned before any document is read, so mistakes surface early. Methods that do not apply to the
    model are left out, with the reason in `provenance["not_applicable"]`. The control is measured once. `none`, if
    requested, is measured first, because the other methods are compared with it. A document that fails under one
    method (non-finite logits, out of memory) is left out of all methods, with the reason in `provenance["left_out"]`.
    The model is restored after each method, even after an exception or Ctrl-C.

    ```python
    compare(model, tokenizer, documents, ["none", "yarn"], lengths=[512, 4096], factor=8)
    compare(model, tokenizer, documents, ["none", "yarn"], EvaluationConfig(lengths=[512, 4096], factor=8))
    ```

    | column | meaning |
    |---|---|
    | `perplexity`, `perplexity_tail` | perplexity of all scored tokens, and of those in the second half of the text |
    | `bits_per_byte` | NLL in bits per byte of scored text, comparable across tokenizers; not for `legacy-longlora` |
    | `nll_sum`, `tokens`, `documents` | totals that the perplexity is computed from; NLL in nats |
    | `protocol`, `bos`, `dtype` | conditions of the measurement |
    | `ci95` | 95 % bootstrap interval of `perplexity` over documents |
    | `perplexity_truncated`, `perplexity_truncated_tail` | the same for the control, truncated to the trained length |
    | `gain`, `gain_ci95` | `perplexity_truncated_tail / perplexity_tail`, paired; above 1, the longer context helps |
    | `change`, `change_ci95` | `perplexity / unpatched perplexity - 1`, paired; past the trained length needs `none` |
    | `longppl`, `longppl_ci95`, `key_tokens` | perplexity of the key tokens at the longest length, and their number |
    | `longppl_truncated` | perplexity of the same tokens for the control |
    | `passkey`, `passkey_trials` | fraction of passkeys retrieved, and number of trials |

    The control is the unpatched model with its context truncated to the trained length. `results.retrieval` contains
    the accuracy of retrieval by method, task, length, and depth.

    Args:
        model (`PreTrainedModel`): a language model (causal, masked, or encoder-decoder) without a patch.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts. Repeated ids are numbered.
        methods (`Sequence[str | Method]`): method names, optionally with hyperparameters (`"rerope(window=384)"`),
            or method objects, for any positional schemes.
        config ([`EvaluationConfig`], *optional*): the settings.
        journal (`str` or `Path`, *optional*): file, such as `journal.jsonl`, to which each finished document is
            appended. If the file exists, the run continues from it. The file is kept at the end. Only one run may
            write it at a time.
        accelerator (`Accelerator`, *optional*): distributes the documents over its processes. Results are
            bit-identical for any number of processes. Each process holds the model on `accelerator.device`.
        on_method (`Callable[[Results], None]`, *optional*): called after each method with the results so far, so that
            they can be saved. With several processes, it is called once on each of them, at the end.
        settings: fields of [`EvaluationConfig`], which take precedence over `config`.

    Returns:
        [`Results`]: one row per method and length, on every process.

    Raises:
        AlreadyPatchedError: the model has a patch.
        InvalidParameterError: a setting is unknown, or lengths, protocol, options, or methods are impossible.
        DocumentError, UnsupportedModelError, EvaluationError, JournalError: see [`evaluate_perplexity`].
        UnknownMethodError: a method does not exist.
        MethodNotApplicableError: no method applies to the model, or only `none` does although others are requested.
    """
    base, full_config = unpatched(model), EvaluationConfig.of(config, **settings)
    request, plans, not_applicable, criterion = check_comparison(full_config, methods, base, accelerator)
    trained_length = plans[0].trained_length
    setup = prepare(request, model, tokenizer, documents)
    runs = [method_run(setup, plan) for plan in plans]
    return measure_runs(
        runs,
        control_run(setup, setup.scorer, trained_length),
        criterion,
        unpatched=runs[0] if plans[0].changes_nothing else None,
        facts={"trained_length": trained_length, "not_applicable": not_applicable},
        identity={"trained_length": trained_length},
        models=[model],
        journal=journal,
        on_method=on_method,
    )


def check_comparison(
    config: EvaluationConfig,
    methods: Sequence[str | Method],
    model: nn.Module | PreTrainedConfig,
    accelerator: Accelerator | None = None,
) -> tuple[Request, list[ExtensionPlan], Refusals, Criterion | None]:
    """Check all that requires no documents, and return the request, its plans, refusals, and criterion of key tokens.

    With a config in place of the model, the plans are not tried.
    """
    request = check_request(config, detect_scheme(model), model, accelerator)
    plans, refusals = plan_comparison(request, methods)
    if isinstance(model, nn.Module):
        plans = try_plans(model, plans, refusals)
    criterion = check_key_search(request, plans[0].trained_length, [name_of(plan) for plan in plans])
    return request, plans, refusals, criterion


def check_evaluation(
    config: EvaluationConfig,
    label: str | None,
    model: nn.Module | PreTrainedConfig,
    plan: ExtensionPlan | None,
    control_length: int | None,
    accelerator: Accelerator | None = None,
) -> tuple[Request, str, float, Criterion | None]:
    """Check all that requires no documents, and return the request, label, factor, and criterion of key tokens.

    `model` may be a config, and is under `plan`. `control_length` is the trained length of the control, if any.
    """
    if label == CONTROL:  # records, tasks, and journal entries are identified by their label
        raise InvalidParameterError(
            f"Expected label to be another name than that of the control, got {label!r}. Pass label='tuned'."
        )
    # The config beside a saved plan contains the positions under the plan.
    scheme = detect_scheme(model) if plan is None or isinstance(model, nn.Module) else plan.scheme
    request = check_request(config, scheme, model, accelerator)
    check_reads(request, plan)
    label = label or (plan.method if plan is not None else "none" if control_length is None else "model")
    factor = 1.0 if plan is None or plan.changes_nothing else plan.factor
    criterion = check_key_search(request, control_length or scheme.trained_length, [title(label, factor)])
    return request, label, factor, criterion


def measure_runs(
    runs: Sequence[MethodRun],
    control: MethodRun | None,
    criterion: Criterion | None,
    *,
    unpatched: MethodRun | None = None,
    facts: dict[str, Any],
    identity: dict[str, Any],
    models: Sequence[nn.Module],
    journal: str | Path | None,
    on_method: Callable[[Results], None] | None = None,
) -> Results:
    """Find key tokens, measure the control and each method in turn, and assemble the results.

    `facts` go into the provenance. `identity` contains what the numbers depend on besides the setup.
    """
    setup = runs[0].setup
    search = key_search(setup, criterion, runs)
    # The journal is bound to everything that the numbers depend on, the evaluator of key tokens included.
    bare_models = list(dict.fromkeys(run.scorer.model for run in ([control] if control else []) + [*runs]))
    asked = setup.questions.identity(setup.scorer.model, setup.tokenizer, setup.lengths)
    dependencies = {**identity, **asked, **(search.identity if search else {})}
    measured = list(dict.fromkeys([*bare_models, *([search.scorer.model] if search else [])]))
    whole_identity = run_identity(setup, measured, [run.plan for run in runs], **dependencies)
    with ExitStack() as stack:
        for sharded in models:
            stack.enter_context(outer_weights(sharded))
        for bare_model in bare_models:
            stack.enter_context(evaluation_mode(bare_model))
        run_journal = stack.enter_context(open_journal(journal, whole_identity, setup.accelerator))
        # Key tokens come first, because every run reports its NLL on them.
        if search is not None:
            keys, facts["longppl"] = search.run(setup.accelerator, run_journal)
            marked = {run: replace(run, keys=keys) for run in runs}
            runs, unpatched = list(marked.values()), unpatched and marked[unpatched]
            control = control and replace(control, keys=keys)
        assembly = Assembly(runs, control, unpatched, facts)

        def report(outcomes: Outcomes) -> None:
            so_far = assembly.results(outcomes)
            if on_method is not None and so_far.rows:
                on_method(so_far)

        # The control comes before the methods, whose gains are relative to it.
        outcomes = measure(
            [run.stage() for run in [*([control] if control else []), *runs]],
            accelerator=setup.accelerator,
            journal=run_journal,
            on_stage=None if on_method is None else report,
        )
    return assembly.results(outcomes)


@renamed_arguments(original_length="trained_length")
@checked
def evaluate_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
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
    """Measure the perplexity of a single model by context length, on the same documents at every length.

    Each document is cut to the first `max(lengths)` tokens of `[BOS, if the tokenizer adds one] + tokens[start:]`.
    Shorter documents, and those on which the model fails, are left out and listed in the provenance. Log-softmax is
    computed in float32 for any model dtype, sums are float64, and every token has the same weight. Logits are
    projected in slices, so the memory they take does not depend on the length. To measure several methods, use
    [`compare`].

    Args:
        model (`PreTrainedModel`): a language model (causal, masked, or encoder-decoder), patched or not, fine-tuned or
            not, possibly inside a PEFT or DDP wrapper.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        documents (`list[Document]`, or what [`load_documents`] takes): the texts. Repeated ids are numbered.
        lengths (`Sequence[int]`, *optional*): context lengths in tokens. They take precedence over those of `config`.
        config ([`EvaluationConfig`], *optional*): the settings. `factor` and `target_length` are for [`compare`] only.
        label (`str`, *optional*): name of the model in the rows. Defaults to the method of the patch in force. Without
            a patch, it defaults to `"none"`, or to `"model"` if there is a control.
        control (`PreTrainedModel`, *optional*): unpatched model that scores the same tokens with truncated context.
            It is the baseline of `perplexity_truncated` and `gain`, and of `change` inside its trained length. For a
            model that was fine-tuned to a longer context, pass the base model. Both models are in memory at the same
            time.
        journal, accelerator (*optional*): see [`compare`].
        settings: fields of [`EvaluationConfig`], which take precedence over `config`.

    Returns:
        [`Results`]: one row per length, on every process. Without a control, the columns relative to it are `None`.

    Raises:
        InvalidParameterError: a setting is unknown, or a length, protocol, option, or control is impossible.
        AlreadyPatchedError: the control has a patch.
        DocumentError: there are no documents, or all of them are too short.
        UnsupportedModelError: the model has no language-model head.
        EvaluationError: every document failed, or two ways of measuring disagree.
        JournalError: the journal belongs to another run, is corrupt, or is being written by another run, or the disk
            is full.
    """
    if lengths is not None:
        settings["lengths"] = lengths
    full_config = EvaluationConfig.of(config, **settings)
    for name in ("factor", "target_length"):
        if (value := getattr(full_config, name)) is not None:
            raise InvalidParameterError(
                f"Expected {name} to be left out, since a model is measured as it is, got {value}. Drop it, or patch "
                "the model first."
            )
    patch = find_patch(model)
    plan = None if patch is None else patch.plan
    control_length = _control_length(control, full_config.trained_length)
    request, label, factor, criterion = check_evaluation(full_config, label, model, plan, control_length, accelerator)
    setup = prepare(request, model, tokenizer, documents)
    run = MethodRun(setup, label, factor, setup.scorer, plan, questions=setup.questions)
    truncated, facts = None, {}
    if control is not None and control_length is not None:
        truncated = control_run(setup, setup.scorer_of(control), control_length)
        facts = {"control": model_name(truncated.scorer.model), "trained_length": control_length}
    return measure_runs(
        [run],
        truncated,
        criterion,
        facts=facts,
        identity={"label": label, **facts},
        models=[module for module in (model, control) if module is not None],
        journal=journal,
    )


def _control_length(control: nn.Module | None, trained_length: int | None) -> int | None:
    """Return the checked trained length of the control; `None` without a control."""
    if control is None:
        if trained_length is not None:
            raise InvalidParameterError(
                f"Expected trained_length to be that of a control, got {trained_length} without a control. Pass "
                "control= too, or drop it."
            )
        return None
    if find_patch(control) is not None:
        raise AlreadyPatchedError(
            "Expected control to be a model without a patch, got one with a patch in force. Pass the model as it was "
            "trained."
        )
    length = trained_length or detect_scheme(control).trained_length
    if length is None or length < 2:
        raise InvalidParameterError(
            f"Expected control to have a trained length of 2 or more, got {length}. Pass trained_length=2048, in "
            "tokens."
        )
    return length
