"""Searched frequencies against YaRN's, on novels that the search has not seen.

The search reads three of the training novels. Its result is compared with YaRN on the eight held-out ones, against the
control. A stopped run continues from its journals in reports/search.

    python benchmarks/search.py --output results/search/tiny-rope.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from output import machine
from shipped import ROOT, load, novels

import hf_posext
from hf_posext.evaluation.rows import bootstrap_interval, pooled_perplexity

JOURNALS = ROOT / "reports" / "search"
TRAINED, TARGET, START = 512, 2048, 2000
SEARCH_NOVELS, POPULATION, GENERATIONS = 3, 16, 6


def paired(results: hf_posext.Results, method: str, baseline: str) -> dict[str, Any]:
    """Return the tail perplexity of a method divided by that of a baseline, with its interval over documents."""
    sums: dict[str, list[float]] = {}
    tokens: list[int] = []
    for name in (method, baseline):
        records = [
            record for record in results.per_document if record["method"] == name and record["length"] == TARGET
        ]
        sums[name], tokens = (
            [record["tail_nll_sum"] for record in records],
            [record["tail_tokens"] for record in records],
        )
    difference = [a - b for a, b in zip(sums[method], sums[baseline], strict=True)]
    return {
        "ratio": float(pooled_perplexity(difference, tokens)),
        "ci95": bootstrap_interval(difference, tokens, 0),
        "by_document": [float(pooled_perplexity([d], [n])) for d, n in zip(difference, tokens, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    model, tokenizer = load("tiny-rope")
    options = {"population": POPULATION, "generations": GENERATIONS, "start": START}
    journals = [JOURNALS / f"{output.stem}.{part}.jsonl" for part in ("search", "heldout")]
    searched = hf_posext.search(
        model, tokenizer, novels("train", SEARCH_NOVELS), TARGET, journal=journals[0], **options
    )
    print(searched.describe(), flush=True)
    method = searched.method
    results = hf_posext.compare(
        model,
        tokenizer,
        novels("heldout"),
        ["yarn", method],
        lengths=[TRAINED, TARGET],
        target_length=TARGET,
        start=START,
        journal=journals[1],
    )
    content = {
        "command": f"python benchmarks/search.py --output results/search/{output.name}",
        "machine": machine(),
        "search": searched.to_dict(),
        "heldout": {
            "documents": [entry["document"] for entry in results.provenance["documents"]],
            "rows": results.to_dict()["rows"],
            "searched_over_yarn": paired(results, method.label, "yarn"),
        },
    }
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content["heldout"]["searched_over_yarn"]))


if __name__ == "__main__":
    main()
