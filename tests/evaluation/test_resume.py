"""A run that is killed at any moment goes on from its journal, and ends with the same bits."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_hostile_run import Server

KILLS = 10


class Runs(Server):
    """Runs of one process each."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        # On a busy machine the test must run first, or a run ends before it looks.
        os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)

    def run(self, name: str, kill_at: int | None = None, delay: float = 0.0) -> int:
        """Return the exit code of a run: 0, or the negative number of the signal.

        It is killed `delay` seconds after its journal has `kill_at` bytes, however busy the machine is.
        """
        (child,) = self.start(name, processes=1)
        if kill_at is not None:
            deadline = time.monotonic() + 60
            while len(self.written(name)) < kill_at and time.monotonic() < deadline:
                time.sleep(0.0002)
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        (code,) = self.wait()
        return code

    def written(self, name: str) -> bytes:
        """Return the content of the journal."""
        return self.journal(name).read_bytes() if self.journal(name).exists() else b""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.process.stdin.close()  # type: ignore[union-attr]
    assert runs.process.wait(30) == 0


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(runs: Runs) -> None:
    begin = time.monotonic()
    assert runs.run("whole") == 0
    journal = runs.written("whole")
    lines = journal.count(b"\n")
    assert lines == 1 + 6 * 4, "a header, and six documents read by three methods and the control"
    step = (time.monotonic() - begin) / lines
    parts = []
    for index in range(KILLS):
        name, draw = f"killed-{index}", random.Random()
        moment = draw.randint(0, len(journal) - 1), draw.uniform(0, 2 * step)
        assert runs.run(name, *moment) in (0, -signal.SIGKILL)
        parts.append(runs.written(name).count(b"\n"))
        assert journal.startswith(runs.written(name)), "what was finished is there, the last line perhaps torn"
        assert runs.run(name) == 0, moment
        assert runs.result(name) == runs.result("whole") and runs.written(name) == journal, moment
    assert sum(0 < part < lines for part in parts) >= KILLS // 4, f"lines when it was killed, of {lines}: {parts}"


def test_a_run_that_is_killed_again_and_again_ends(runs: Runs) -> None:
    """Each attempt begins with a torn line, and is killed when it has added a few."""
    assert runs.run("again") == 0
    journal, result = runs.written("again"), runs.result("again")
    header, size = journal.index(b"\n") + 1, len(journal) // 8
    runs.journal("again").write_bytes(journal[: header - 50])
    size_at_kill, attempts = header + size, 0
    while (ended := runs.run("again", kill_at=min(size_at_kill, len(journal)))) != 0:
        assert ended == -signal.SIGKILL
        assert len(runs.written("again")) >= size_at_kill, "each gets further"
        runs.journal("again").write_bytes(runs.written("again")[:-50])
        size_at_kill, attempts = len(runs.written("again")) + size, attempts + 1
        if size_at_kill >= len(journal):
            break
    assert attempts >= 1 and runs.run("again") == 0
    assert runs.written("again") == journal and runs.result("again") == result
