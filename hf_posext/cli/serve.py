"""`serve`: the server of transformers on a patched model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ..packages import require
from .app import app
from .console import say
from .export import open_patched
from .options import TrainedLength, TrustRemoteCode


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="Patched model as saved, adapter directory, or with --method a model folder or Hub id."),
    ],
    method: Annotated[str | None, typer.Option(help="For a plain model: method, as 'rerope+fade'.")] = None,
    factor: Annotated[float | None, typer.Option(help="How many times the trained length to read.")] = None,
    target_length: Annotated[int | None, typer.Option(help="Tokens to read, instead of a factor.")] = None,
    trained_length: TrainedLength = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto: as they are.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="As torch calls it: cuda:0, mps.")] = "cpu",
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

    lengths = {"factor": factor, "target_length": target_length, "trained_length": trained_length}
    network, tokenizer, _ = open_patched(model, method, lengths, dtype, trust_remote_code)
    network = network.to(device).eval()
    patch = find_patch(network)
    assert patch is not None
    # Positions that follow the length of a text need the whole text: those requests run one after the other.
    words = [] if patch.plan.follows_rows else ["--continuous-batching"]

    class OpenModel(model_manager.ModelManager):  # type: ignore[misc]
        """The model that is open, in place of one that the server loads."""

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return network

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

    model_manager.ModelManager = OpenModel  # the server imports it when it is made
    server = typer.Typer(rich_markup_mode=None)
    server.command()(Serve)
    say(f"serving {model} ({patch.plan.describe()})")
    typer.main.get_command(server).main([model, *words, *context.args], standalone_mode=False)
