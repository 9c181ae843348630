"""One text over several processes; the values themselves are compared in context_parallel_job.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation.parallel import shares_texts, token_scorer
from hf_posext.evaluation.scorer import Memory, TokenScorer

from ..conftest import tiny_llama


def stand_in(processes: int, cp_size: int | None) -> SimpleNamespace:
    config = None if cp_size is None else SimpleNamespace(cp_size=cp_size)
    return SimpleNamespace(num_processes=processes, parallelism_config=config)


def test_two_processes_give_the_values_of_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [*command, "-m", "tests.evaluation.context_parallel_job"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "two processes agree" in process.stdout


def test_who_shares_texts() -> None:
    assert not shares_texts(None)
    assert not shares_texts(stand_in(4, None))
    assert not shares_texts(stand_in(4, 1))
    assert shares_texts(stand_in(4, 4))
    with pytest.raises(InvalidParameterError, match="cp_size is 2 and there are 4 processes"):
        shares_texts(stand_in(4, 2))


def test_chunks_and_shares_exclude_each_other() -> None:
    model = tiny_llama()
    assert type(token_scorer(model, Memory())) is TokenScorer
    with pytest.raises(InvalidParameterError, match="Leave prefill_chunk out"):
        token_scorer(model, Memory(prefill_chunk=64, accelerator=stand_in(2, 2)))
