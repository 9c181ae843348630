"""Perplexity of tiny-rope under llama.cpp and under transformers, with the same plans on the same tokens.

llama.cpp gets a GGUF file with the positions that `hf-posext gguf` writes; transformers the patched model. Both
compute in float32 (keys and values of llama.cpp's cache too). Needs `pip install llama-cpp-python gguf`.

    python -m benchmarks.llama_cpp --length 2048 --output benchmarks/results/llama_cpp.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_posext
from hf_posext.export import write_gguf
from hf_posext.export.llama_cpp import READ_FROM
from hf_posext.packages import machine
from hf_posext.plan import ExtensionPlan
from tests.export.gguf_helpers import write_llama

MODEL, NOVELS = Path("examples/tiny/tiny-rope"), Path("examples/data/heldout.jsonl")
METHODS = ("none", "linear", "ntk", "theta", "yarn", "yarn(attention_factor=1.4)", "llama3", "yarn+resonance")


def documents(length: int, count: int) -> list[list[int]]:
    """The first tokens of the first documents that are long enough."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = []
    with NOVELS.open(encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=length).input_ids
            if len(ids) == length and len(rows) < count:
                rows.append(ids)
    return rows


def nll(logits: torch.Tensor, ids: list[int]) -> float:
    """Sum over all tokens but the first, in float64 from float32 logits."""
    scores = logits[:-1].float().log_softmax(-1).double()
    return -float(scores.gather(-1, torch.tensor(ids[1:])[:, None]).sum())


@torch.no_grad()
def by_transformers(model: PreTrainedModel, rows: list[list[int]]) -> float:
    return sum(nll(model(input_ids=torch.tensor([ids])).logits[0], ids) for ids in rows)


def by_llama_cpp(path: Path, rows: list[list[int]]) -> float:
    length, f32 = len(rows[0]), llama_cpp.GGML_TYPE_F32
    options: dict[str, Any] = {"n_ctx": length, "n_batch": length, "logits_all": True, "verbose": False}
    model = llama_cpp.Llama(str(path), n_threads=1, type_k=f32, type_v=f32, flash_attn=False, **options)
    total = 0.0
    for ids in rows:
        model.reset()
        model.eval(ids)
        total += nll(torch.from_numpy(np.array(model.scores[:length])), ids)
    return total


def measure(method: str, factor: float, rows: list[list[int]], directory: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    source = write_llama(model, directory / "source.gguf")
    path = source
    if method != "none":
        plan: ExtensionPlan = hf_posext.patch_model(model, method, factor=factor).plan
        path = write_gguf(plan, source, directory / "model.gguf")
    tokens = sum(len(ids) - 1 for ids in rows)
    ours, theirs = (math.exp(total / tokens) for total in (by_transformers(model, rows), by_llama_cpp(path, rows)))
    return {"method": method, "transformers": ours, "llama.cpp": theirs, "difference": theirs / ours - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = documents(given.length, given.documents)
    trained = AutoModelForCausalLM.from_pretrained(MODEL).config.max_position_embeddings
    results = []
    for method in METHODS:
        with tempfile.TemporaryDirectory() as directory:
            results.append(measure(method, given.length / trained, rows, Path(directory)))
        print(json.dumps(results[-1]), flush=True)
    if given.output is not None:
        versions = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "hf_posext": hf_posext.__version__,
        }
        versions |= {"llama-cpp-python": llama_cpp.__version__, "llama.cpp": READ_FROM.split()[-1]}
        head = {
            "model": "tiny-rope",
            "length": given.length,
            "documents": len(rows),
            "machine": machine(),
            "versions": versions,
        }
        given.output.write_text(json.dumps(head | {"rows": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
