"""Effect of a fade or a decay on a model with ALiBi, added to its mask: `results/fading/alibi.json`.

`fade` and `decay` act on the far band of a method that remaps rotary positions. A model with ALiBi has no bands, so
both are added to its causal mask here, with the formulas of the two methods. The control is that of
`results/methods/biases.json`, whose tokens are read again.

    python benchmarks/alibi_fading.py
"""

from __future__ import annotations

import json
import math
from typing import Any
from unittest import mock

import torch
from output import machine
from shipped import ROOT, load, novels
from transformers.models.bloom import modeling_bloom

LENGTHS, TRAINED, START, DOCUMENTS = (512, 1024, 2048, 4096), 512, 2000, 4
CONTROL = ROOT / "results" / "methods" / "biases.json"
RESULT = ROOT / "results" / "fading" / "alibi.json"


def fade(distance: torch.Tensor, window: int = TRAINED // 2, reference: int = TRAINED) -> torch.Tensor:
    """Return the count fade of strength 1 of each pair, with keys at `window` or farther as the far band."""
    far = torch.arange(1, len(distance) + 1)[:, None] - window
    return torch.where(distance >= window, -(far / reference).clamp(min=1).log(), 0.0)


def decay(distance: torch.Tensor, start: int) -> torch.Tensor:
    """Return the logarithmic decay of strength 1 of each pair."""
    return -(distance / start).clamp(min=1).log()


BIASES = {
    "none": lambda distance: torch.zeros_like(distance),
    "fade": fade,
    "decay(start=512)": lambda distance: decay(distance, TRAINED),
    "decay(start=256)": lambda distance: decay(distance, TRAINED // 2),
}


@torch.inference_mode()
def losses(model: Any, ids: torch.Tensor, bias: Any) -> float:
    """Return the nats of the second half of a row, with a bias by distance in all heads."""
    make, places = modeling_bloom.create_causal_mask, torch.arange(len(ids), dtype=torch.float64)
    added = bias(places[:, None] - places).float()

    def biased(*args: Any, **options: Any) -> torch.Tensor:
        return make(*args, **options) + added

    with mock.patch.object(modeling_bloom, "create_causal_mask", biased):
        logits = model(ids[None]).logits[0]
    half = len(ids) // 2
    return float(torch.nn.functional.cross_entropy(logits[half - 1 : -1].double(), ids[half:], reduction="sum"))


def main() -> None:
    model, tokenizer = load("tiny-alibi")
    texts = [tokenizer(novel.text, return_tensors="pt").input_ids[0][START:] for novel in novels("heldout", DOCUMENTS)]
    truncated = {row["length"]: row for row in json.loads(CONTROL.read_text())["rows"] if row["method"] == "none"}
    rows = []
    for name, bias in BIASES.items():
        for length in LENGTHS:
            nats = sum(losses(model, ids[:length], bias) for ids in texts)
            perplexity = math.exp(nats / (len(texts) * (length - length // 2)))
            if name == "none":  # the tokens are those of the control
                assert math.isclose(perplexity, truncated[length]["perplexity_tail"], rel_tol=1e-5), (
                    length,
                    perplexity,
                )
            gain = truncated[length]["perplexity_truncated_tail"] / perplexity
            rows.append({"method": name, "length": length, "perplexity_tail": perplexity, "gain": gain})
            print(name, length, f"{gain:.4f}", flush=True)
    content = {
        "command": "python benchmarks/alibi_fading.py",
        "machine": machine(),
        "documents": len(texts),
        "start": START,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
