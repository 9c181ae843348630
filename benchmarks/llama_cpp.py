"""Perplexity of a model under llama.cpp and under transformers, with the same plans on the same tokens.

llama.cpp reads a GGUF file with the positions that `hf-posext gguf` writes. transformers runs the patched model. Both
compute in float32, including the cache of llama.cpp. Needs `pip install llama-cpp-python gguf`. With `--converter`,
llama.cpp's own converter writes the file from an export, with the command of `SERVING.md`.

    python -m benchmarks.llama_cpp --length 2048 --output benchmarks/results/llama_cpp.json
    python -m benchmarks.llama_cpp --model SMOLLM2 --converter convert_hf_to_gguf.py --trained-length 1024 \\
        --documents 1 --output benchmarks/results/llama_cpp_converted.json
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_posext
from benchmarks.output import command, machine
from hf_posext.export import export_checkpoint, write_gguf
from hf_posext.export.llama_cpp import READ_FROM, rope_keys
from hf_posext.patching.checkpoint import Source, locate, open_config, open_tokenizer, open_weights
from hf_posext.plan import ExtensionPlan
from tests.export.gguf_helpers import write_llama

MODEL, NOVELS = Path("examples/tiny/tiny-rope"), Path("examples/data/heldout.jsonl")
METHODS = ("none", "linear", "ntk", "theta", "yarn", "yarn(attention_factor=1.4)", "llama3", "yarn+resonance")


def documents(source: Source, length: int, count: int) -> list[list[int]]:
    """Return the first tokens of the first documents that are long enough."""
    tokenizer = open_tokenizer(source)
    rows = []
    with NOVELS.open(encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=length).input_ids
            if len(ids) == length and len(rows) < count:
                rows.append(ids)
    return rows


def nll(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Return the NLL of all tokens except the first, `(length - 1,)`, in float64 from float32 logits."""
    scores = logits[:-1].float().log_softmax(-1).double()
    return -scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def by_transformers(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([nll(model(input_ids=torch.tensor([ids])).logits[0], ids) for ids in rows])


def by_llama_cpp(path: Path, rows: list[list[int]]) -> torch.Tensor:
    length, f32 = len(rows[0]), llama_cpp.GGML_TYPE_F32
    options: dict[str, Any] = {"n_ctx": length, "n_batch": length, "logits_all": True, "verbose": False}
    model = llama_cpp.Llama(str(path), n_threads=1, type_k=f32, type_v=f32, flash_attn=False, **options)
    losses = []
    for ids in rows:
        model.reset()
        model.eval(ids)
        losses.append(nll(torch.from_numpy(np.array(model.scores[:length])), ids))
    return torch.cat(losses)


def convert(converter: Path, model: PreTrainedModel, source: Source, directory: Path) -> Path:
    """Write the GGUF file of a model, patched or not, with llama.cpp's converter and the command of `SERVING.md`."""
    tokenizer, export, path = open_tokenizer(source), directory / "export", directory / "source.gguf"
    patch = hf_posext.find_patch(model)
    if patch is None:
        model.save_pretrained(export)
        tokenizer.save_pretrained(export)
    else:
        export_checkpoint(model, export, "llama.cpp", tokenizer=tokenizer)
    words = [sys.executable, converter, export, "--outfile", path, "--outtype", "f32"]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if patch is None or rope_keys(patch.plan).by_converter:
        return path
    return write_gguf(patch.plan, path, directory / "model.gguf")


def measure(
    method: str,
    source: Source,
    lengths: dict[str, Any],
    converter: Path | None,
    rows: list[list[int]],
    directory: Path,
) -> dict[str, Any]:
    model = open_weights(AutoModelForCausalLM, source, dtype=torch.float32)
    path = None if converter else write_llama(model, directory / "source.gguf")
    if method != "none":
        plan: ExtensionPlan = hf_posext.patch_model(model, method, **lengths).plan
        path = path and write_gguf(plan, path, directory / "model.gguf")
    path = path or convert(converter, model, source, directory)  # type: ignore[arg-type]
    losses = by_transformers(model, rows), by_llama_cpp(path, rows)
    perplexity, peer_perplexity = (math.exp(loss.mean()) for loss in losses)
    largest = float((losses[0] - losses[1]).abs().max())
    row = {
        "method": method,
        "transformers": perplexity,
        "llama.cpp": peer_perplexity,
        "difference": peer_perplexity / perplexity - 1,
    }
    return {**row, "largest_per_token": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="Directory or GGUF file.")
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py of llama.cpp.")
    parser.add_argument("--trained-length", type=int, help="Of the plans; the model's if not given.")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    source = locate(arguments.model)
    rows = documents(source, arguments.length, arguments.documents)
    trained = arguments.trained_length or open_config(source).max_position_embeddings
    lengths = {"factor": arguments.length / trained, "trained_length": arguments.trained_length}
    settings = {
        "model": None if arguments.model == str(MODEL) else Path(arguments.model).name,
        "converter": arguments.converter and arguments.converter.name,
        "trained-length": arguments.trained_length,
        "length": arguments.length,
        "documents": arguments.documents,
    }
    content: dict[str, Any] = {
        "command": command("-m benchmarks.llama_cpp", settings),
        "model": Path(arguments.model).stem,
        "converter": arguments.converter and arguments.converter.name,
        "trained_length": trained,
        "length": arguments.length,
        "documents": len(rows),
        "machine": machine(),
        "versions": {"llama-cpp-python": llama_cpp.__version__, "llama.cpp": READ_FROM.split()[-1]},
        "rows": [],
    }
    for method in METHODS:
        with tempfile.TemporaryDirectory() as directory:
            content["rows"].append(measure(method, source, lengths, arguments.converter, rows, Path(directory)))
        print(json.dumps(content["rows"][-1]), flush=True)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
