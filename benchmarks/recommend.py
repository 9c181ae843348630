"""Distance of `recommend` from the exhaustive sweep, at a quarter of its cost.

For each model and target every contender and the control read every held-out novel, and the best is looked up. Then
`recommend` runs with a quarter of those tokens; it finds its cells in the journal of the exhaustive sweep, since both
would measure the same bits, and counts what it would have read. A run that was stopped goes on from its journal in
reports/recommend. tiny-rope was looked at while the sweep was written; tiny-learned and tiny-alibi were held back.

    python benchmarks/recommend.py --model tiny-rope --target 4096
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from output import machine
from shipped import ROOT, load, novels

import hf_posext
from hf_posext.recommendation.recommend import SHARE, prepared
from hf_posext.recommendation.sweep import Sweep

RESULTS = ROOT / "results" / "recommend"
JOURNALS = ROOT / "reports" / "recommend"
START, PASSKEYS, SHORT_LIMIT = 2000, 5, 0.01
DOCUMENTS = 4
"""Few, as the exhaustive sweep is what takes its time."""

TRAINED = {"tiny-alibi": 512}
"""Trained lengths that neither the config nor the weights contain."""


def exhaustive(sweep: Sweep, short_limit: float = SHORT_LIMIT) -> dict[str, Any]:
    """Everything measured: all contenders, and the best within the limit."""
    documents = sweep.documents
    names = list(sweep.by_name)
    sweep.read(names, documents, f"exhaustive at {sweep.target}")
    sweep.read_control(documents)
    lines = [
        {
            "method": name[0],
            "factor": name[1],
            "perplexity_tail": sweep.tail(name, documents),
            "short_change": sweep.change(name, documents).value,
            "gain": sweep.gain(name, documents).value,
        }
        for name in names
    ]
    kept = [line for line in lines if line["short_change"] <= short_limit]
    best = min(kept, key=lambda line: line["perplexity_tail"])
    return {"tokens": sweep.tokens, "best": best, "contenders": sorted(lines, key=lambda one: one["perplexity_tail"])}


def compare(model: Any, tokenizer: Any, texts: Any, target: int, journal: Path, **options: Any) -> dict[str, Any]:
    """The exhaustive sweep, `recommend` at a quarter of its tokens, and the gap between what they choose."""
    settings = {"journal": journal, "passkey": PASSKEYS, **options}
    with prepared(model, tokenizer, texts, target, **settings) as sweep:
        whole = exhaustive(sweep)
        found = hf_posext.recommend(model, tokenizer, texts, target, short_limit=SHORT_LIMIT, **settings)
        chosen = found.best["method"], found.best["factor"]
        mine = next(line for line in whole["contenders"] if (line["method"], line["factor"]) == chosen)
    return {
        "target_length": target,
        "documents": len(texts),
        "trained_length": found.trained_length,
        "exhaustive": whole,
        "recommended": found.to_dict(),
        "chosen_on_all_documents": mine,
        "gap": mine["perplexity_tail"] / whole["best"]["perplexity_tail"] - 1,
        "cost": found.cost["tokens"] / whole["tokens"],
        "share": SHARE,
        "truncation_agrees": (found.answer == "truncate") == (whole["best"]["gain"] < 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny-rope", "tiny-learned", "tiny-alibi"), required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--methods", help="with commas between them; all that apply if not given")
    given = parser.parse_args()
    output = RESULTS / f"{given.model}-{given.target}.json"
    model, tokenizer = load(given.model)
    texts = novels("heldout", DOCUMENTS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    methods = None if given.methods is None else given.methods.split(",")
    options = {"start": START, "trained_length": TRAINED.get(given.model), "methods": methods}
    found = compare(model, tokenizer, texts, given.target, JOURNALS / f"{output.stem}.jsonl", **options)
    print({key: found[key] for key in ("gap", "cost", "truncation_agrees")})
    print(found["recommended"]["text"])
    chosen = "" if methods is None else f" --methods {given.methods}"
    command = f"python benchmarks/recommend.py --model {given.model} --target {given.target}{chosen}"
    content = {"command": command, "machine": machine(), "model": model.config.name_or_path, **found}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
