"""Results as the `model-index` of a Hub model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ..evaluation.results import Results

METRICS = (
    ("perplexity", "perplexity", "Perplexity"),
    ("perplexity_tail", "perplexity", "Perplexity of the second half"),
    ("gain", "gain", "Gain over the truncated context"),
    ("passkey", "accuracy", "Pass-key retrieval"),
)
"""Key of a row, type and name of the metric."""


def results_to_model_index(results: Results, dataset_name: str | None = None) -> list[EvalResult]:
    """
    The rows in the Hub's form; the card shows them as evaluation results.

    Method, length and protocol are in the configuration and the arguments of the data set: the Hub groups results by
    the former, and would otherwise take those of two lengths for one. What is missing or not finite is left out.

    ```python
    card = ModelCard.load("me/my-model")
    card.data.model_name = "my-model"
    card.data.eval_results = results_to_model_index(results)
    card.push_to_hub("me/my-model")
    ```

    or, without touching the rest of the card, `metadata_update("me/my-model", {"model-index":
    eval_results_to_model_index("my-model", results_to_model_index(results))})`, both of `huggingface_hub`.

    Args:
        results ([`Results`]): of a comparison or of one model.
        dataset_name (`str`, *optional*): for readers; by default the recipe's name or the data set of the provenance.

    Returns:
        `list[EvalResult]`: one for each row and metric.
    """
    from huggingface_hub import EvalResult

    source = results.provenance
    dataset = source.get("dataset") or "text"
    if Path(dataset).is_absolute():
        dataset = Path(dataset).name  # a card is public, and paths of a machine say who owns it
    entries = []
    for row in results.rows:
        common: dict[str, Any] = {
            "task_type": "text-generation",
            "dataset_type": dataset,
            "dataset_name": dataset_name or source.get("recipe") or dataset,
            "dataset_config": f"{row['method']} x{row['factor']:g}, {row['length']} tokens",
            "dataset_split": source.get("split"),
            "dataset_revision": source.get("revision"),
            "dataset_args": {
                key: row[key] for key in ("method", "factor", "length", "protocol", "documents", "tokens")
            },
        }
        entries += [
            EvalResult(**common, metric_type=kind, metric_name=name, metric_value=row[key])
            for key, kind, name in METRICS
            if row.get(key) is not None and math.isfinite(row[key])
        ]
    return entries
