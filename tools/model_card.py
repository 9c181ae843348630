"""Write `MODEL_CARD.md`, the card of the three shipped models, from `results/tiny-*.json`; `make card` calls it.

python tools/model_card.py            # write the card
python tools/model_card.py --check    # exit 1 if the committed card is out of date
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index as index_of
from pages import ROOT, fill
from safetensors import safe_open

TEMPLATE = ROOT / "tools" / "MODEL_CARD.md.jinja"
MODELS = {
    "tiny-rope": ("Llama, 2 key-value heads", "rotary, base 10,000"),
    "tiny-learned": ("GPT-2", "learned table of 2,048 rows"),
    "tiny-alibi": ("BLOOM", "ALiBi"),
}


def load_results(path: Path) -> dict[str, Any]:
    """Load the result file of one model.

    Raises:
        ValueError: if its rows are not those of the unextended model, one per length.
    """
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = results["rows"]
    methods = {row["method"] for row in rows}
    lengths = [row["length"] for row in rows]
    if methods != {"none"} or len(set(lengths)) != len(lengths):
        raise ValueError(f"Expected rows of `none` in {path}, one per length, got {sorted(methods)} at {lengths}.")
    return results


def count_parameters(model: str) -> int:
    """Return the number of shipped weights. Tied embeddings are stored once."""
    with safe_open(ROOT / "examples" / "tiny" / model / "model.safetensors", framework="numpy") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def eval_results(rows: list[dict[str, Any]], start: int) -> list[EvalResult]:
    """Return the rows in the Hub's form: perplexity and passkey accuracy, one dataset entry per length."""
    entries = []
    for row in rows:
        common = {
            "task_type": "text-generation",
            "dataset_type": "text",
            "dataset_name": "held-out novels of 100 English Novels 1.4",
            # The Hub groups results by config, not by arguments. Without it, all lengths would be one entry.
            "dataset_config": f"{row['length']} tokens from token {start} on",
            "dataset_split": "heldout",
            "dataset_args": {key: row[key] for key in ("length", "protocol", "documents", "tokens")},
        }
        for kind, key, name in (
            ("perplexity", "perplexity", "perplexity"),
            ("perplexity", "perplexity_tail", "perplexity of the second half"),
            ("accuracy", "passkey", "passkey retrieval"),
        ):
            entries.append(EvalResult(**common, metric_type=kind, metric_name=name, metric_value=round(row[key], 2)))
    return entries


def metadata(results: dict[str, dict[str, Any]]) -> str:
    """Return the YAML block of the card. `ModelCardData` keeps one model's results, so the index is joined here."""
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "position-encoding", "rope", "alibi", "learned-positions", "tiny"],
        metrics=["perplexity", "accuracy"],
    )
    index = [
        entry
        for name in results
        for entry in index_of(name, eval_results(results[name]["rows"], results[name]["provenance"]["start"]))
    ]
    return str(CardData(**data.to_dict(), **{"model-index": index}).to_yaml())


def render(directory: Path) -> str:
    """Return the card of the result files in a directory, after `huggingface_hub` has read it back."""
    results = {name: load_results(directory / f"{name}.json") for name in MODELS}
    models = []
    for name, (architecture, positions) in MODELS.items():
        rows, provenance = results[name]["rows"], results[name]["provenance"]
        models.append(
            {
                "name": name,
                "architecture": architecture,
                "positions": positions,
                "parameters": count_parameters(name),
                "source": f"results/{name}.json",
                "rows": rows,
                "documents": rows[0]["documents"],
                "protocol": rows[0]["protocol"],
                "dtype": provenance["dtype"],
                "seed": provenance["seed"],
                "start": provenance["start"],
            }
        )
    text = fill(TEMPLATE, metadata=metadata(results), models=models, figure="{:.2f}".format).rstrip() + "\n"
    loaded = ModelCard(text).data.eval_results
    if loaded is None or len(loaded) != 3 * sum(len(model["rows"]) for model in models):
        raise ValueError("huggingface_hub reads other results from the card than were written")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the card is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="directory of the result files")
    parser.add_argument("--card", type=Path, default=ROOT / "MODEL_CARD.md", help="the card")
    arguments = parser.parse_args()
    text = render(arguments.results)
    if arguments.check:
        if not arguments.card.is_file() or arguments.card.read_text(encoding="utf-8") != text:
            print(f"{arguments.card} is not what {arguments.results} gives; run `make card`", file=sys.stderr)
            return 1
    else:
        arguments.card.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
