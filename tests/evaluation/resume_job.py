"""Job that the test of killed runs kills: all is imported once, and each run is a fork of this process.

Reads lines of `JOURNAL RESULT`; for each it forks a run, and writes the id of its process, and then how it ended.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from hf_posext.evaluation import compare
from hf_posext.evaluation import rows as statistics

from ..conftest import tiny_llama
from .helpers import character_tokenizer, random_texts


def run(journal: str, result: str) -> None:
    model = tiny_llama()
    # A large model takes its time; this one shall not be over before anybody can kill it.
    model.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    results = compare(
        model, character_tokenizer(), random_texts(6, 140), ["none", "linear", "yarn"],
        lengths=[64, 128], factor=2.0, journal=journal,
    )  # fmt: skip
    results.provenance = {}
    results.save_json(Path(result))


def main() -> None:
    torch.set_num_threads(1)
    statistics.RESAMPLES = 99  # the intervals are not what is tested here
    with tempfile.TemporaryDirectory() as directory:
        run(f"{directory}/journal.jsonl", f"{directory}/result.json")  # what is imported on the way is imported once
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.nice(19)  # on a busy machine whoever kills it goes first, or it is over before anybody looks
            try:
                run(*line.split())
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
