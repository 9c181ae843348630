"""Job whose runs are killed by tests: all is imported once, and each process of a run is a fork of this one.

Reads lines of `JOURNAL RESULT PROCESSES LIMIT`. For each it forks the processes of a run, writes their ids, and then
the exit code of each. LIMIT is the largest size of a file in bytes, like on a full disk, or 0.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_posext.errors import PosExtError
from hf_posext.evaluation import compare
from hf_posext.evaluation import rows as statistics

from ..conftest import tiny_llama
from .helpers import character_tokenizer, random_texts


def run(journal: str, result: str, processes: int) -> None:
    accelerator = Accelerator(cpu=True) if processes > 1 else None
    model = tiny_llama()
    # A large model takes its time. This one must not end before a test can kill it.
    model.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    results = compare(
        model, character_tokenizer(), random_texts(6, 140), ["none", "linear", "yarn"],
        lengths=[64, 128], factor=2.0, journal=journal, accelerator=accelerator,
    )  # fmt: skip
    results.provenance = {}
    if accelerator is None or accelerator.is_main_process:
        results.save_json(Path(result))
    if accelerator is not None:
        accelerator.end_training()


def launch(rank: int, processes: int, port: int) -> None:
    """Set the variables by which torchrun tells a process its place among several; nothing for a single one."""
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # or accelerate sets it, with a warning behind an error line


def fork(rank: int, port: int, journal: str, result: str, processes: int, limit: int) -> int:
    """The id of a process of the run."""
    child = os.fork()
    if child:
        return child
    launch(rank, processes, port)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(journal, result, processes)
    except PosExtError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    torch.set_num_threads(1)
    statistics.RESAMPLES = 99  # the intervals are not what is tested here
    with tempfile.TemporaryDirectory() as directory:
        run(f"{directory}/journal.jsonl", f"{directory}/result.json", 1)  # what is imported is imported once
    for line in sys.stdin:
        journal, result, processes, limit = line.split()
        port = free_port()
        children = [fork(rank, port, journal, result, int(processes), int(limit)) for rank in range(int(processes))]
        print(*children, flush=True)
        ended: dict[int, int] = {}
        while len(ended) < len(children):
            child, status = os.wait()
            ended[child] = os.waitstatus_to_exitcode(status)
            for sibling in children:  # as a launcher does
                if ended[child] and sibling not in ended:
                    os.kill(sibling, signal.SIGKILL)
        print(*(ended[child] for child in children), flush=True)


if __name__ == "__main__":
    main()
