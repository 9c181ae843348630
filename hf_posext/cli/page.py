"""`app`: a page to play with, on this machine alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..packages import require
from .app import app
from .console import say
from .options import TrustRemoteCode


@app.command("app")
def page(
    model: Annotated[
        list[Path] | None, typer.Option(help="Folder of a model to offer beside the shipped ones; may be repeated.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Texts on this machine, as of compare; the shipped novels if not given.")
    ] = None,
    start: Annotated[
        int | None, typer.Option(min=0, help="Tokens to leave out of each text; 2000 of the shipped novels.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1; no other machine reaches it.")] = 7860,
) -> None:
    """Open a page to play with: a model, a method, a factor, and what becomes of positions and of the loss.

    Needs the extra: pip install 'hf_posext[app]'. Nothing is fetched, and nothing leaves this machine.
    """
    require("app")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which nothing has done yet
    from ..app import make_shelf
    from ..app.server import serve
    from .loading import load_model

    shelf = make_shelf(
        model or [], dataset, start, lambda folder: load_model(folder, "float32", "cpu", trust_remote_code)
    )
    serve(shelf, port, lambda address: say(f"the page is at {address} (Ctrl+C ends it)"))
