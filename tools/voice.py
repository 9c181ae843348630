"""Count the mechanical part of the voice: openings of docstrings, and phrases that a native writer would not use.

Openings are counted in every module of the repository; phrases in the package, its scripts and its pages; in the
package also errors that join their advice by a semicolon. Each count has a budget in `tools/voice.json`. A count above
its budget fails. `--update` lowers budgets to the counts and never raises one. `--list [KIND]` shows the places.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGET = Path(__file__).with_suffix(".json")

OPENING = re.compile(r"\s*(What|Where|How|Which|Whether|Why)\b")
ADVICE = re.compile(
    r"; (call|check|choose|drop|give|keep|leave|load|make|measure|merge|name|open|pass|raise|run|save|say|see|set)\b"
    r"|; (type|undo|use|wait|write)\b"
)
"""An error that joins its advice by a semicolon. The form is "Expected X, got Y. Pass Z."."""

PHRASES = {
    "is no": r"(?<!there )\bis no\b(?! (longer|more|less|better))",
    "are none": r"\bare none\b",
    "that cannot be": r"\bthat cannot be\b(?! \w+(ed|en|t|d)\b)",
    "; give": r"; give\b",
    "of before": r"\bof before\b",
    "pass key": r"(?<!\b[Tt]he )\b[Pp]ass[ -]key\b|\b[Pp]ass[ -]keys\b",  # the prompt of the paper: "The pass key is"
    "original length": r"\boriginal length\b",
    "can be told": r"\b(can|could|cannot) be told\b",
}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every string and comment of a module; of a page, every line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every docstring: of modules, classes, functions, constants and fields."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):  # any string that is a statement of its own
                yield node.lineno, text


def errors(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every message that a module raises."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            parts = (part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant))
            yield node.lineno, "".join(part for part in parts if isinstance(part, str))


def findings() -> Iterator[tuple[str, str]]:
    """Yield the kind and the place of every finding."""
    package, scripts, tests = (
        [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
        for folders in (["hf_posext"], ["tools", "benchmarks", "examples"], ["tests"])
    )
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
    pages += sorted((ROOT / "docs").glob("*.md"))
    for path in [*package, *scripts, *tests]:
        for line, text in docstrings(path):
            if OPENING.match(text):
                yield "opening", f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
    for path in package:
        for line, text in errors(path):
            if ADVICE.search(text):
                yield "; advice", f"{path.relative_to(ROOT)}:{line}: {text}"
    for path in [*package, *scripts, *pages]:
        for line, text in prose(path):
            for kind, pattern in PHRASES.items():
                for match in re.finditer(pattern, text):
                    around = text[max(0, match.start() - 40) : match.end() + 40]
                    yield kind, f"{path.relative_to(ROOT)}:{line}: {around}"


def main(arguments: list[str] | None = None) -> int:
    """Print each count beside its budget. Return 1 if a count is above its budget."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="lower the budgets to the counts")
    parser.add_argument("--list", metavar="KIND", nargs="?", const="", help="show the places, of one kind if given")
    options = parser.parse_args(arguments)
    places = list(findings())
    if options.list is not None:
        print("\n".join(f"{kind}: {place}" for kind, place in places if options.list in ("", kind)))
        return 0
    counts = Counter(kind for kind, _ in places)
    budget: dict[str, int] = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}
    kinds = ["opening", "; advice", *PHRASES]
    for kind in kinds:
        print(f"{kind:<16} {counts[kind]:>4} of {budget.get(kind, 0)}")
    if options.update:
        lowered = {kind: min(counts[kind], budget.get(kind, counts[kind])) for kind in kinds}
        BUDGET.write_text(json.dumps(lowered, indent=2) + "\n", encoding="utf-8")
        return 0
    above = [kind for kind in kinds if counts[kind] > budget.get(kind, 0)]
    if above:
        print(f"above the budget of {BUDGET.name}: {', '.join(above)}; see tools/voice.py --list", file=sys.stderr)
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
