"""The journal of a run: what is kept of one that ends at any moment, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from hf_posext.errors import JournalError
from hf_posext.evaluation.runner import RunJournal
from hf_posext.evaluation.setup import weights_fingerprint
from hf_posext.evaluation.tasks import Task, key_text
from hf_posext.processes import journal_files

from ..conftest import tiny_llama

CONFIGURATION = {"model": "tiny", "lengths": [64, 128], "versions": {"torch": "2.13"}}
ENTRIES: list[tuple[Task, Any]] = [
    (Task("nll", "yarn", 8.0, (64, 128), f"book {i} é\n"), [{"nll_sum": i / 7, "positions": None}]) for i in range(4)
]


def write(path: Path, entries: list[Any] = ENTRIES, rank: int = 0) -> None:
    with RunJournal(path, CONFIGURATION, rank) as journal:
        for task, value in entries:
            journal[task] = value


def finished(path: Path) -> dict[str, Any]:
    return RunJournal(path, CONFIGURATION).values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "journal.jsonl"


def test_what_was_written_is_read_to_the_bit(path: Path) -> None:
    write(path)
    assert finished(path) == {key_text(key): value for key, value in ENTRIES}
    with RunJournal(path, CONFIGURATION) as journal:
        assert [journal[task] for task, _ in ENTRIES] == [value for _, value in ENTRIES]
        assert Task("nll", "yarn", 8.0, (64,), "book 0 é\n") not in journal
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"schema": 3, "configuration": CONFIGURATION}
    assert [list(line) for line in lines] == [["task", "value"]] * 4


def test_each_line_is_on_the_disk_before_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves what the system still has in memory; a machine that is, does not."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert synced == [sum(map(len, lines[: count + 1])) for count in range(5)]


def test_nothing_is_written_before_something_is_finished(path: Path) -> None:
    write(path, [])
    assert not path.parent.exists() and finished(path) == {}


def test_each_process_writes_a_file_of_its_own_and_reads_all(path: Path) -> None:
    write(path, ENTRIES[:1])
    write(path, ENTRIES[1:2], rank=1)
    write(path, ENTRIES[2:3], rank=12)
    (path.parent / "journal-old.jsonl").write_text("not of the run")
    assert sorted(file.name for file in journal_files(path)) == [
        "journal-1.jsonl",
        "journal-12.jsonl",
        "journal.jsonl",
    ]
    assert len(finished(path)) == 3
    assert len(RunJournal(path, CONFIGURATION, rank=5).values) == 3


def test_a_file_cut_off_anywhere_loses_its_last_line_at_most(path: Path) -> None:
    write(path)
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        count = max(0, data[:size].count(b"\n") - 1)
        assert len(finished(path)) == count, size
        if size % 7 == 0:  # each line goes to the disk, which takes its time
            write(path, ENTRIES[count:])
            assert path.read_bytes() == data, f"cut at {size}, it must end as if it had never been"


def test_a_corrupt_line_is_refused_by_its_number(path: Path) -> None:
    write(path)
    intact = path.read_text().splitlines()
    for number, line in [(1, "{"), (3, '{"task": ["nll"'), (4, "\0\0"), (5, '["task", "value"]'), (2, '{"task": 1}')]:
        lines = [*intact]
        lines[number - 1] = line
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(JournalError, match=rf"Expected a finished task in line {number} of .*Delete that line"):
            finished(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(JournalError, match="Expected a finished task in line 1"):
        finished(path)


def test_a_journal_of_another_configuration_is_refused_with_what_differs(path: Path) -> None:
    write(path)
    before = path.read_bytes()
    changed: list[tuple[dict[str, Any], str]] = [
        ({"model": "other"}, "model is tiny there and other here"),
        ({"lengths": [64, 256]}, "lengths.1 is 128 there and 256 here"),
        ({"lengths": [64]}, r"lengths is \[64, 128\] there and \[64\] here"),
        ({"versions": {"torch": "2.14"}}, "versions.torch is 2.13 there and 2.14 here"),
        ({"seed": 1}, "seed is None there and 1 here"),
    ]
    for change, message in changed:
        with pytest.raises(JournalError, match=f"that of another run in .*: {message}. Pass another output"):
            RunJournal(path, {**CONFIGURATION, **change})
    path.write_text(path.read_text().replace('"schema": 3', '"schema": 1'))
    with pytest.raises(JournalError, match="schema is 1 there and 3 here"):
        finished(path)
    path.write_bytes(before)
    assert len(finished(path)) == 4


@pytest.fixture
def limit_of_files() -> Iterator[Any]:
    """Sets how large a file may get: as on a full disk, a write takes what fits and the next one fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_what_was_finished(path: Path, limit_of_files: Any) -> None:
    write(path)
    data = path.read_bytes()
    path.unlink()
    limit_of_files(len(data) - 10)
    with pytest.raises(JournalError, match=r"written, got .*journal\.jsonl: File too large. .* --resume") as caught:
        write(path)
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == data[:-10] and len(finished(path)) == 3
    limit_of_files(resource.RLIM_INFINITY)
    write(path, ENTRIES[3:])
    assert path.read_bytes() == data


@pytest.mark.parametrize("act", ["delete", "move", "replace"])
def test_a_journal_that_is_taken_away_ends_the_run(path: Path, act: str) -> None:
    """Finished tasks would go nowhere, and another run may have begun a journal in its place."""
    with RunJournal(path, CONFIGURATION) as journal:
        journal[ENTRIES[0][0]] = ENTRIES[0][1]
        if act == "move":
            path.parent.rename(path.parent.with_name("elsewhere"))
        else:
            shutil.rmtree(path.parent)
        if act == "replace":
            write(path, ENTRIES[:1])
        with pytest.raises(JournalError, match=r"journal\.jsonl, got none: it was moved or deleted during the run"):
            journal[ENTRIES[1][0]] = ENTRIES[1][1]


def test_a_fingerprint_notices_all_that_a_model_computes_with() -> None:
    model = tiny_llama()
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny_llama()) == before
    flat = model.model.layers[1].mlp.up_proj.weight.data.view(-1)
    value = flat[7].item()
    flat[7] = value + 1.0  # between the samples
    assert weights_fingerprint(model) != before
    flat[7] = value
    model.model.layers[0].input_layernorm.variance_epsilon = 1e-3
    assert weights_fingerprint(model) != before
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    before = weights_fingerprint(adapted)
    adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 3.0
    assert weights_fingerprint(adapted) != before


def test_a_fingerprint_depends_on_the_active_adapter_and_not_on_the_mode() -> None:
    """Each adapter gives other numbers, though all weights of the model are the same."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config, adapter_name="first")
    model.add_adapter("second", config)
    prints = {weights_fingerprint(model)}
    model.set_adapter("second")
    prints.add(weights_fingerprint(model))
    with model.disable_adapter():
        prints.add(weights_fingerprint(model))
    assert len(prints) == 3
    assert weights_fingerprint(model.eval()) in prints and weights_fingerprint(model.train()) in prints


def test_a_journal_that_cannot_be_read_is_an_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(JournalError, match="that can be read, got .*: Is a directory. Pass another --output"):
        finished(path)
