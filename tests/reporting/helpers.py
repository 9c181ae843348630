"""Rows made by hand after the measured figures of tiny-rope, and the pictures drawn of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_posext.evaluation import Results

LENGTHS = (512, 1024, 2048, 4096)
# Perplexity, its tail, share of passkeys, at each length.
MEASURED = {
    "none": [(40.1, 40.0, 1.0), (65.0, 105.6, 0.0), (103, 164, 0.0), (138, 185, 0.0)],
    "linear": [(132.7, 128.6, 0.0), (125.8, 119.5, 0.0), (117.9, 110.6, 0.0), (117.2, 116.3, 0.0)],
    "ntk": [(42.7, 42.4, 0.8), (41.9, 41.3, 0.6), (39.6, 37.4, 0.05), (72.8, 134, 0.0)],
    "yarn": [(43.9, 43.4, 0.85), (43.2, 42.6, 1.0), (39.2, 35.5, 1.0), (38.4, 37.6, 0.9)],
}
TRUNCATED = [(40.1, 40.0), (39.7, 39.3), (36.0, 32.7), (34.8, 33.6)]


def make_results(*, control: bool = True, passkey: bool = True, lengths: tuple[int, ...] = LENGTHS) -> Results:
    rows: list[dict[str, Any]] = []
    per_document = []
    for method, figures in MEASURED.items():
        factor = 1.0 if method == "none" else 8.0
        for i, length in enumerate(lengths):
            perplexity, tail, retrieved = figures[i % 4]
            whole_truncated, tail_truncated = TRUNCATED[i % 4]
            gain = tail_truncated / tail
            change = perplexity / MEASURED["none"][i % 4][0] - 1
            row = {"method": method, "factor": factor, "protocol": "prefix", "bos": "none", "dtype": "float32"}
            row |= {"length": length, "bits_per_byte": None}
            row |= {"perplexity": perplexity, "perplexity_tail": tail, "nll_sum": 1.0, "tokens": 8 * (length - 1)}
            row |= {"documents": 8, "ci95": [0.9 * perplexity, 1.1 * perplexity]}
            row |= {"perplexity_truncated": whole_truncated if control else None}
            row |= {"perplexity_truncated_tail": tail_truncated if control else None}
            row |= {"gain": gain if control else None, "gain_ci95": [gain - 0.02, gain + 0.02] if control else None}
            row |= {"change": change, "change_ci95": [change - 0.01, change + 0.01]}
            rows.append(row | ({"passkey": retrieved, "passkey_trials": 20} if passkey else {}))
            for document, share in (("a", 0.9), ("b", 1.1)):  # two documents, one easier than the other
                record = {"document": document, "method": method, "factor": factor, "length": length, "first": 1}
                record |= {"bytes": None, "groups": None, "group_mean_sum": None}
                record |= {"nll_sum": share * length * math.log(perplexity), "tokens": length}
                record |= {"tail_nll_sum": share * length / 2 * math.log(tail), "tail_tokens": length // 2}
                record |= {"position_nll_sums": [share * length / 16 * math.log(perplexity)] * 16}
                per_document.append(record)
                if control and method == "none":
                    sums = [share * length / 16 * math.log(whole_truncated)] * 16
                    per_document.append(record | {"method": "truncated", "factor": 1.0, "position_nll_sums": sums})
    provenance: dict[str, Any] = {"model": "tiny|rope", "kind": "rotary", "generalization": "interpolation"}
    provenance |= {"protocol": "prefix", "start": 0, "dtype": "float32", "dataset": "novels.jsonl", "seed": 0}
    provenance |= {"trained_length": 512, "versions": {"torch": "2.13"}, "not_applicable": {}}
    provenance |= {"documents": [{"document": "a", "tokens": 9000}, {"document": "b", "tokens": 8000}], "left_out": []}
    return Results(provenance | {"command": "hf-posext compare --model tiny"}, rows, per_document)


def panels(draw: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of the figure that is saved meanwhile."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw))[1])
    draw()
    return saved[0].axes
