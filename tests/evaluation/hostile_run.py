"""Attack on `hf-posext compare`: killed, met by a second writer, on a full disk, with its journal torn or gone.

    python -m tests.evaluation.hostile_run --kills 20 --seed 0

Each run is two processes of the command, forked from this one so that imports are paid once. Every attack must end in
the bits of an undisturbed run, or in one line and exit code 2. Prints a line for each, and exits with 1 if one did
neither. The attack on a small disk mounts a tmpfs, which needs root. Takes a quarter of an hour; `test_hostile_run.py`
has what takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_posext.cli import main as command
from hf_posext.processes import journal_files

from ..cli.helpers import MODEL, NOVELS
from .killed_job import free_port, launch

WORDS = [
    "compare", "--model", MODEL, "--dataset", NOVELS, "--methods", "none,linear,yarn", "--trained-length", 64,
    "--factor", 2, "--lengths", "64,256", "--documents", 6, "--retrieval", 1, "--tasks", "passkey", "--depths", "0.5",
]  # fmt: skip


class Run:
    """The processes of one command."""

    def __init__(self, output: Path, *words: object, processes: int = 2, limit: int = 0) -> None:
        self.output = output
        self.said = Path(tempfile.mkstemp(suffix=".txt")[1])
        port = free_port()
        self.children = [
            self._fork([*WORDS, "--output", output, *words], rank, processes, port, limit) for rank in range(processes)
        ]

    def _fork(self, words: list[Any], rank: int, processes: int, port: int, limit: int) -> int:
        child = os.fork()
        if child:
            return child
        launch(rank, processes, port)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with self.said.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = ["hf-posext", *map(str, words)]
        code = 70
        try:
            command()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def kill(self, index: int) -> None:
        os.kill(self.children[index], signal.SIGKILL)

    def wait(self, orphans: bool = False) -> list[int]:
        """Exit codes. When one process has failed the others are killed, as a launcher does."""
        codes: dict[int, int] = {}
        while len(codes) < len(self.children):
            for child in self.children:
                if child not in codes:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    if ended:
                        codes[child] = os.waitstatus_to_exitcode(status)
            if any(codes.values()) and not orphans:
                time.sleep(0.3)
                for child in self.children:
                    if child not in codes and os.waitpid(child, os.WNOHANG) == (0, 0):
                        os.kill(child, signal.SIGKILL)
                        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    codes.setdefault(child, 0)
            time.sleep(0.005)
        return [codes[child] for child in self.children]

    def lines(self) -> int:
        return sum(file.read_bytes().count(b"\n") for file in journal_files(self.output / "journal.jsonl"))

    def text(self) -> str:
        return self.said.read_text()


def bits(output: Path) -> str:
    """All that was measured, as text."""
    results = json.loads((output / "results.json").read_text())
    return json.dumps({name: results[name] for name in ("rows", "per_document", "retrieval") if name in results})


def is_one_line(text: str) -> bool:
    """One error line at the end, and no traceback."""
    lines = text.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return bool(errors) and lines[-1].startswith("error: ") and "Traceback" not in text


class Attack:
    """Runs attacks in a directory and judges their ends."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.faults = directory, 0
        undisturbed = Run(directory / "whole")
        begun = time.monotonic()
        assert undisturbed.wait() == [0, 0], undisturbed.text()
        self.seconds, self.lines, self.whole = time.monotonic() - begun, undisturbed.lines(), bits(directory / "whole")
        self.size = sum(file.stat().st_size for file in (directory / "whole").iterdir())
        print(f"undisturbed: {self.seconds:.1f} s, {self.lines} lines, {self.size} bytes", flush=True)

    def judge(self, attack: str, run: Run, codes: list[int], *, resume: bool = True) -> None:
        """Refuse an end that is neither equal bits nor one line with code 2; then go on, to equal bits."""
        text, verdicts = run.text(), []
        killed = -signal.SIGKILL in codes
        if codes == [0] * len(codes):
            verdicts.append("equal" if bits(run.output) == self.whole else "OTHER BITS")
        elif not killed or 2 in codes:
            clean = 2 in codes and set(codes) <= {0, 2, -signal.SIGKILL} and is_one_line(text)
            verdicts.append("one line" if clean else f"NOT ONE LINE {codes}")
        else:
            verdicts.append("killed")
        if resume:
            again = Run(run.output, "--resume")
            if again.wait() != [0, 0]:
                verdicts.append(f"NO RESUME: {again.text()[-300:]}")
            else:
                verdicts.append("resumed equal" if bits(run.output) == self.whole else "RESUMED TO OTHER BITS")
        bad = any(verdict != verdict.lower() for verdict in verdicts)
        self.faults += bad
        last = [line for line in text.splitlines() if line.startswith("error")][-1:]
        print(f"{'FAULT' if bad else 'ok'}  {attack}: {'; '.join(verdicts)} {last or ''}", flush=True)
        if bad:
            print(text[-2000:], flush=True)


def kills(attack: Attack, count: int, seed: int) -> None:
    draw = random.Random(seed)
    for index in range(count):
        output, moment, victim = (
            attack.directory / f"kill-{index}",
            draw.uniform(0, attack.seconds),
            draw.randint(0, 1),
        )
        run = Run(output)
        time.sleep(moment)
        run.kill(victim)
        attack.judge(f"process {victim} killed after {moment:.2f} s", run, run.wait())
        shutil.rmtree(output)


def second_writers(attack: Attack) -> None:
    for words in ([], ["--resume"], ["--resume", "--start", "100"]):
        for lines in (0, 1, attack.lines // 2, attack.lines):
            output = attack.directory / "shared"
            first = Run(output)
            while first.lines() < lines or not list(output.glob("*.lock")):
                time.sleep(0.001)
            second = Run(output, *words, processes=1)
            codes = second.wait()
            late = codes == [0] or "Expected the journal of this run" in second.text() or "holds" in second.text()
            attack.judge(
                f"second writer {words} at {lines} lines{' (late)' if late else ''}", second, codes, resume=False
            )
            attack.judge("  the first", first, first.wait(), resume=False)
            shutil.rmtree(output)


def full_disks(attack: Attack, count: int, seed: int) -> None:
    draw = random.Random(seed)
    journal = (attack.directory / "whole" / "journal.jsonl").stat().st_size
    for limit in [500, *(draw.randint(1, journal) for _ in range(count)), journal + 1, journal * 2]:
        output = attack.directory / "limit"
        run = Run(output, limit=limit)
        attack.judge(f"files of at most {limit} bytes", run, run.wait())
        shutil.rmtree(output)
    mounted = attack.directory / "disk"
    mounted.mkdir()
    pages = attack.size // 4096
    for room in sorted({1, 2, 3, 5, *(draw.randint(4, pages + 12) for _ in range(2 * count))}):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room * 4096}", "tmpfs", mounted], check=True)
        try:
            run = Run(mounted / "out")
            codes = run.wait()
            subprocess.run(["mount", "-o", f"remount,size={2**24}", mounted], check=True)
            attack.judge(f"a disk of {room} pages", run, codes)
        finally:
            subprocess.run(["umount", mounted], check=True)


def torn(attack: Attack, count: int, seed: int) -> None:
    draw = random.Random(seed)
    for index in range(count):
        output = attack.directory / "torn"
        output.mkdir()
        for file in journal_files(attack.directory / "whole" / "journal.jsonl"):
            data = file.read_bytes()
            (output / file.name).write_bytes(data[: draw.randint(0, len(data))])
        if index % 3 == 0:
            with (output / "journal-1.jsonl").open("ab") as file:
                file.write(b"\0" * 100)  # what some file systems leave after a power cut
        run = Run(output, "--resume")
        attack.judge(f"torn journals {index}", run, run.wait(), resume=False)
        shutil.rmtree(output)


def gone(attack: Attack) -> None:
    def remove(output: Path) -> None:
        shutil.rmtree(output)

    def journals(output: Path) -> None:
        for file in journal_files(output / "journal.jsonl"):
            file.unlink()

    def one_journal(output: Path) -> None:
        (output / "journal-1.jsonl").unlink(missing_ok=True)

    def as_file(output: Path) -> None:
        shutil.rmtree(output)
        output.write_text("x")

    def unlink_lock(output: Path) -> None:
        for file in output.glob("*.lock"):
            file.unlink()

    def moved(output: Path) -> None:
        output.rename(output.with_name("moved"))

    acts: list[Callable[[Path], None]] = [remove, journals, one_journal, as_file, unlink_lock, moved]
    for act in acts:
        for lines in (0, 3, attack.lines // 2, attack.lines - 1):
            output = attack.directory / "gone"
            run = Run(output)
            while run.lines() < lines or not list(output.glob("*.lock")):
                time.sleep(0.001)
            act(output)
            attack.judge(f"{act.__name__} at {lines} lines", run, run.wait(), resume=False)
            for path in (output, output.with_name("moved")):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


OTHERS = [
    ["--start", 100], ["--seed", 1], ["--lengths", "64,128"], ["--factor", 4], ["--methods", "none,yarn"],
    ["--documents", 5], ["--dtype", "bfloat16"], ["--trained-length", 128], ["--tasks", "multi-key"],
    ["--depths", "0"], ["--retrieval", 2], ["--passkey", 1], ["--protocol", "rolling"], ["--chat"],
    ["--longppl", "none"], ["--model", "examples/tiny/tiny-learned", "--methods", "none"],
    ["--dataset", "examples/data/validation.jsonl"],
]  # fmt: skip


def other_settings(attack: Attack) -> None:
    for words in OTHERS:
        output = attack.directory / "other"
        shutil.copytree(attack.directory / "whole", output)
        run = Run(output, "--resume", *words, processes=1)
        codes = run.wait()
        if codes == [0]:
            print(f"FAULT {words}: continued", flush=True)
            attack.faults += 1
        else:
            attack.judge(f"--resume {words}", run, codes, resume=False)
        assert bits(output) == attack.whole
        shutil.rmtree(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        preload = Run(Path(directory) / "preload", processes=1)
        assert preload.wait() == [0], preload.text()
        attack = Attack(Path(directory))
        attacks: dict[str, Callable[[], None]] = {
            "kills": lambda: kills(attack, arguments.kills, arguments.seed),
            "second": lambda: second_writers(attack),
            "gone": lambda: gone(attack),
            "torn": lambda: torn(attack, arguments.kills // 2, arguments.seed),
            "other": lambda: other_settings(attack),
            "full": lambda: full_disks(attack, arguments.kills // 2, arguments.seed),
        }
        for name, act in attacks.items():
            if arguments.only in name:
                act()
    print(f"{attack.faults} faults")
    sys.exit(attack.faults > 0)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    import hf_posext.cli.loading
    import hf_posext.evaluation.comparison
    import hf_posext.reporting.report  # noqa: F401

    main()
