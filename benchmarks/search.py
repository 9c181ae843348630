"""Searched frequencies against YaRN's, on novels that the search has not seen.

The search reads three of the training novels; the result is compared with YaRN on the eight held-out ones, against the
control. A run that was stopped goes on from its journals in reports/search.

    python benchmarks/search.py --output results/search/tiny-rope.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shipped import ROOT, load, novels

import hf_posext
from hf_posext.evaluation.rows import bootstrap_interval, pooled_perplexity
from hf_posext.packages import machine

JOURNALS = ROOT / "reports" / "search"
TRAINED, TARGET, START = 512, 2048, 2000
SEARCH_NOVELS, POPULATION, GENERATIONS = 3, 16, 6


def paired(results: hf_posext.Results, method: str, other: str) -> dict[str, Any]:
    """Tail perplexity of one method divided by that of another, at the target, with its interval over documents."""
    sums: dict[str, list[float]] = {}
    tokens: list[int] = []
    for name in (method, other):
        mine = [one for one in results.per_document if one["method"] == name and one["length"] == TARGET]
        sums[name], tokens = [one["tail_nll_sum"] for one in mine], [one["tail_tokens"] for one in mine]
    difference = [a - b for a, b in zip(sums[method], sums[other], strict=True)]
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
    found = hf_posext.search(model, tokenizer, novels("train", SEARCH_NOVELS), TARGET, journal=journals[0], **options)
    print(found.describe(), flush=True)
    method = found.method
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
        "command": "python benchmarks/search.py --output results/search/tiny-rope.json",
        "machine": machine(),
        "search": found.to_dict(),
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
