"""Two processes that are killed, that meet a second writer, or a full disk: equal bits in the end, or one line.

`python -m tests.evaluation.hostile_run` attacks the command itself, at more moments and in more ways.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_posext.processes import journal_files

from ..helpers import ROOT

KILLS = 4


class Server:
    """Runs, one at a time, in processes that can be killed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.errors = directory / f"{id(self)}.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.evaluation.killed_job"], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors.open("a"), env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, name: str, processes: int = 2, limit: int = 0) -> list[int]:
        """The ids of its processes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.errors.write_text("")
        print(self.journal(name), self.directory / f"{name}.json", processes, limit, file=self.process.stdin)
        return [int(word) for word in self.process.stdout.readline().split()]

    def wait(self) -> list[int]:
        """End of each process of the run."""
        assert self.process.stdout is not None
        return [int(word) for word in self.process.stdout.readline().split()]

    def journal(self, name: str) -> Path:
        return self.directory / f"{name}.jsonl"

    def lines(self, name: str) -> int:
        """Whole lines in all files of a journal."""
        return sum(file.read_bytes().count(b"\n") for file in journal_files(self.journal(name)))

    def until(self, name: str, lines: int) -> None:
        deadline = time.monotonic() + 60
        while self.lines(name) < lines and time.monotonic() < deadline:
            time.sleep(0.0005)

    def result(self, name: str) -> bytes:
        return (self.directory / f"{name}.json").read_bytes()

    def said(self) -> list[str]:
        """The errors of the run that has ended."""
        return [line for line in self.errors.read_text().splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    directory = tmp_path_factory.mktemp("runs")
    pair = Server(directory), Server(directory)
    yield pair
    for server in pair:
        server.process.stdin.close()  # type: ignore[union-attr]
        assert server.process.wait(30) == 0


@pytest.fixture(scope="module")
def whole(servers: tuple[Server, Server]) -> bytes:
    """Results of two processes that nothing happens to."""
    servers[0].start("whole")
    assert servers[0].wait() == [0, 0]
    assert len(journal_files(servers[0].journal("whole"))) == 2 and servers[0].lines("whole") == 2 + 6 * 4
    return servers[0].result("whole")


def test_processes_that_are_killed_go_on_to_equal_bits(servers: tuple[Server, Server], whole: bytes) -> None:
    server, _ = servers
    for index in range(KILLS):
        name, draw = f"killed-{index}", random.Random(index)
        moment, victim, delay = draw.randint(0, 24), draw.randint(0, 1), draw.uniform(0, 0.03)
        children = server.start(name)
        server.until(name, moment)
        time.sleep(delay)
        os.kill(children[victim], signal.SIGKILL)
        assert set(server.wait()) <= {0, 1, -signal.SIGKILL}, server.errors.read_text()
        before = server.lines(name)
        server.start(name, processes=1 + index % 2)
        assert set(server.wait()) == {0}, server.errors.read_text()
        assert server.result(name) == whole, (moment, victim)
        assert server.lines(name) <= before + 6 * 4 + 2, "nothing is measured twice"


def test_a_second_writer_is_refused_and_the_first_finds_equal_bits(
    servers: tuple[Server, Server], whole: bytes
) -> None:
    first, second = servers
    first.start("shared")
    first.until("shared", 4)
    second.start("shared", processes=1)
    assert second.wait() == [2]
    (line,) = second.said()
    assert "is being written by another run. Wait until it has ended" in line
    assert first.wait() == [0, 0] and first.result("shared") == whole


def test_a_worker_that_is_stopped_keeps_the_journal_until_it_ends(
    servers: tuple[Server, Server], whole: bytes
) -> None:
    first, second = servers
    children = first.start("orphan")
    first.until("orphan", 6)
    os.kill(children[1], signal.SIGSTOP)  # it lives, and will go on
    second.start("orphan", processes=1)
    assert second.wait() == [2] and "is being written by another run" in second.said()[0]
    os.kill(children[1], signal.SIGKILL)
    assert first.wait() != [0, 0]
    second.start("orphan", processes=1)
    assert second.wait() == [0], second.errors.read_text()
    assert second.result("orphan") == whole


def test_a_full_disk_ends_in_one_line_and_the_rest_is_measured_later(
    servers: tuple[Server, Server], whole: bytes
) -> None:
    server, _ = servers
    limit = server.journal("whole").stat().st_size // 2
    server.start("full", limit=limit)
    assert server.wait()[0] in (2, -signal.SIGKILL)
    assert any("can be written" in line for line in server.said()), server.errors.read_text()
    server.start("full")
    assert server.wait() == [0, 0], server.errors.read_text()
    assert server.result("full") == whole


def test_a_journal_that_is_taken_away_ends_in_one_line(servers: tuple[Server, Server], whole: bytes) -> None:
    server, _ = servers
    server.start("gone")
    server.until("gone", 6)
    for file in journal_files(server.journal("gone")):
        file.unlink()
    assert 2 in server.wait()
    assert any("was moved or deleted during the run" in line for line in server.said()), server.errors.read_text()
    server.start("gone")
    assert server.wait() == [0, 0] and server.result("gone") == whole
