"""Results as the `model-index` of a Hub model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.protocols.protocol import is_legacy

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ..evaluation.results.results import Results

METRICS = (
    ("perplexity", "perplexity", "Perplexity"),
    ("perplexity_tail", "perplexity", "Perplexity of the second half"),
    ("bits_per_byte", "bits_per_byte", "Bits per byte"),
    ("gain", "gain", "Gain over the truncated context"),
    ("passkey", "accuracy", "Passkey retrieval"),
)
"""Key of a row, type and name of the metric."""


def results_to_model_index(results: Results, dataset_name: str | None = None) -> list[EvalResult]:
    """
    The rows in the Hub's form; the card shows them as evaluation results.

    Method, length and protocol are in the configuration and the arguments of the data set: the Hub groups results by
    the former, and would otherwise take those of two lengths for one. What is missing or not finite is left out.

    [`push_results`] adds them to a card that is on the Hub, [`model_card`] puts them into a new one.

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
        mark = f" ({row['protocol']})" if is_legacy(row["protocol"]) else ""
        entries += [
            EvalResult(**common, metric_type=kind, metric_name=f"{name}{mark}", metric_value=row[key])
            for key, kind, name in METRICS
            if row.get(key) is not None and math.isfinite(row[key])
        ]
    return entries


def push_results(results: Results, repo_id: str, *, overwrite: bool = False, token: str | bool | None = None) -> str:
    """
    Add results to the card of a model on the Hub, and leave the rest of the card as it is.

    Args:
        results ([`Results`]): of a comparison or of one model.
        repo_id (`str`): `user/name`, of a model that has a card.
        overwrite (`bool`, *optional*, defaults to `False`): replace values that the card has of the same measurement;
            otherwise such a card is refused.
        token (`str` or `bool`, *optional*): by default the one of `hf auth login`.

    Returns:
        `str`: URL of the commit.

    Raises:
        ValueError: the card has another value of the same measurement, and `overwrite` is not set.
    """
    from huggingface_hub import metadata_update
    from huggingface_hub.repocard_data import eval_results_to_model_index

    index = eval_results_to_model_index(repo_id.rpartition("/")[2], results_to_model_index(results))
    return str(metadata_update(repo_id, {"model-index": index}, overwrite=overwrite, token=token))
