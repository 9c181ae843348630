"""`export`, `gguf` and `serve`: a patched model for a server, and the server of transformers on one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import InvalidParameterError
from ..packages import require
from ..plan import PLAN_FILE
from .app import app
from .console import say
from .options import Device, Dtype, Lengths, TrustRemoteCode
from .runs import output_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    lengths: Lengths,
    method: SourceMethod = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a checkpoint for a server, with the command that starts it and its differences from this package.

    An adapter is merged into its base. A plan that the server cannot run is refused before anything is written.
    """
    with output_directory(output):
        from ..export import export_checkpoint

        network, tokenizer, merged = open_patched(model, method, lengths, dtype, trust_remote_code)
        serving = export_checkpoint(network, output, to, tokenizer=tokenizer, merged=merged)
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
    model: str, method: str | None, lengths: Lengths, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any] | None]:
    """Open a patched model, or patch an unpatched one. Merge an adapter, and also return its config."""
    from ..methods import as_method
    from ..patching import detect_scheme, find_patch, patch_model
    from .loading import base_of, load_config, load_model, saved_plan

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
        plan = as_method(method).plan(detect_scheme(config), **target)
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    network, tokenizer = load_model(model, dtype, "cpu", trust_remote_code)
    merged = None
    if adapters := getattr(network, "peft_config", None):
        merged = next(iter(adapters.values())).to_dict()
        network = network.merge_and_unload()
    if find_patch(network) is None:
        patch_model(network, plan, tokenizer=tokenizer)
    return network, tokenizer, merged


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Source,
    lengths: Lengths,
    method: SourceMethod = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a patched model over HTTP by `transformers serve`, remapped positions included.

    Further flags are those of `transformers serve`: --host, --port, --cb-num-blocks. Needs the extra: pip install
    'hf_posext[serve]'.
    """
    require("serve")
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    from ..patching import find_patch
    from .loading import require_device

    require_device(device)
    network, tokenizer, _ = open_patched(model, method, lengths, dtype, trust_remote_code)
    network = network.to(device).eval()
    patch = find_patch(network)
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
