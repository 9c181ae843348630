"""Draw the textbook's figure of the three shipped models: no generalization, extrapolation, interpolation.

python tools/explain_figure.py --measure   # first read the held-out novels into results/explain (minutes on two cores)
python tools/explain_figure.py             # draw docs/images/explain.png, and a picture of each model beside it
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import load_documents
from hf_posext.diagnosis import Diagnosis, diagnose
from hf_posext.reporting.signals import plot_classes, plot_diagnosis

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "examples" / "tiny"
NOVELS = ROOT / "examples" / "data" / "heldout.jsonl"
RESULTS = ROOT / "results" / "explain"
IMAGES = ROOT / "docs" / "images"
COMMAND = "python tools/explain_figure.py --measure"

# ALiBi's config contains no length; that of the table is measured. Token 2000 of each novel is past the front matter.
RUNS: dict[str, dict[str, Any]] = {
    "tiny-learned": {"methods": ["table-linear"]},
    "tiny-alibi": {"methods": [], "trained_length": 512},
    "tiny-rope": {"methods": ["yarn"]},
}
TARGET, START = 2048, 2000
MEASURED = ("departure", "departure_interval", "rise", "verdict", "provenance")


def measure(name: str, documents: Any = NOVELS, folder: Path = RESULTS) -> None:
    """Read the novels with one model, and write its diagnosis."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    texts = load_documents(documents)
    texts.source["dataset"] = Path(documents).relative_to(ROOT).as_posix()
    result = diagnose(load(name), tokenizer, texts, target_length=TARGET, start=START, **RUNS[name])
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {**result.provenance, "command": COMMAND}
    replace(result, model=f"examples/tiny/{name}", provenance=provenance).save(folder / f"{name}.json")


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)


def diagnosis(name: str, folder: Path = RESULTS) -> Diagnosis:
    """Return a diagnosis with signals from the shipped weights and losses from the result file."""
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    result = diagnose(load(name), target_length=TARGET, **RUNS[name])
    tables = {**result.tables, "losses": pd.DataFrame(content["tables"]["losses"])}
    return replace(result, tables=tables, **{key: content[key] for key in MEASURED})


def draw(folder: Path = IMAGES) -> None:
    """Draw the figure, and the picture of each model."""
    runs = [diagnosis(name) for name in RUNS]
    plot_classes(runs, folder / "explain.png")
    for name, result in zip(RUNS, runs, strict=True):
        plot_diagnosis(result, folder / f"explain-{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="read the novels first")
    if parser.parse_args().measure:
        for name in RUNS:
            measure(name)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
