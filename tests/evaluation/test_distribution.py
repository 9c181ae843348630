"""Two processes that really ran: the same bits as one, whatever happens to one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import tiny_llama
from ..helpers import TWO_PROCESSES, run_python
from . import distributed_job as job


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of what each of two processes has measured."""
    directory = tmp_path_factory.mktemp("two")
    run_python(*TWO_PROCESSES, "-m", "tests.evaluation.distributed_job", directory, ACCELERATE_USE_CPU="true")
    return directory


@pytest.fixture(scope="module")
def outcomes(two: Path) -> list[dict[str, Any]]:
    return [json.loads((two / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_really_ran(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["processes"] for outcome in outcomes] == [2, 2]


def test_rows_are_the_same_bits_on_one_and_on_two_processes(
    two: Path, outcomes: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = job.uneven(None, tmp_path / "journal.jsonl")
    assert alone.pop("told") == [3, 6, 9], "one process tells after each method"
    for outcome in outcomes:
        assert outcome["uneven"].pop("told") == [9], "two tell at the end"
        assert outcome["uneven"] == alone
    assert len(alone["rows"]) == 9 and len(alone["per_document"]) == 4 * 5 * 3
    keys = [
        [json.dumps(json.loads(line)["task"]) for line in file.read_text().splitlines()[1:]]
        for file in (two / "journal.jsonl", two / "journal-1.jsonl")
    ]
    assert len({*keys[0], *keys[1]}) == len(keys[0]) + len(keys[1]) == 4 * 5, "each document was read once"
    assert min(map(len, keys)) >= 5, "and none of the processes was idle"


def test_key_tokens_and_retrieval_are_the_same_bits_too(
    two: Path, outcomes: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = json.loads(json.dumps(job.asked(None, tmp_path / "journal.jsonl")))
    assert [outcome["asked"] for outcome in outcomes] == [alone, alone]
    assert alone["rows"][-1]["key_tokens"] > 0 and len(alone["retrieval"]) == 2 * 2 * 2
    kinds = [
        {json.loads(line)["task"]["kind"] for line in file.read_text().splitlines()[1:]}
        for file in (two / "asked.jsonl", two / "asked-1.jsonl")
    ]
    assert kinds == [{"keys", "nll", "retrieval"}] * 2, "each process did some of each"


def test_one_process_goes_on_from_the_journal_of_two(two: Path, outcomes: list[dict[str, Any]]) -> None:
    model = tiny_llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("everything is in the journals"))
    again = job.uneven(None, two / "journal.jsonl", model)
    assert again["rows"] == outcomes[0]["uneven"]["rows"]


@pytest.mark.parametrize("scenario", [job.empty_shard, job.failing_document])
def test_shares_that_are_empty_or_fail_make_no_difference(
    scenario: Callable[[None], dict[str, Any]], outcomes: list[dict[str, Any]]
) -> None:
    alone = json.loads(json.dumps(scenario(None)))
    assert [outcome[scenario.__name__] for outcome in outcomes] == [alone] * 2


def test_a_document_that_fails_on_one_process_is_left_out_with_its_reason(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        (entry,) = outcome["failing_document"]["left_out"]
        assert entry["document"] == "1" and entry["tokens"] == 140
        assert entry["reason"].startswith("truncated: ") and "document '1'" in entry["reason"]
        assert {row["documents"] for row in outcome["failing_document"]["rows"]} == {3}


def test_an_error_of_one_process_ends_all_of_them(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["fatal"] for outcome in outcomes] == ["InvalidParameterError: no such thing"] * 2
    assert [outcome["crash"] for outcome in outcomes] == [
        "EvaluationError: process 1 failed: RuntimeError: no room",
        "RuntimeError: no room",
    ]
