"""Requests that pass the door of the page's server. `test_browser.py` covers the rest of it."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

pytestmark = pytest.mark.browser  # needs the extra app


def answer(path: str) -> list[MutableMapping[str, Any]]:
    """Return the messages for a path, from an application that answers everything."""
    from hf_posext.app.page import Door

    sent: list[MutableMapping[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": b"inside"})

    async def keep(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def nothing() -> MutableMapping[str, Any]:
        return {}

    asyncio.run(Door(application)({"type": "http", "path": path}, nothing, keep))
    return sent


@pytest.mark.parametrize("path", ["/", "/assets/index.js", "/theme.css", "/gradio_api/queue/join"])
def test_what_the_page_asks_for_passes_and_tells_the_browser_to_stay(path: str) -> None:
    start, body = answer(path)
    headers = dict(start["headers"])
    assert (start["status"], body["body"], headers[b"x-own"]) == (200, b"inside", b"1")
    assert headers[b"content-security-policy"].startswith(b"default-src 'self';")
    assert b"http" not in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=https://example.org/",
        "/gradio_api/upload",
        "/gradio_api/run/predict",
        "/file=/etc/passwd",
        "/docs",
        "//",
    ],
)
def test_nothing_else_does(path: str) -> None:
    start, body = answer(path)
    assert (start["status"], body["body"]) == (404, b"not found")
