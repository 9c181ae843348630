"""The page: what can be chosen on the left, what becomes of it on the right."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from matplotlib.figure import Figure

from ..errors import PosExtError
from . import words
from .figures import frequency_figure, loss_figure, mask_figure, signal_figure
from .shelf import DOCUMENTS, Shelf
from .view import FACTOR, LARGEST_FACTOR, SHOWN, Choice, applicable, effect, first_look, look, read

logger = logging.getLogger(__name__)

DPI = 144
"""Dots per inch: 9 inches are sharp at the width that they have here, and drawn in half the time that a file takes."""

LEAST_LENGTH = 64
UNKNOWN_LENGTH = 512
"""Tokens that the slider of lengths counts from where nothing tells the trained length."""

Updates = dict[Any, Any]
"""New values by component; the others stay as they are."""


def build_page(shelf: Shelf) -> Any:
    """The page, with what happens when something is chosen; [`~hf_posext.app.server.serve`] serves it.

    Args:
        shelf ([`Shelf`]): what can be chosen.

    Returns:
        `gradio.Blocks`: not yet launched.
    """
    with gr.Blocks(title="hf-posext", analytics_enabled=False) as page:
        gr.HTML(words.TITLE, elem_id="title")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                model = gr.Dropdown(list(shelf.models), label="Model", elem_id="model")
                facts = gr.HTML(elem_id="facts")
                method = gr.Dropdown([], label="Method", info=words.METHOD, allow_custom_value=True, elem_id="method")
                factor = gr.Slider(1, LARGEST_FACTOR, FACTOR, step=0.5, label="Factor", elem_id="factor")
                length = gr.Slider(**_bounds(None), step=1, label="Length (tokens)", elem_id="length")
                trained = gr.Number(label="Trained length, if another", precision=0, minimum=2, elem_id="trained")
                about = gr.HTML(elem_id="about")
            with gr.Column(scale=8, min_width=480):
                message = gr.HTML(visible=False, elem_id="message")
                verdict = gr.HTML(elem_id="verdict")
                with gr.Tabs():
                    with gr.Tab("Signal"):
                        signal, signal_note = _figure("signal")
                    with gr.Tab("Frequencies"):
                        frequency, frequency_note = _figure("frequency")
                    with gr.Tab("Mask"):
                        mask, mask_note = _figure("mask")
                    with gr.Tab("Loss"):
                        with gr.Row():
                            told = f"Read {DOCUMENTS} texts"
                            measure = gr.Button(told, variant="primary", scale=0, min_width=180, elem_id="measure")
                        loss, loss_note = _figure("loss")

        def cleared() -> Updates:
            figures = dict.fromkeys((signal, frequency, mask, loss), gr.update(value=None, visible=False))
            return figures | dict.fromkeys((signal_note, frequency_note, mask_note, loss_note, about), "")

        def choose(name: str) -> Updates:
            found = first_look(shelf, name)
            names = applicable(found.scheme)
            return {
                message: gr.update(visible=False),
                facts: words.facts(found),
                verdict: words.verdict(found.verdict),
                method: gr.update(choices=names, value=words.first_method(names)),
                length: gr.update(**_bounds(found.trained_length)),
                trained: None,
            }

        def bound(name: str, tokens: float | None) -> Updates:
            return {length: gr.update(**_bounds(int(tokens or 0) or first_look(shelf, name).trained_length))}

        def draw(*chosen: Any) -> Updates:
            view = look(shelf, _choice(*chosen))
            return {
                **cleared(),
                message: gr.update(visible=False),
                about: words.about(view),
                verdict: words.verdict(view.found.verdict),
                **_drawn(signal, signal_note, signal_figure(view), words.signal(view)),
                **_drawn(frequency, frequency_note, frequency_figure(view), words.frequency(view)),
                **_drawn(mask, mask_note, mask_figure(view), words.mask(view)),
                loss_note: words.loss(shelf.dataset),
            }

        def read_texts(*chosen: Any) -> Updates:
            view = read(shelf, _choice(*chosen))
            return {
                message: gr.update(visible=False),
                verdict: words.verdict(view.found.verdict),
                **_drawn(loss, loss_note, loss_figure(view), words.plain(effect(view))),
            }

        def refused(told: str) -> Updates:
            return {**cleared(), message: gr.update(value=words.alert(told), visible=True)}

        inputs = [model, method, factor, length, trained]
        outputs = [message, facts, verdict, method, length, trained, about, signal, frequency, mask, loss]
        outputs += [signal_note, frequency_note, mask_note, loss_note]
        # One at a time: a patch changes the model that all of them look at.
        shared: Mapping[str, Any] = {
            "outputs": outputs,
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        one_line = functools.partial(_one_line, refused)
        drawing = {"fn": one_line(draw), "inputs": inputs, "show_progress_on": [signal, frequency, mask], **shared}
        gr.on([page.load, model.input], one_line(choose), [model], show_progress="hidden", **shared).success(**drawing)
        trained.input(one_line(bound), [model, trained], **shared).then(**drawing)
        gr.on([method.input, factor.input, length.input], trigger_mode="always_last", **drawing)
        measure.click(one_line(read_texts), inputs, show_progress="full", show_progress_on=[loss, loss_note], **shared)
    return page


def _figure(name: str) -> tuple[Any, Any]:
    """A picture and the words below it."""
    picture = gr.Plot(
        label=f"{name} figure",
        format="png",
        show_label=False,
        container=False,
        visible=False,
        elem_id=f"{name}-figure",
    )
    return picture, gr.HTML(elem_id=f"{name}-note")


def _drawn(picture: Any, note: Any, figure: Figure | None, told: str) -> Updates:
    if figure is not None:
        figure.set_dpi(DPI)
    return {picture: gr.update(value=figure, visible=figure is not None), note: told}


def _bounds(trained: int | None) -> dict[str, int]:
    """Ends and place of the slider of lengths."""
    tokens = trained or UNKNOWN_LENGTH
    return {"minimum": min(LEAST_LENGTH, tokens), "maximum": SHOWN * tokens, "value": FACTOR * tokens}


def _choice(model: str, method: str | None, factor: float, length: float, trained: float | None) -> Choice:
    return Choice(model, method or "", factor, int(length), int(trained) if trained else None)


def _one_line(refused: Callable[[str], Updates], handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """The same handler, with errors as one line on the page; of those that were not foreseen, the log tells more."""

    @functools.wraps(handler)
    def guarded(*chosen: Any) -> Updates:
        try:
            return handler(*chosen)
        except (PosExtError, OSError) as error:
            return refused(str(error))
        except Exception as error:
            logger.exception("the page could not answer")
            return refused(f"{type(error).__name__}, which was not foreseen; the terminal of hf-posext app tells more")

    return guarded
