"""One text over several processes; the values themselves are compared in context_parallel_job.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation.scorer import Memory, TokenScorer, token_scorer
from hf_posext.processes import shares_texts

from ..conftest import tiny_llama
from ..helpers import TWO_PROCESSES, run_python


def stand_in(processes: int, cp_size: int | None) -> SimpleNamespace:
    config = None if cp_size is None else SimpleNamespace(cp_size=cp_size)
    return SimpleNamespace(num_processes=processes, parallelism_config=config)


def test_two_processes_give_the_values_of_one() -> None:
    assert "two processes agree" in run_python(*TWO_PROCESSES, "-m", "tests.evaluation.context_parallel_job").stdout


def test_who_shares_texts() -> None:
    assert not shares_texts(None)
    assert not shares_texts(stand_in(4, None))
    assert not shares_texts(stand_in(4, 1))
    assert shares_texts(stand_in(4, 4))
    with pytest.raises(InvalidParameterError, match=r"Expected cp_size to be the number of processes \(4\), got 2"):
        shares_texts(stand_in(4, 2))


def test_chunks_and_shares_exclude_each_other() -> None:
    model = tiny_llama()
    assert type(token_scorer(model, Memory())) is TokenScorer
    with pytest.raises(InvalidParameterError, match="prefill_chunk to be left out"):
        token_scorer(model, Memory(prefill_chunk=64, accelerator=stand_in(2, 2)))
