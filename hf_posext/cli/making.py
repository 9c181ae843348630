"""Commands that make a model or a file for a server: `finetune`, `export`, `gguf`, and `serve`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import hf_posext  # whose names load torch and transformers when they are first used

from ..errors import DocumentError, InvalidParameterError
from ..packages import require
from ..plan import PLAN_FILE
from ..processes import rank
from . import options
from .app import app
from .console import say
from .loading import base_of, load_4bit, load_config, load_model, require_device, require_unpatched, saved_plan
from .options import option
from .runs import check_tracker, make_writable, output_directory, removed_if_empty

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..training import Evaluation, Finetuned, Preset


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Preset, and the settings of it that are changed."""

    preset: str = option("lora, lora-plus (and embeddings, norms), dora, full, nope.", "lora")
    learning_rate: float | None = option("Peak learning rate. Default: the preset's.")
    rank: int | None = option("Rank of LoRA. Default: the preset's.", min=1)
    alpha: float | None = option("LoRA is multiplied by alpha / rank. Default: the preset's.")
    lora_ratio: float | None = option(
        "Learning rate of LoRA's second matrix relative to the first (LoRA+), such as 16."
    )
    targets: str | None = option("Layers with LoRA: attention, all-linear, or names separated by commas.")

    def changed(self) -> Preset:
        """Return the preset with the given settings."""
        from ..training.settings import as_preset

        preset = as_preset(self.preset)
        settings: dict[str, Any] = {
            name.removeprefix("lora_"): value
            for name, value in vars(self).items()
            if value is not None and name != "preset"
        }
        of_adapters = sorted(settings.keys() - {"learning_rate"})
        if preset.rank is None and of_adapters:
            raise InvalidParameterError(
                f"Expected a preset with an adapter beside {', '.join(f'{name}=' for name in of_adapters)}, got "
                f"{self.preset!r}, which trains all weights. Pass preset='lora'."
            )
        if self.targets not in (None, "attention", "all-linear"):
            settings["targets"] = [name.strip() for name in str(self.targets).split(",") if name.strip()]
        return replace(preset, **settings)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Keyword arguments of [`~hf_posext.training.finetune`], passed on as they are."""

    length: int | None = option("Tokens per row. Default: the target length; with --pose, the trained length.", min=2)
    steps: int = option("Optimizer steps.", 1000, min=1)
    batch_size: int = option("Rows per process and forward pass.", 1, min=1)
    accumulation: int = option("Forward passes per step.", 8, min=1)
    warmup: int | None = option("Steps until the peak learning rate. Default: 20, at most half of all steps.", min=0)
    pack: bool = option("Pack short texts into shared rows, without attention between them.", False)
    pose: int | None = option("Short rows with skipped positions (PoSE): chunks in a row, such as 2.", min=2)
    shifted: int | None = option("Attend within groups while training (S2): groups in a row, such as 4.", min=2)
    longce: int | None = option(
        "Weight tokens by the gain of the long context (LongCE): tokens of the short context.", min=1
    )
    bf16: bool = option("Compute in bfloat16 by autocast.", False)
    gradient_checkpointing: bool = option("Save memory at the cost of time.", False)
    save_every: int | None = option("Steps between checkpoints. Default: a tenth of all steps.", min=1)
    seed: options.Seed = 0
    report_to: str = option("Log training as the Trainer does: tensorboard, wandb, mlflow.", "none", metavar="TRACKER")
    resume: bool = option("Resume the run in OUTPUT, if any.", False)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Measurements during training."""

    evaluate: str | None = option("Texts to measure during training, in the forms of --dataset.")
    evaluate_split: str | None = option("Split of the data set of --evaluate.")
    lengths: str | None = option(
        "For --evaluate: context lengths in tokens. Default: the trained and the target length."
    )
    every: int = option("For --evaluate: steps between measurements.", 100, min=1)
    start: int = option("For --evaluate: tokens to skip at the beginning of each document.", 0, min=0)
    passkey: int = option("For --evaluate: passkey trials at each length.", 0, min=0)
    patience: int | None = option("For --evaluate: stop after this many measurements without improvement.", min=1)

    def load(self, texts: options.Texts, plan: hf_posext.ExtensionPlan) -> Evaluation | None:
        """Return the evaluation with its texts, which are read like those to train on."""
        from ..training import Evaluation

        lengths = sorted({plan.trained_length, plan.target_length})
        if self.lengths is not None:
            lengths = options.numbers(self.lengths)
        if self.evaluate is None:
            idle = [entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default]
            if idle:
                raise InvalidParameterError(f"{idle[0]}= requires evaluate=. Pass both or neither.")
            return None
        revision = texts.revision if self.evaluate == texts.dataset else None
        held_out = replace(texts, dataset=self.evaluate, split=self.evaluate_split, revision=revision, documents=None)
        try:
            documents = held_out.load()
        except DocumentError as error:
            raise DocumentError(re.sub("^(Expected |)split", r"\1evaluate_split", str(error))) from error
        return Evaluation(documents, lengths, self.every, self.start, self.passkey)


@app.command()
def finetune(
    model: options.Model,
    texts: options.Texts,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Directory of the run; new, or with --resume that of an earlier one.")
    ],
    lengths: options.Lengths,
    adapter: Adapter,
    training: Training,
    held_out: HeldOut,
    method: Annotated[
        str | None, typer.Option(help="Method, such as 'yarn(beta_fast=16)'. The preset nope has its own.")
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Load the base in 4 bits by bitsandbytes.")
    ] = False,
    dtype: options.Dtype = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    config: options.Config = None,
) -> None:
    """Patch a model, put an adapter on it, train it on long texts, and save the adapter with its plan.

    Writes adapter (or model, if all weights are trained), checkpoints, training_log.json and provenance.json into
    OUTPUT. --resume continues a stopped run. Under accelerate launch several processes train together, with the
    configurations in examples/accelerate_configs. --text-column also applies to --evaluate, and so does --revision if
    both are the same data set.
    """
    if method is None and adapter.preset != "nope":
        raise InvalidParameterError("Expected a method, got none. Pass one, as in --method yarn --factor 8.")
    from ..methods import as_method

    # The plan needs the config alone, so that a refusal comes before weights are read.
    require_unpatched(model, "training begins unpatched", "go on with a run that was stopped by --resume")
    scheme = hf_posext.detect_scheme(load_config(model, trust_remote_code))
    plan = as_method(method or adapter.preset).plan(scheme, **vars(lengths))

    from transformers.integrations import get_available_reporting_integrations

    from ..training.finetune import check_output

    if training.report_to != "none":
        check_tracker("report_to", training.report_to, get_available_reporting_integrations())
    preset = adapter.changed()
    with removed_if_empty(output):
        if not rank():
            check_output(output, training.resume)
            make_writable(output)
        documents, evaluation = texts.load(), held_out.load(texts, plan)
        network, tokenizer = (
            load_4bit(model, trust_remote_code) if load_in_4bit else load_model(model, dtype, "cpu", trust_remote_code)
        )
        places: Any = {"output": output, "preset": preset, "evaluation": evaluation, "patience": held_out.patience}
        try:
            result = hf_posext.finetune(network, tokenizer, documents, plan, **places, **vars(training))
        except KeyboardInterrupt:
            advice = "go on with --resume" if output.is_dir() and any(output.iterdir()) else "nothing was saved"
            say(f"interrupted; {advice}", err=True)
            raise typer.Exit(130) from None
    if not rank():
        _tell(result)


def _tell(result: Finetuned) -> None:
    """Print the number of trained parameters, the time, and the measurements before and after."""
    facts = result.provenance["result"]
    trained, total = facts["parameters"]["trained"], facts["parameters"]["model"]
    say(f"trained {trained:,} parameters ({trained / total:.2%}), {facts['steps']} steps, {facts['seconds']:.0f} s")
    losses = [entry["loss"] for entry in result.log if "loss" in entry]
    say(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    evaluations = [entry for entry in result.log if any(name.startswith("eval_") for name in entry)]
    for name in (key for key in (evaluations[0] if evaluations else {}) if key.startswith("eval_")):
        metric, _, tokens = name.removeprefix("eval_").rpartition("_")
        say(f"{metric} at {tokens}: {evaluations[0][name]:.2f} -> {evaluations[-1][name]:.2f}")
    say(f"{result.path.name}: {result.path}")


Source = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Saved patch, adapter folder, or with --method a model folder or Hub id."),
]
SourceMethod = Annotated[str | None, typer.Option(help="Method for an unpatched model, such as 'rerope+fade'.")]


@app.command()
def export(
    model: Source,
    to: Annotated[
        Literal["transformers", "transformers-4", "vllm", "sglang", "llama.cpp"],
        typer.Option(help="Server or library that will run it."),
    ],
    output: Annotated[Path, typer.Option(file_okay=False, help="Directory of the checkpoint; new or empty.")],
    lengths: options.Lengths,
    method: SourceMethod = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write a checkpoint for a server, with the command that starts it and its differences from this package.

    An adapter is merged into its base. A plan that the server cannot run is refused before anything is written.
    """
    with output_directory(output):
        network, tokenizer, merged = open_patched(model, method, lengths, dtype, trust_remote_code)
        serving = hf_posext.export_checkpoint(network, output, to, tokenizer=tokenizer, merged=merged)
        say(f"{serving.plan.describe()} for {serving.server}, as read from {serving.read_from}")
        for line in serving.command_lines(str(output)):
            say(f"  {line}")
        for sentence in serving.differences:
            say(f"- {sentence}")
        say(f"instructions: {output / 'SERVING.md'}")


@app.command()
def gguf(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan, or the folder that export wrote.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="GGUF file that convert_hf_to_gguf.py wrote.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="GGUF file to write; must not exist.")],
) -> None:
    """Copy a GGUF file and give it the positions of a plan."""
    from ..export import write_gguf

    say(f"wrote {write_gguf(plan, source, output)}")


def open_patched(
    model: str, method: str | None, lengths: options.Lengths, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any] | None]:
    """Open a patched model, or patch an unpatched one. Merge an adapter, and also return its config."""
    from ..methods import as_method

    config = load_config(base_of(model) or model, trust_remote_code)
    plan, target = saved_plan(model), {name: value for name, value in vars(lengths).items() if value is not None}
    # Refusals come before weights are read.
    if plan is not None and (method is not None or target):
        raise InvalidParameterError(f"{model} has a plan of its own. Leave out --method and lengths.")
    if plan is None:
        if method is None:
            raise InvalidParameterError(
                f"{model} has no {PLAN_FILE}. Pass the method, as in --method yarn --factor 4."
            )
        plan = as_method(method).plan(hf_posext.detect_scheme(config), **target)
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    network, tokenizer = load_model(model, dtype, "cpu", trust_remote_code)
    merged = None
    if adapters := getattr(network, "peft_config", None):
        merged = next(iter(adapters.values())).to_dict()
        network = network.merge_and_unload()
    if hf_posext.find_patch(network) is None:
        hf_posext.patch_model(network, plan, tokenizer=tokenizer)
    return network, tokenizer, merged


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Source,
    lengths: options.Lengths,
    method: SourceMethod = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve a patched model over HTTP by `transformers serve`, remapped positions included.

    Further flags are those of `transformers serve`: --host, --port, --cb-num-blocks. Needs the extra: pip install
    'hf_posext[serve]'.
    """
    require("serve")
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    require_device(device)
    network, tokenizer, _ = open_patched(model, method, lengths, dtype, trust_remote_code)
    network = network.to(device).eval()
    patch = hf_posext.find_patch(network)
    assert patch is not None
    # Positions that follow the length of a text need the whole text: those requests run one after the other.
    words = [] if patch.plan.follows_rows else ["--continuous-batching"]

    class OpenModel(model_manager.ModelManager):  # type: ignore[misc]
        """Manager of the opened model, in place of one that the server loads."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return network

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

    model_manager.ModelManager = OpenModel  # the server imports it when it is made
    server = typer.Typer(rich_markup_mode=None)
    server.command()(Serve)
    say(f"serving {model} ({patch.plan.describe()})")
    typer.main.get_command(server).main([model, *words, *context.args], standalone_mode=False)
