"""`card`: the model card of a fine-tuned or extended model, from measurements before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidParameterError
from .app import app
from .console import say
from .loading import ADAPTER_FILE, saved_plan


@app.command()
def card(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Saved adapter or model, or the OUTPUT of finetune.")
    ],
    before: Annotated[Path, typer.Option(help="results.json of compare on the base, with the method none.")],
    after: Annotated[Path, typer.Option(help="results.json of evaluate on this model, measured in the same way.")],
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the adapter and its card to the Hub: user/name.")
    ] = None,
) -> None:
    """Write the model card of a fine-tuned or extended model: what it is, before and after, training, limits.

    Writes README.md, with the model-index, and before_after.png into DIRECTORY. The card contains the record of
    finetune, if there is one.
    """
    saved = _saved(directory)
    if push is not None and not (saved / ADAPTER_FILE).is_file():
        raise InvalidParameterError(f"{saved} is a whole model; without --push, and then: hf upload {push} {saved}")

    # The imports that take seconds come after the checks that need none of them.
    from ..adapters import push_to_hub
    from ..evaluation import Results
    from ..reporting import write_model_card
    from ..training.record import provenance_of

    figures = Results.load_json(before), Results.load_json(after)
    say(f"card: {write_model_card(saved, *figures, training=provenance_of(saved))}")
    if push is not None:
        say(f"pushed: {push_to_hub(saved, push)}")


def _saved(directory: Path) -> Path:
    """Return the adapter or model in a directory, which may also be the output of `finetune`."""
    for path in (directory, directory / "adapter", directory / "model"):
        if saved_plan(str(path)) is not None:
            return path
    raise InvalidParameterError(
        f"{directory} holds no adapter and no model that was saved with a patch. Pass what finetune or "
        "patch.save_pretrained wrote."
    )
