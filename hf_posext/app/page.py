"""The page and its server: choices on the left, figures on the right, for this machine alone."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import gradio as gr
from matplotlib.figure import Figure
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..decode import MAX_TOKENS
from ..errors import InvalidParameterError, PosExtError
from ..reporting.signals import SHOWN as BLUE
from . import content, view

logger = logging.getLogger(__name__)

DPI = 144
"""Dots per inch: sharp at the width of the page, and drawn faster than a file for print."""

LEAST_LENGTH = 64
UNKNOWN_LENGTH = 512
"""Trained length that the slider of lengths assumes if it is unknown, in tokens."""

Updates = dict[Any, Any]
"""New values by component. Other components keep theirs."""

FONTS = ["Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "DejaVu Sans", "sans-serif"]
"""Fonts of the reader's machine. The fonts of gradio's themes would be fetched."""

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-size: 1.5rem; font-weight: 700; }
#title p { margin: 0.2em 0 0; color: #555; }
#message .alert { border-left: 4px solid #D55E00; background: #FDF1E9; color: #5A2800; padding: 10px 14px; }
#verdict .words { border-left: 4px solid #0072B2; background: #EFF6FB; color: #12303F; padding: 10px 14px;
    line-height: 1.5; }
#about a { padding: 0; margin: 0; color: #0072B2; }
#about code { font-size: 0.8rem; }
.plain { overflow-wrap: anywhere; font-size: 0.9rem; line-height: 1.45; color: #444; margin: 0 0 0.5em; }
"""

LIGHT = "() => document.body.classList.remove('dark')"
"""Script that keeps the page as white as its figures."""


class _Page(gr.Blocks):  # type: ignore[misc]
    """Page on which a tampered request with too few values has empty fields, like any other wrong value."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        inputs += [None] * (len(block_fn.inputs) - len(inputs))


def build_page(shelf: view.Shelf) -> Any:
    """Return the page with its handlers, which [`serve`] launches.

    Args:
        shelf ([`Shelf`]): models and texts.

    Returns:
        `gradio.Blocks`: the page.
    """
    with _Page(title="hf-posext", analytics_enabled=False) as page:
        gr.HTML(content.TITLE, elem_id="title")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                model = gr.Dropdown(list(shelf.models), label="Model", elem_id="model")
                facts = gr.HTML(elem_id="facts")
                method = gr.Dropdown(
                    [], label="Method", info=content.METHOD, allow_custom_value=True, elem_id="method"
                )
                factor = gr.Slider(1, view.LARGEST_FACTOR, view.FACTOR, step=0.5, label="Factor", elem_id="factor")
                length = gr.Slider(**_bounds(None), step=1, label="Length (tokens)", elem_id="length")
                trained = gr.Number(label="Trained length (tokens), if different", elem_id="trained")
                about = gr.HTML(elem_id="about")
            with gr.Column(scale=8, min_width=320):
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
                            label = f"Read {view.DOCUMENTS} texts"
                            measure = gr.Button(label, variant="primary", scale=0, min_width=180, elem_id="measure")
                        loss, loss_note = _figure("loss")

        def choose(name: Any) -> Iterator[Updates]:
            diagnosis = view.first_look(shelf, name)
            names = view.applicable(diagnosis.scheme)
            yield {
                message: gr.update(visible=False),
                facts: content.facts(diagnosis),
                verdict: content.verdict(diagnosis.verdict),
                method: gr.update(choices=names, value=content.first_method(names)),
                length: gr.update(**_bounds(diagnosis.trained_length)),
                trained: None,
            }

        def bound(name: Any, tokens: Any) -> Iterator[Updates]:
            trained_length = (
                _tokens("Trained length", tokens) if tokens else view.first_look(shelf, name).trained_length
            )
            yield {length: gr.update(**_bounds(trained_length))}

        def draw(*values: Any) -> Iterator[Updates]:
            result = view.look(shelf, _choice(*values))
            # The tab that is open when the page is comes first. A picture takes about a third of a second.
            yield {
                message: gr.update(visible=False),
                about: content.about(result),
                verdict: content.verdict(result.diagnosis.verdict),
                **_drawn(signal, signal_note, content.signal_figure(result), content.signal(result)),
                **_drawn(loss, loss_note, None, content.loss(shelf.dataset)),
            }
            yield {
                **_drawn(frequency, frequency_note, content.frequency_figure(result), content.frequency(result)),
                **_drawn(mask, mask_note, content.mask_figure(result), content.mask(result)),
            }

        def read_texts(*values: Any) -> Iterator[Updates]:
            result = view.read(shelf, _choice(*values))
            yield {
                message: gr.update(visible=False),
                verdict: content.verdict(result.diagnosis.verdict),
                **_drawn(loss, loss_note, content.loss_figure(result), content.plain(view.effect(result))),
            }

        def refused(reason: str) -> Updates:
            figures = dict.fromkeys((signal, frequency, mask, loss), gr.update(value=None, visible=False))
            texts = dict.fromkeys((signal_note, frequency_note, mask_note, loss_note, about), "")
            return {**figures, **texts, message: gr.update(value=content.alert(reason), visible=True)}

        inputs = [model, method, factor, length, trained]
        outputs = [message, facts, verdict, method, length, trained, about, signal, frequency, mask, loss]
        outputs += [signal_note, frequency_note, mask_note, loss_note]
        # One at a time: a patch changes the model that all handlers share.
        shared: Mapping[str, Any] = {
            "outputs": outputs,
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
            # Gradio would answer a value out of bounds with a red "Error" in each figure, and a traceback in the
            # terminal. The handlers check the values themselves, and say what they expected.
            "preprocess": False,
        }
        one_line = functools.partial(_one_line, refused)
        drawing = {"fn": one_line(draw), "inputs": inputs, "show_progress_on": [signal, frequency, mask], **shared}
        gr.on([page.load, model.input], one_line(choose), [model], show_progress="hidden", **shared).success(**drawing)
        trained.input(one_line(bound), [model, trained], **shared).then(**drawing)
        gr.on([method.input, factor.input, length.input], trigger_mode="always_last", **drawing)
        measure.click(one_line(read_texts), inputs, show_progress="full", show_progress_on=[loss, loss_note], **shared)
    return page


def _figure(name: str) -> tuple[Any, Any]:
    """Return a picture and the text below it."""
    picture = gr.Plot(
        label=f"{name} figure",
        format="png",
        show_label=False,
        container=False,
        visible=False,
        elem_id=f"{name}-figure",
    )
    return picture, gr.HTML(elem_id=f"{name}-note")


def _drawn(picture: Any, note: Any, figure: Figure | None, text: str) -> Updates:
    if figure is not None:
        figure.set_dpi(DPI)
    return {picture: gr.update(value=figure, visible=figure is not None), note: text}


def _bounds(trained: int | None) -> dict[str, int]:
    """Return the bounds and the value of the slider of lengths."""
    tokens = trained or UNKNOWN_LENGTH
    return {
        "minimum": min(LEAST_LENGTH, tokens),
        "maximum": view.LARGEST_LENGTH * tokens,
        "value": view.FACTOR * tokens,
    }


def _number(field: str, value: Any) -> float:
    """Return the number in a field.

    Raises:
        InvalidParameterError: the field is empty or contains something else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:  # false for NaN; integers of JSON have any size
        typed = "an empty field" if value in (None, "") else repr(value)[:40]
        raise InvalidParameterError(f"Expected a number in the field {field}, got {typed}.")
    number: float = value
    return number


def _tokens(field: str, value: Any) -> int:
    """Return the number of tokens in a field."""
    if not 1 <= _number(field, value) <= MAX_TOKENS or value != int(value):
        raise InvalidParameterError(f"Expected a whole number of tokens in the field {field}, got {value:g}.")
    return int(value)


def _choice(model: Any, method: Any, factor: Any, length: Any, trained: Any) -> view.Choice:
    if not isinstance(method, str) or not method.strip():
        raise InvalidParameterError("Expected a method, got an empty field. Choose one, or type one such as yarn.")
    trained_length = _tokens("Trained length", trained) if trained else None
    return view.Choice(model, method, _number("Factor", factor), _tokens("Length", length), trained_length)


def _one_line(
    refused: Callable[[str], Updates], handler: Callable[..., Iterator[Updates]]
) -> Callable[..., Iterator[Updates]]:
    """Wrap a handler so that errors become one line on the page. Unforeseen ones are logged as well."""

    @functools.wraps(handler)
    def guarded(*values: Any) -> Iterator[Updates]:
        try:
            yield from handler(*values)
        except (PosExtError, OSError) as error:
            yield refused(str(error))
        except Exception as error:
            logger.exception("the page could not answer")
            yield refused(f"Unforeseen {type(error).__name__}. The terminal of hf-posext app shows more.")

    return guarded


def theme() -> Any:
    """Return the plainest theme of gradio, without fonts to fetch."""
    plain = gr.themes.Base(primary_hue="sky", neutral_hue="slate", font=FONTS, font_mono=["monospace"])
    return plain.set(
        color_accent=BLUE,
        slider_color=BLUE,
        button_primary_background_fill=BLUE,
        button_primary_background_fill_hover="#005A8C",
    )


HOST = "127.0.0.1"
"""Loopback address, which no other machine reaches."""

NAMES = (HOST, "localhost")
"""Host names that are answered. Another name that resolves to this machine (DNS rebinding) is refused."""

PATHS = ("/assets/", "/static/", "/theme.css", "/favicon.ico", "/gradio_api/queue/", "/gradio_api/startup-events")
"""Paths that the page needs. Gradio's other routes (files, uploads, proxies) answer 404."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'"
)
"""Content security policy: the browser fetches nothing from elsewhere."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Door:
    """ASGI middleware that answers 404 except for the paths of the page."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == "/" or scope["path"].startswith(PATHS):

            async def guarded(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await self.app(scope, receive, guarded)
        else:
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not found"})


def serve(shelf: view.Shelf, port: int, opened: Callable[[str], None]) -> None:
    """Serve the page until interrupted.

    Args:
        shelf ([`Shelf`]): models and texts.
        port (`int`): port of the loopback address.
        opened (`Callable`): called with the address once the page answers.

    Raises:
        OSError: the port is taken.
    """
    with suppress(PosExtError, OSError):  # a model that cannot be opened is an error on the page
        shelf.open(next(iter(shelf.models)))  # now, so that the first figure takes no longer than the others
    page = build_page(shelf)
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=list(NAMES)), Middleware(Door)]
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        allowed_paths=[],
        app_kwargs={"middleware": guards},
        theme=theme(),
        css=CSS,
        js=LIGHT,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    try:
        opened(address)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
