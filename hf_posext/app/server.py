"""Server of the page: this machine alone, and nothing but the page."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from ..errors import PosExtError
from ..packages import require
from .view import Shelf

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


def serve(shelf: Shelf, port: int, opened: Callable[[str], None]) -> None:
    """Serve the page until interrupted.

    Args:
        shelf ([`Shelf`]): models and texts.
        port (`int`): port of the loopback address.
        opened (`Callable`): called with the address once the page answers.

    Raises:
        MissingExtraError: gradio is not installed.
        OSError: the port is taken.
    """
    require("app")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .page import CSS, LIGHT, build_page, theme

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
