"""Share of attention on the far band by length, before and after fading: numbers and a picture.

python tools/far_mass.py    # a minute; results/fading/far_mass.json and docs/images/fading.png

The share is that of the query at the last position of each length, averaged over heads, layers and held-out novels.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any
from unittest import mock

import matplotlib as mpl
import torch
from pages import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_posext.patching.remap.attention as remap
from hf_posext import load_documents, patch_model
from hf_posext.patching.kernels.banded import banded_attention, whole
from hf_posext.patching.kernels.bands import Geometry
from hf_posext.reporting.drawing import method_styles

mpl.use("Agg")
from matplotlib.figure import Figure

sys.path.append(str(ROOT / "benchmarks"))
from output import machine  # type: ignore[import-not-found]

MODEL = ROOT / "examples" / "tiny" / "tiny-rope"
NOVELS = ROOT / "examples" / "data" / "heldout.jsonl"
RESULT = ROOT / "results" / "fading" / "far_mass.json"
PICTURE = ROOT / "docs" / "images" / "fading.png"
METHODS = ("rerope", "rerope+fade", "leaky-rerope", "leaky-rerope+decay")
LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096)
DOCUMENTS, START, FACTOR = 3, 2000, 8


def far_mass(model: Any, ids: torch.Tensor, window: int) -> dict[int, float]:
    """Return the mean share of attention on keys at `window` or farther, for the last query of each length."""
    shares: dict[int, list[float]] = {length: [] for length in LENGTHS}

    def watched(
        geometry: Geometry, queries: list[Any], keys: list[torch.Tensor], value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        places, states = geometry.keys, [whole(query) for query in queries]
        for length in LENGTHS:
            last = slice(length - 1, length)
            seen = [query[:, :, last] for query in states], [key[:, :, :length] for key in keys]
            place = Geometry(geometry.bands, geometry.queries[:, last], places[:, :length], None, True)
            # with values of 1 for far keys and 0 for near ones, the output of attention is the share
            far = (places[:, :length] <= length - 1 - window).to(value.dtype)
            value_of_far = far[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[-1])
            out = banded_attention(place, *seen, value_of_far, **options)
            shares[length].append(float(out.mean()))
        return banded_attention(geometry, queries, keys, value, **options)

    with mock.patch.object(remap, "banded_attention", watched), torch.inference_mode():
        model.base_model(ids[None])
    return {length: sum(values) / len(values) for length, values in shares.items()}


def measure() -> dict[str, Any]:
    """Measure all methods on all novels."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [
        tokenizer(novel.text, return_tensors="pt").input_ids[0]
        for novel in load_documents(str(NOVELS), limit=DOCUMENTS)
    ]
    texts = [ids[START : START + LENGTHS[-1]] for ids in texts]
    rows = []
    for method in METHODS:
        with patch_model(model, method, factor=FACTOR) as patch:
            window = patch.plan.bands[-1].low
            shares = [far_mass(model, ids, window) for ids in texts]
        rows += [
            {
                "method": method,
                "length": n,
                "window": window,
                "far_share": sum(shares_of_text[n] for shares_of_text in shares) / len(shares),
            }
            for n in LENGTHS
        ]
    return {"command": "python tools/far_mass.py", "documents": len(texts), "start": START, "rows": rows}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw the share against length."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    styles = method_styles(METHODS)
    for method in METHODS:
        points = [(row["length"], 100 * row["far_share"]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points, strict=True), label=method, **styles[method])
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS], rotation=45)
    axes.set_xlabel("position of the query, in tokens")
    axes.set_ylabel("attention on the far band, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Measure, write and draw."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    content = {"machine": machine(), **measure()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(content["rows"]).savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
