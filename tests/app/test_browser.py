"""The page in a real Chromium: every figure by clicking, errors in one line, and not a byte from anywhere else."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil
import pytest

from ..conftest import EXAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

SECONDS = 120
"""Time that anything on the page may take before the test gives up; nothing here takes a tenth of it."""

WATCH = """
import os, socket
connect = socket.socket.connect

def watched(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(address, file=file)
    return connect(self, address)

socket.socket.connect = watched
"""
"""A sitecustomize.py that writes down where the process connects to beyond this machine."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the screenshots, for a person to look at."""
    folder = os.environ.get("APP_SCREENSHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of the page, in an environment that tells gradio to be open to all."""
    watch = tmp_path_factory.mktemp("watch")
    (watch / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    connections = watch / "connections.txt"
    connections.touch()
    path = os.pathsep.join(filter(None, (str(watch), str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "CONNECTIONS": str(connections)}
    environment |= {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        environment.pop(offline, None)  # the page shall not need to be told
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hf_posext", "app", "--port", str(port)]
    with subprocess.Popen(command, env=environment, cwd=watch, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line == f"the page is at http://127.0.0.1:{port}/ (Ctrl+C ends it)\n"
            listening = [entry for entry in psutil.Process(server.pid).net_connections() if entry.status == "LISTEN"]
            assert {entry.laddr.ip for entry in listening} == {"127.0.0.1"}
            yield f"http://127.0.0.1:{port}/", psutil.Process(server.pid)
            server.send_signal(signal.SIGINT)
            assert server.wait(SECONDS) == 130
        finally:
            server.kill()  # Ctrl+C is ignored where the tests run in the background of a shell
    assert connections.read_text(encoding="utf-8") == ""


@pytest.fixture(scope="module")
def address(server: tuple[str, psutil.Process]) -> str:
    return server[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    executable = next(
        path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
    )
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])  # root has none
        yield opened
        opened.close()


@pytest.fixture
def page(address: str, browser: Browser) -> Iterator[Page]:
    """The page, opened; fails if it asked anything of another machine."""
    requests: list[str] = []
    opened = browser.new_page(viewport={"width": 1360, "height": 860})
    opened.set_default_timeout(1000 * SECONDS)
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#signal-figure img")
    yield opened
    opened.close()
    assert requests and [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def choose(page: Page, name: str, value: str) -> None:
    """In a list, by clicking."""
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def type_in(page: Page, name: str, value: str) -> None:
    """Into a field, as a person does."""
    field = page.locator(f"#{name} input:not([type=range])")
    field.fill(value)
    field.press("Enter")
    field.blur()


def drawn(page: Page, figure: str) -> str:
    """The picture that is shown, once the page is done."""
    picture = page.locator(f"#{figure}-figure img")
    picture.wait_for()
    source = picture.get_attribute("src")
    assert source and source.startswith("data:image/png;base64,")
    return source


def changed(page: Page, figure: str, before: str) -> str:
    """The picture after the next one has come."""
    page.wait_for_function(
        "([name, before]) => { const found = document.querySelector(`#${name}-figure img`); "
        "return found && found.src !== before; }",
        arg=[figure, before],
    )
    return drawn(page, figure)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_a_model_a_method_and_a_factor_are_seen_in_every_figure(page: Page, pictures: Path) -> None:
    assert "16 of 32 rotary pairs" in page.locator("#verdict").inner_text()
    first = drawn(page, "signal")
    page.screenshot(path=pictures / "signal.png")
    choose(page, "method", "yarn")
    second = changed(page, "signal", first)
    type_in(page, "factor", "8")
    third = changed(page, "signal", second)
    assert "yarn: 512 → 4096 tokens (x8)" in page.locator("#about").inner_text()
    tab(page, "Frequencies")
    drawn(page, "frequency")
    page.screenshot(path=pictures / "frequencies.png")
    tab(page, "Mask")
    assert "yarn leaves every pair of tokens at its own distance" in page.locator("#mask-note").inner_text()
    type_in(page, "method", "dual-chunk(chunk=384, local=128)")
    drawn(page, "mask")
    page.screenshot(path=pictures / "mask.png")
    tab(page, "Signal")
    changed(page, "signal", third)


def test_the_loss_is_measured_before_and_after(page: Page, pictures: Path) -> None:
    before = drawn(page, "signal")
    type_in(page, "length", "1024")
    changed(page, "signal", before)
    tab(page, "Loss")
    assert "first 2 texts of heldout.jsonl" in page.locator("#loss-note").inner_text()
    page.locator("#measure").click()
    drawn(page, "loss")
    assert "on 2 documents the loss rises by" in page.locator("#verdict").inner_text()
    note = page.locator("#loss-note").inner_text()
    losses = re.search(
        r"Past token 512 the loss is ([\d.]+) nats per token as it is and ([\d.]+) with self-extend", note
    )
    assert losses and float(losses[1]) > float(losses[2]) + 0.5
    assert re.search(r"self-extend has a gain of [\d.]+ over truncating the input to 512 tokens", note)
    page.screenshot(path=pictures / "loss.png")
    type_in(page, "factor", "3")  # what was measured is of another choice now
    page.locator("#loss-figure img").wait_for(state="detached")
    assert "documents" not in page.locator("#verdict").inner_text()


def test_the_first_figure_costs_less_than_three_seconds(server: tuple[str, psutil.Process], browser: Browser) -> None:
    """Seconds of the server's processor, from the request to the picture: a loaded machine has the same."""
    address, process = server
    before = sum(process.cpu_times()[:2])
    opened = browser.new_page()
    opened.set_default_timeout(1000 * SECONDS)
    opened.goto(address)
    opened.wait_for_selector("#signal-figure img")
    assert sum(process.cpu_times()[:2]) - before < 3
    opened.close()


def test_another_model_brings_its_own_methods(page: Page, pictures: Path) -> None:
    picture = drawn(page, "signal")
    for model, positions, method in (
        ("tiny-learned", "Learned positions. No generalization", "table-linear"),
        ("tiny-alibi", "ALiBi. Extrapolation", "alibi-linear"),
    ):
        choose(page, "model", model)
        picture = changed(page, "signal", picture)
        assert page.locator("#facts").inner_text().startswith(positions)
        assert page.locator("#method input").input_value() == method
        page.screenshot(path=pictures / f"{model}.png")
    choose(page, "method", "alibi-ntk")
    changed(page, "signal", picture)
    tab(page, "Frequencies")
    assert "tiny-alibi has ALiBi, without frequencies" in page.locator("#frequency-note").inner_text()


def test_what_cannot_be_is_told_in_one_line_and_can_be_taken_back(page: Page, pictures: Path) -> None:
    for method, message in (
        ("yarm", "did you mean 'yarn'"),
        ("table-linear", "table-linear extends learned positions"),
        ("yarn(beta_fast=0)", "Expected 0 < beta_slow < beta_fast"),
    ):
        type_in(page, "method", method)
        alert = page.get_by_role("alert").filter(has_text=message)
        alert.wait_for()
        assert "\n" not in alert.inner_text() and "Traceback" not in page.content()
        assert page.locator("#signal-figure img").count() == 0
        page.screenshot(path=pictures / "error.png")
    type_in(page, "method", "yarn")
    drawn(page, "signal")
    assert page.get_by_role("alert").count() == 0


def test_a_phone_shows_the_whole_page_without_scrolling_sideways(
    address: str, browser: Browser, pictures: Path
) -> None:
    phone = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    phone.set_default_timeout(1000 * SECONDS)
    phone.goto(address)
    drawn(phone, "signal")
    for name, part in (("Signal", "signal"), ("Frequencies", "frequency"), ("Mask", "mask")):
        phone.get_by_role("tab", name=name, exact=True).click()
        picture = phone.locator(f"#{part}-figure img")
        picture.wait_for()
        box = picture.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        phone.screenshot(path=pictures / f"phone-{part}.png", full_page=True)
    phone.close()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", "9000", "Expected a length of at most 4096 tokens (8 times the trained length), got 9000."),
        ("length", "", "Expected a number in the field Length, got an empty field."),
        ("factor", "99", "Expected a factor of 1 to 16, got 99."),
        ("factor", "", "Expected a number in the field Factor, got an empty field."),
        ("trained", "-4", "Expected a whole number of tokens in the field Trained length, got -4."),
        ("trained", "2.5", "Expected a whole number of tokens in the field Trained length, got 2.5."),
    ],
)
def test_a_value_out_of_bounds_is_one_sentence(page: Page, field: str, value: str, message: str) -> None:
    drawn(page, "signal")
    type_in(page, field, value)
    alert = page.get_by_role("alert").filter(has_text=message)
    alert.wait_for()
    assert alert.inner_text() == message and page.locator("#signal-figure img").count() == 0
    assert page.get_by_text("Error", exact=True).count() == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["tiny-rope"], "yarn", 4, 2048, None], "Expected one of the models tiny-rope"),
        (["tiny-rope", {"a": 1}, 4, 2048, None], "Expected a method"),
        (["tiny-rope", "yarn", "x" * 99, 2048, None], "Expected a number in the field Factor, got"),
        (["tiny-rope", "yarn", 4, 1e300, None], "Expected"),
        (["tiny-rope", "yarn", 4, True, None], "Expected a number in the field Length, got True"),
        (["tiny-rope"], "Expected a method"),
        ([], "Expected a method"),
        (["tiny-rope", "yarn", 10**400, 2048, None], "Expected a number in the field Factor, got 1000"),
        (["tiny-rope", "yarn", float("nan"), 2048, None], "Expected a number in the field Factor, got nan"),
        (["tiny-rope", "yarn", 4, -(10**400), None], "Expected a number in the field Length, got -1000"),
        (["tiny-rope", "yarn", 4, 2048, [512]], "Expected a number in the field Trained length, got [512]"),
        (["../tiny-rope", "yarn", 4, 2048, None], "Expected one of the models tiny-rope"),
        ([None, "yarn", 4, 2048, None], "Expected one of the models tiny-rope"),
        (["tiny-rope", "yarn(" * 1000, 4, 2048, None], "cannot read the parameters of"),
    ],
)
def test_a_tampered_request_is_one_sentence(values: list[Any], message: str) -> None:
    """As the server answers it: gradio's own checks raise nothing, and the handler says what it expected."""
    from hf_posext.app import make_shelf
    from hf_posext.app.page import build_page
    from hf_posext.cli.loading import load_model

    page = build_page(make_shelf([], None, None, lambda folder: load_model(folder, "float32", "cpu")))
    draw = next(function for function in page.fns.values() if function.name == "draw")
    with ThreadPoolExecutor() as other_thread:  # the event loop of this one is Playwright's
        answer = other_thread.submit(asyncio.run, page.process_api(draw, list(values))).result()
    (alert,) = [
        update for update in answer["data"] if isinstance(update, dict) and "alert" in str(update.get("value"))
    ]
    assert message in alert["value"]


def status(address: str, path: str, data: bytes | None = None, **headers: str) -> int:
    request = Request(address + path, data=data, headers=headers)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_no_file_is_served_even_where_gradio_was_told_to(address: str) -> None:
    """The server of these tests runs with GRADIO_ALLOWED_PATHS=/."""
    novels, weights = EXAMPLES / "data" / "heldout.jsonl", EXAMPLES / "tiny" / "tiny-rope" / "model.safetensors"
    files = ("/etc/passwd", novels, weights, EXAMPLES.parent / "pyproject.toml", "https://example.org/")
    for way in ("file=", "file/", "proxy=", "stream/"):
        assert {status(address, f"gradio_api/{way}{name}") for name in files} == {404}
    assert status(address, "static/../../../../../../../etc/passwd") in (403, 404)
    assert status(address, "gradio_api/upload", data=b"x") == 404
    assert status(address, "") == 200


def test_an_error_that_was_not_foreseen_is_one_line_too(caplog: pytest.LogCaptureFixture) -> None:
    from hf_posext.app.page import _one_line

    def broken() -> Iterator[dict[str, str]]:
        yield {"message": ""}
        raise ZeroDivisionError("of the code")

    assert list(_one_line(lambda message: {"message": message}, broken)()) == [
        {"message": ""},
        {"message": "Unforeseen ZeroDivisionError. The terminal of hf-posext app shows more."},
    ]
    assert "of the code" in caplog.text


def test_a_page_of_another_name_gets_nothing(address: str) -> None:
    assert status(address, "", Host="example.org") == 400
    port = address.rstrip("/").rpartition(":")[2]
    assert status(address, "", Host=f"localhost:{port}") == 200
