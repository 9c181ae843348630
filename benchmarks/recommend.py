"""Distance of `recommend` from the exhaustive sweep, at a quarter of its cost.

For each model and target, the exhaustive sweep measures every contender and the control on the first held-out novels.
Then `recommend` runs with a quarter of those tokens. It takes its cells from the journal of the sweep, because both
measure the same bits, and counts the tokens that it would have read. A stopped run continues from its journal in
reports/recommend. tiny-rope was used while the sweep was written; tiny-learned and tiny-alibi were held back.

    python benchmarks/recommend.py --model tiny-rope --target 4096
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from output import command, machine
from shipped import ROOT, load, novels

import hf_posext
from hf_posext.recommendation.recommendation import SHARE
from hf_posext.recommendation.sweep import Sweep, prepared

RESULTS = ROOT / "results" / "recommend"
JOURNALS = ROOT / "reports" / "recommend"
START, PASSKEYS, SHORT_LIMIT = 2000, 5, 0.01
DOCUMENTS = 4
"""Number of documents. It is small because the exhaustive sweep takes most of the time."""

TRAINED = {"tiny-alibi": 512}
"""Trained lengths that neither the config nor the weights contain."""


def exhaustive(sweep: Sweep, short_limit: float = SHORT_LIMIT) -> dict[str, Any]:
    """Measure all contenders on all documents, and return them with the best one within the limit."""
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
    admissible = [line for line in lines if line["short_change"] <= short_limit]
    best = min(admissible, key=lambda line: line["perplexity_tail"])
    return {
        "tokens": sweep.tokens,
        "best": best,
        "contenders": sorted(lines, key=lambda line: line["perplexity_tail"]),
    }


def compare(model: Any, tokenizer: Any, texts: Any, target: int, journal: Path, **options: Any) -> dict[str, Any]:
    """Run the exhaustive sweep and `recommend` at a quarter of its tokens, and compare their choices."""
    settings = {"journal": journal, "passkey": PASSKEYS, **options}
    with prepared(model, tokenizer, texts, target, **settings) as sweep:
        full_sweep = exhaustive(sweep)
        recommendation = hf_posext.recommend(model, tokenizer, texts, target, short_limit=SHORT_LIMIT, **settings)
        best = recommendation.best["method"], recommendation.best["factor"]
        chosen_line = next(line for line in full_sweep["contenders"] if (line["method"], line["factor"]) == best)
    return {
        "target_length": target,
        "documents": len(texts),
        "trained_length": recommendation.trained_length,
        "exhaustive": full_sweep,
        "recommended": recommendation.to_dict(),
        "chosen_on_all_documents": chosen_line,
        "gap": chosen_line["perplexity_tail"] / full_sweep["best"]["perplexity_tail"] - 1,
        "cost": recommendation.cost["tokens"] / full_sweep["tokens"],
        "share": SHARE,
        "truncation_agrees": (recommendation.answer == "truncate") == (full_sweep["best"]["gain"] < 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny-rope", "tiny-learned", "tiny-alibi"), required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--methods", help="with commas between them; all that apply if not given")
    arguments = parser.parse_args()
    output = RESULTS / f"{arguments.model}-{arguments.target}.json"
    model, tokenizer = load(arguments.model)
    texts = novels("heldout", DOCUMENTS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    methods = None if arguments.methods is None else arguments.methods.split(",")
    options = {"start": START, "trained_length": TRAINED.get(arguments.model), "methods": methods}
    comparison = compare(model, tokenizer, texts, arguments.target, JOURNALS / f"{output.stem}.jsonl", **options)
    print({key: comparison[key] for key in ("gap", "cost", "truncation_agrees")})
    print(comparison["recommended"]["text"])
    content = {"command": command("benchmarks/recommend.py", vars(arguments)), "machine": machine()}
    content |= {"model": model.config.name_or_path, **comparison}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
