"""Write `docs/public_model.md` from its template and `benchmarks/results/public_model.json`.

python benchmarks/public_model_page.py            # write the page, which lists missing cells
python benchmarks/public_model_page.py --check    # exit 1 if the committed page is out of date
python benchmarks/public_model_page.py --print reports/public_model.json    # print the tables of another file
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from page import markdown
from public_model import BASELINE, BEGIN_AT, CONTROL, METHODS, RESULT, SCHEMA

from hf_posext.evaluation.prompts import TASKS
from hf_posext.evaluation.rows import STRETCHES, bootstrap_interval, pooled_perplexity, share_interval

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "public_model.md.jinja"
PAGE = HERE.parent / "docs" / "public_model.md"
HELD_OUT, VALIDATION = "heldout.jsonl", "train.jsonl"
GOALS = {16_384: 4, 32_768: 2}
"""Number of held-out documents that the page promises, by length. It lists the rest as missing."""

FIRST = (
    BASELINE,
    "linear",
    "yarn",
    "self-extend",
    "dual-chunk",
    "rerope",
    "rerope+fade",
    "leaky-rerope+fade",
    "rerope(window=7680)",
)
"""Methods in the first table of README. The page has all of them."""

LACKS = "not measured"
SEED = 0


class Cells:
    """
    Cells of one dataset at one length.

    Args:
        content (`dict`): content of the result file.
        dataset (`str`): file name of the documents.
        length (`int`): length in tokens.
    """

    def __init__(self, content: dict[str, Any], dataset: str, length: int) -> None:
        self.length, self.trained = length, content["model"]["trained_length"]
        cells = [cell for cell in content["cells"] if (cell["dataset"], cell["length"]) == (dataset, length)]
        self.without_effect = [method for method, times in BEGIN_AT.items() if length <= times * self.trained]
        cells = [cell for cell in cells if cell["asked"] not in self.without_effect]
        self.cells = {(cell["document"], cell["asked"]): cell for cell in cells}
        self.documents = list(dict.fromkeys(cell["document"] for cell in cells))

    @property
    def methods(self) -> list[str]:
        """Methods of the cells: the unpatched model, the methods of `METHODS` in their order, then others."""
        listed_methods = [
            method for method in (BASELINE, *METHODS) if any((d, method) in self.cells for d in self.documents)
        ]
        further = sorted({method for _, method in self.cells} - {*listed_methods, CONTROL})
        return listed_methods + further

    def gain(
        self, method: str, documents: Sequence[str] | None = None
    ) -> tuple[float, list[float] | None, int] | None:
        """Return the gain over truncation on the second half, its interval over documents, and their number.

        `None` without documents.
        """
        pairs = [
            (self.cells[document, CONTROL], self.cells[document, method])
            for document in documents or self.documents
            if (document, CONTROL) in self.cells and (document, method) in self.cells
        ]
        if not pairs:
            return None
        saved = [control["tail_nll_sum"] - cell["tail_nll_sum"] for control, cell in pairs]
        tokens = [cell["tail_tokens"] for _, cell in pairs]
        return float(pooled_perplexity(saved, tokens)), bootstrap_interval(saved, tokens, SEED), len(pairs)

    def change(self, method: str) -> float | None:
        """Return the change of perplexity of the first `trained_length` tokens against the unpatched model."""
        stretches = STRETCHES * self.trained // self.length
        pairs = [
            (self.cells[document, method], self.cells[document, BASELINE])
            for document in self.documents
            if (document, method) in self.cells and (document, BASELINE) in self.cells
        ]
        if not pairs:
            return None
        added = [
            sum(cell["position_nll_sums"][:stretches]) - sum(base["position_nll_sums"][:stretches])
            for cell, base in pairs
        ]
        return float(pooled_perplexity(added, [self.trained - 1] * len(pairs))) - 1

    def seconds(self, method: str) -> float:
        """Return the mean CPU seconds of a cell."""
        seconds = [cell["cpu_seconds"] for (_, name), cell in self.cells.items() if name == method]
        return float(sum(seconds) / len(seconds))

    def table(self) -> str:
        """Return the table of methods: gain by document, pooled gain, and change inside the trained length."""
        lines = []
        for method in self.methods:
            single = [self.gain(method, [document]) for document in self.documents]
            pooled, change = self.gain(method), self.change(method)
            lines.append(
                (
                    f"`{method}`",
                    *(LACKS if gain is None else f"{gain[0]:.4f}" for gain in single),
                    LACKS if pooled is None else _pooled(*pooled),
                    LACKS if change is None else f"{change:+.2%}",
                    f"{self.seconds(method):.0f}" + (" with the control" if method == BASELINE else ""),
                )
            )
        shorts = [document.rpartition("_")[0].replace("_", " ") for document in self.documents]
        return markdown(("method", *shorts, "all", f"first {self.trained:,}", "CPU s"), lines)

    def first_table(self) -> str:
        """Return the table of README, the best pooled gain first."""
        lines = []
        for method in FIRST:
            pooled, change = self.gain(method), self.change(method)
            if pooled is not None and change is not None:
                inside = "" if method == BASELINE else f"{change:+.1%}".replace("%", " %")
                lines.append((pooled[0], (f"`{method}`", inside, _interval(*pooled[:2], digits=3), str(pooled[2]))))
        rows = [row for _, row in sorted(lines, reverse=True)]
        truncated = (f"truncated to {self.trained:,}", "", "1", str(len(self.documents)))
        above = sum(gain >= 1 for gain, _ in lines)
        heads = ("", f"change in the first {self.trained:,}", "gain over truncation", "novels")
        return markdown(heads, [*rows[:above], truncated, *rows[above:]])

    def summary(self) -> str:
        """Return sentences on the methods that reach truncation, and on those whose interval lies above it."""
        gains = {method: gain for method in self.methods if (gain := self.gain(method)) is not None}
        above = [f"`{method}` ({gain:.4f})" for method, (gain, _, _) in gains.items() if gain >= 1]
        reached = f"{_and(above)} reached" if above else "none reached"
        sentence = f"Of {len(gains)} methods measured here, {reached} the perplexity of truncation (gain of 1)."
        count = len(self.documents)
        if count < 4:
            few = "One novel has no interval" if count == 1 else f"An interval over {count} novels is their range"
            return f"{sentence} {few}, so this ranks nothing."
        sure = [f"`{method}`" for method, (_, interval, _) in gains.items() if interval and interval[0] > 1]
        return sentence + (
            f" Only the interval of {_and(sure)} lies above 1." if sure else " No interval lies above 1."
        )

    def without_first(self, method: str) -> str:
        """Return the gain of a method over all documents except the first, with its interval."""
        gain = self.gain(method, self.documents[1:])
        return LACKS if gain is None else _interval(*gain[:2])

    def missing(self, documents: int) -> list[str]:
        """Return lines with the methods that lack documents, by the number of missing ones."""
        lacks: dict[int, list[str]] = {}
        for method in (CONTROL, BASELINE, *(name for name in METHODS if name not in self.without_effect)):
            count = sum((document, method) in self.cells for document in self.documents)
            lacks.setdefault(max(0, documents - count), []).append(f"`{method}`")
        return [
            f"{count} of {documents} novels: {', '.join(names)}" for count, names in sorted(lacks.items()) if count
        ]


def questions_table(content: dict[str, Any]) -> str:
    """Return the table of tasks and methods: share of right answers by length, with its 95 % interval."""
    questions = content.get("questions", [])
    lengths = sorted({question["length"] for question in questions})
    cells = {(question["task"], question["asked"], question["length"]): question for question in questions}
    rows = list(dict.fromkeys((task, method) for task, method, _ in cells))
    lines = [
        (task, f"`{method}`", *(_share(cells.get((task, method, length))) for length in lengths))
        for task, method in sorted(rows, key=lambda row: list(TASKS).index(row[0]))
    ]
    return markdown(("task", "method", *(f"{length:,}" for length in lengths)), lines)


def loses(content: dict[str, Any]) -> bool:
    """Return whether the unpatched model misses a passkey inside its trained length."""
    trained = content["model"]["trained_length"]
    inside = [question for question in content.get("questions", []) if question["length"] <= trained]
    return any(
        (question["task"], question["asked"]) == ("passkey", BASELINE) and question["accuracy"] < 1
        for question in inside
    )


def _share(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return LACKS
    low, high = share_interval(cell["accuracy"], cell["trials"])
    return f"{cell['accuracy']:.0%} of {cell['trials']} [{low:.0%}, {high:.0%}]"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _pooled(gain: float, interval: list[float] | None, documents: int) -> str:
    return _interval(gain, interval) + ("" if interval is None else f" ({documents})")


def _interval(gain: float, interval: list[float] | None, digits: int = 4) -> str:
    bounds = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{gain:.{digits}f}{bounds}"


def load(path: Path) -> dict[str, Any]:
    """Load a result file of `benchmarks/public_model.py`."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise SystemExit(f"Expected schema {SCHEMA} in {path}, got {content.get('schema')}. Measure again.")
    return content


def origins(content: dict[str, Any]) -> str:
    """Return the table of runs: machine, commit, versions, and number of cells."""
    lines = []
    for number, run in enumerate(content["runs"]):
        cells = sum(
            cell_of_run["run"] == number
            for cell_of_run in [cell for table in ("cells", "answers", "questions") for cell in content.get(table, [])]
        )
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        commit = (run["commit"] or "no commit")[:7] + (" and changes" if run["dirty"] else "")
        device = run["gpu"] or f"{run['processor']}, {run['cores']} cores"
        lines.append((run["date"], commit, device, f"Python {run['python']}, {versions}", str(cells)))
    return markdown(("date", "commit", "on", "versions", "cells"), lines)


def render(path: Path = RESULT) -> str:
    content = load(path)
    held_out = {length: Cells(content, HELD_OUT, length) for length in GOALS}
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=content["model"],
        held_out=held_out,
        goals=GOALS,
        missing={length: cells.missing(GOALS[length]) for length, cells in held_out.items()},
        validation=Cells(content, VALIDATION, 16_384),
        answers=content.get("answers", []),
        loses=loses(content),
        questions=questions_table(content) if content.get("questions") else "",
        origins=origins(content),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--print", type=Path, metavar="RESULT", help="print the tables of this file instead")
    arguments = parser.parse_args()
    if arguments.print:
        content = load(arguments.print)
        for length in sorted({cell["length"] for cell in content["cells"]}):
            print(f"{length:,} tokens: gain over truncation\n{Cells(content, HELD_OUT, length).table()}\n")
        return 0
    text = render()
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"out of date: {PAGE.name}. Run python {Path(__file__).name}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
