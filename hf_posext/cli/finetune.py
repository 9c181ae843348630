"""`finetune`: train an adapter, or all weights, under a patch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidParameterError, UnsupportedModelError
from . import options
from .app import app
from .console import say
from .processes import rank as process_rank
from .trackers import check_tracker

if TYPE_CHECKING:
    from ..plan import ExtensionPlan
    from ..training import Finetuned, Preset


@app.command()
def finetune(
    context: typer.Context,
    model: options.Model,
    dataset: options.Dataset,
    output: Annotated[Path, typer.Option(help="Directory of the run; new, or with --resume that of an earlier one.")],
    method: Annotated[
        str | None, typer.Option(help="Method, such as 'yarn(beta_fast=16)'. The preset nope has its own.")
    ] = None,
    factor: options.Factor = None,
    target_length: options.TargetLength = None,
    trained_length: options.TrainedLength = None,
    original_length: options.OriginalLength = None,
    preset: Annotated[str, typer.Option(help="lora, lora-plus (and embeddings, norms), dora, full, nope.")] = "lora",
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the preset's.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of LoRA. Default: the preset's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA is scaled by alpha / rank.")] = None,
    lora_ratio: Annotated[
        float | None,
        typer.Option(help="Learning rate of LoRA's second matrix relative to the first (LoRA+), such as 16."),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Layers with LoRA: attention, all-linear, or names separated by commas.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row. Default: the target length.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows per process and forward pass.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Forward passes per step.")] = 8,
    warmup: Annotated[
        int | None, typer.Option(help="Steps until the peak learning rate. Default: 20, at most half of all steps.")
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Pack short texts into shared rows, without attention between them.")
    ] = False,
    pose: Annotated[
        int | None, typer.Option(help="Short rows with skipped positions (PoSE): chunks in a row, such as 2.")
    ] = None,
    shifted: Annotated[
        int | None, typer.Option(help="Attend within groups while training (S2): groups in a row, such as 4.")
    ] = None,
    longce: Annotated[
        int | None,
        typer.Option(help="Weight tokens by the gain of the long context (LongCE): tokens of the short context."),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 by autocast.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory at the cost of time.")
    ] = False,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Load the base in 4 bits by bitsandbytes.")
    ] = False,
    evaluate: Annotated[
        str | None, typer.Option(help="Texts to measure during training, in the forms of --dataset.")
    ] = None,
    evaluate_split: Annotated[str | None, typer.Option(help="Split of the data set of --evaluate.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="For --evaluate: context lengths in tokens. Default: the trained and the target length."),
    ] = None,
    every: Annotated[int, typer.Option(help="For --evaluate: steps between measurements.")] = 100,
    start: Annotated[int, typer.Option(help="For --evaluate: tokens to skip at the beginning of each document.")] = 0,
    passkey: Annotated[int, typer.Option(min=0, help="For --evaluate: passkey trials at each length.")] = 0,
    patience: Annotated[int | None, typer.Option(help="Stop after this many evaluations without improvement.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: a tenth of all steps.")
    ] = None,
    documents: options.Documents = None,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: Annotated[int, typer.Option(help="Seed of the adapter, the order of rows, and skipped positions.")] = 0,
    report_to: Annotated[
        str, typer.Option(metavar="TRACKER", help="Log training as the Trainer does: tensorboard, wandb, mlflow.")
    ] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in OUTPUT, if any.")] = False,
    config: options.Config = None,
) -> None:
    """Patch a model, put an adapter on it, train it on long texts, and save the adapter with its plan.

    Writes adapter (or model, if all weights are trained), checkpoints, training_log.json and provenance.json into
    OUTPUT. --resume continues a stopped run. Under accelerate launch several processes train together, with the
    configurations in examples/accelerate_configs. --text-column also applies to --evaluate, and so does --revision if
    both are the same data set.
    """
    trained_length = options.renamed_length(context, trained_length, original_length)
    plan = _plan(model, method, preset, factor, target_length, trained_length, trust_remote_code)
    sizes = None if lengths is None else options.numbers(lengths)

    # The imports that take seconds come after the checks that need none of them.
    from transformers.integrations import get_available_reporting_integrations

    from ..evaluation import load_documents
    from ..training import Evaluation
    from ..training import finetune as train
    from .loading import load_model

    if report_to != "none":
        check_tracker("report_to", report_to, get_available_reporting_integrations())
    of_preset = {"learning_rate": learning_rate, "rank": rank, "alpha": alpha, "ratio": lora_ratio}
    chosen = _preset(preset, {**of_preset, "targets": targets})
    texts = load_documents(dataset, text_column=text_column, split=split, revision=revision, limit=documents)
    network, tokenizer = (
        _load_4bit(model, trust_remote_code) if load_in_4bit else load_model(model, dtype, "cpu", trust_remote_code)
    )
    evaluation = None
    if evaluate is not None:
        ends = sizes or sorted({plan.trained_length, plan.target_length})
        held_out = load_documents(
            evaluate,
            text_column=text_column,
            split=evaluate_split,
            revision=revision if evaluate == dataset else None,
        )
        evaluation = Evaluation(held_out, ends, every, start, passkey)
    try:
        result = train(
            network,
            tokenizer,
            texts,
            plan,
            output=output,
            preset=chosen,
            length=length,
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            warmup=warmup,
            pack=pack,
            pose=pose,
            shifted=shifted,
            longce=longce,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            evaluation=evaluation,
            patience=patience,
            save_every=save_every,
            resume=resume,
            seed=seed,
            report_to=report_to,
        )
    except KeyboardInterrupt:
        advice = "go on with --resume" if output.exists() else "nothing was saved"
        say(f"interrupted; {advice}", err=True)
        raise typer.Exit(130) from None
    if not process_rank():
        _tell(result)


def _plan(
    model: str,
    method: str | None,
    preset: str,
    factor: float | None,
    target_length: int | None,
    original_length: int | None,
    trust_remote_code: bool,
) -> ExtensionPlan:
    """Return the plan, based only on the config of the model. A refusal then comes before weights are read."""
    from ..methods import as_method
    from ..patching import detect_scheme
    from .loading import load_config, require_unpatched

    if method is None and preset != "nope":
        raise InvalidParameterError("Expected a method, got none. Pass one, as in --method yarn --factor 8.")
    require_unpatched(model, "training begins unpatched", "go on with a run that was stopped by --resume")
    lengths = {"factor": factor, "target_length": target_length, "trained_length": original_length}
    return as_method(method or preset).plan(detect_scheme(load_config(model, trust_remote_code)), **lengths)  # type: ignore[arg-type]


def _preset(name: str, given: dict[str, Any]) -> Preset:
    """Return a preset with the given options."""
    from ..training.settings import as_preset

    preset = as_preset(name)
    given = {option: value for option, value in given.items() if value is not None}
    of_adapters = sorted(given.keys() - {"learning_rate"})
    if preset.rank is None and of_adapters:
        raise InvalidParameterError(
            f"The preset {name!r} trains all weights, but {', '.join(of_adapters)} is an option of adapters. Pass "
            "--preset lora."
        )
    if "targets" in given and given["targets"] not in ("attention", "all-linear"):
        given["targets"] = [name.strip() for name in given["targets"].split(",") if name.strip()]
    return replace(preset, **given)


def _load_4bit(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return a model quantized while loading, on the GPU of this process, and its tokenizer."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedModelError(
            "4-bit weights need bitsandbytes, which is not installed here; pip install bitsandbytes, or leave "
            "--load-in-4bit out"
        )
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ..patching.loading import locate, open_tokenizer, open_weights
    from .loading import one_line_errors

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    place = {"": int(os.environ.get("LOCAL_RANK", 0))}
    with one_line_errors(name):
        source = locate(name, trust_remote_code=trust_remote_code)
        tokenizer = open_tokenizer(source)
        return open_weights(
            AutoModelForCausalLM, source, quantization_config=quantization, device_map=place
        ), tokenizer


def _tell(result: Finetuned) -> None:
    """Print the number of trained parameters, the time, and the measurements before and after."""
    facts = result.provenance["result"]
    trained, whole = facts["parameters"]["trained"], facts["parameters"]["model"]
    say(f"trained {trained:,} parameters ({trained / whole:.2%}), {facts['steps']} steps, {facts['seconds']:.0f} s")
    losses = [entry["loss"] for entry in result.log if "loss" in entry]
    say(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    measured = [entry for entry in result.log if any(name.startswith("eval_") for name in entry)]
    for name in (key for key in (measured[0] if measured else {}) if key.startswith("eval_")):
        what, _, tokens = name.removeprefix("eval_").rpartition("_")
        say(f"{what} at {tokens}: {measured[0][name]:.2f} -> {measured[-1][name]:.2f}")
    say(f"{result.path.name}: {result.path}")
