"""Job of the tests of several processes: `torchrun --nproc_per_node 2 -m tests.evaluation.distributed_job DIR`.

Each process writes what it has found. The same functions without an accelerator are what one process finds.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_posext.errors import InvalidParameterError, PosExtError
from hf_posext.evaluation import Results, compare, evaluate_perplexity
from hf_posext.evaluation.runner import measure
from hf_posext.evaluation.tasks import Stage, Task
from hf_posext.processes import rank_of

from ..conftest import tiny_llama
from .helpers import character_tokenizer, random_texts

POISON = "?"


def plain(results: Results) -> dict[str, Any]:
    """Results without what depends on the day."""
    left_out, skipped = (results.provenance[key] for key in ("left_out", "not_applicable"))
    return {"rows": results.rows, "per_document": results.per_document, "left_out": left_out, "skipped": skipped}


def uneven(accelerator: Accelerator | None, journal: Path, model: Any = None) -> dict[str, Any]:
    """Five documents, four readings and pass keys: shares that cannot be equal."""
    documents: list[int] = []
    results = compare(
        model or tiny_llama(), character_tokenizer(), random_texts(5, 140), ["none", "linear", "yarn"],
        lengths=[48, 120, 128], factor=2.0, trained_length=32, passkey=0, journal=journal, accelerator=accelerator,
        on_method=lambda so_far: documents.append(len(so_far.rows)),
    )  # fmt: skip
    return {**plain(results), "told": documents}


def empty_shard(accelerator: Accelerator | None) -> dict[str, Any]:
    """One document, which is one unit: all processes but the first have nothing to do."""
    results = evaluate_perplexity(
        tiny_llama(), character_tokenizer(), random_texts(1, 140), [48, 128], accelerator=accelerator
    )
    return plain(results)


def failing_document(accelerator: Accelerator | None) -> dict[str, Any]:
    """One of four documents has a character on which the model breaks."""
    model, tokenizer = tiny_llama(), character_tokenizer()
    (poison,) = tokenizer(POISON)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    texts = [text.replace(POISON, " ") for text in random_texts(4, 140)]
    texts[1] = f"{texts[1][:100]}{POISON}{texts[1][101:]}"
    results = compare(
        model, tokenizer, texts, ["none", "linear"], lengths=[128], factor=2.0, passkey=2, accelerator=accelerator
    )
    return plain(results)


def asked(accelerator: Accelerator | None, journal: Path) -> dict[str, Any]:
    """Key tokens, which have to be known everywhere before the methods are measured, and retrieval."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)  # large logits, so that there are key tokens
    results = compare(
        model, character_tokenizer(), random_texts(6, 200), ["none", "linear"], lengths=[150, 190], factor=4.0,
        longppl="linear", short_length=8, retrieval=1, tasks=["passkey"], depths=[0, 1],
        journal=journal, accelerator=accelerator,
    )  # fmt: skip
    return {**plain(results), "retrieval": results.retrieval, "longppl": results.provenance["longppl"]}


def fatal(accelerator: Accelerator | None) -> str:
    """The last process meets an error that ends the run."""

    def run(task: Task) -> str | None:
        if task.document == "1":
            raise InvalidParameterError("no such thing")
        return task.document

    return error_of_two(accelerator, run)


def crash(accelerator: Accelerator | None) -> str:
    """The last process cannot even begin."""

    def enter() -> Any:
        if rank_of(accelerator) == 1:
            raise RuntimeError("no room")
        return nullcontext()

    return error_of_two(accelerator, lambda task: 1, enter)


def error_of_two(accelerator: Accelerator | None, run: Any, enter: Any = nullcontext) -> str:
    """Errors that two tasks raise."""
    try:
        tasks = [Task("nll", "x", 1.0, (64,), str(index)) for index in range(2)]
        measure([Stage("x", enter, tasks, run)], accelerator=accelerator)
    except (PosExtError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    results = {
        "processes": accelerator.num_processes,
        "fatal": fatal(accelerator),
        "crash": crash(accelerator),
        "uneven": uneven(accelerator, directory / "journal.jsonl"),
        "empty_shard": empty_shard(accelerator),
        "failing_document": failing_document(accelerator),
        "asked": asked(accelerator, directory / "asked.jsonl"),
    }
    (directory / f"{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
