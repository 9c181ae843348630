"""Effect of a few hundred rows of fine-tuning on a model of 512 tokens that reads 4096: methods x trained weights.

Each run patches the shipped model and trains on the novels of `examples/data/train.jsonl`. It is measured on held-out
novels: perplexity by length, passkeys, gain over a context truncated to the trained length, and the change inside the
trained length. All runs read the same tokens. PoSE reads them in rows of 512 with skipped positions. Finished runs in
the result file are skipped. A killed run continues from its last checkpoint:

    python benchmarks/finetune.py --output benchmarks/results/finetune.json --work reports/finetune
    python benchmarks/finetune.py --output ... --work ... --runs yarn/lora,yarn/full --threads 2

The first run writes its settings to the result file. Later runs must have the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from output import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import Results, compare, evaluate_perplexity, load_patched, patch_model
from hf_posext.adapters import load_adapter
from hf_posext.evaluation import passkey_accuracy
from hf_posext.evaluation.reading import write_atomically
from hf_posext.training import PRESETS, Preset, finetune

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LENGTHS = [512, 1024, 2048, 4096]
FACTOR = 8
METHODS = ("none", "linear", "ntk", "theta", "yarn")
FADED = "rerope+fade"
"""Better than truncation without training. It is trained at the learning rates of all candidates."""

LORA = replace(PRESETS["lora"], learning_rate=3e-3)
TRAININGS: dict[str, tuple[Preset, int | None]] = {
    "lora": (LORA, None),
    "lora-plus": (replace(PRESETS["lora-plus"], learning_rate=5e-4), None),
    "full": (replace(PRESETS["full"], learning_rate=1e-4), None),
    "pose-lora": (LORA, 2),
}
"""Preset and number of PoSE chunks, for every method. Learning rates are the best of `CANDIDATES`, on other novels."""

CANDIDATES: dict[str, tuple[Preset, int | None]] = {
    "full-lr3e-5": (replace(PRESETS["full"], learning_rate=3e-5), None),
    "full-lr1e-4": (replace(PRESETS["full"], learning_rate=1e-4), None),
    "full-lr2e-4": (replace(PRESETS["full"], learning_rate=2e-4), None),
    "full-lr6e-4": (replace(PRESETS["full"], learning_rate=6e-4), None),
    "lora-lr3e-4": (replace(LORA, learning_rate=3e-4), None),
    "lora-lr1e-3": (replace(LORA, learning_rate=1e-3), None),
    "lora-lr3e-3": (replace(LORA, learning_rate=3e-3), None),
    "lora-lr6e-3": (replace(LORA, learning_rate=6e-3), None),
    "lora-plus-lr2e-4": (replace(PRESETS["lora-plus"], learning_rate=2e-4), None),
    "lora-plus-lr5e-4": (replace(PRESETS["lora-plus"], learning_rate=5e-4), None),
    "lora-plus-lr2e-3": (replace(PRESETS["lora-plus"], learning_rate=2e-3), None),
    "dora": (replace(PRESETS["dora"], learning_rate=3e-3), None),
    "lora-norms": (replace(LORA, norms=True), None),
    "lora-rslora": (replace(LORA, options={"use_rslora": True}), None),
    "lora-ratio4": (replace(LORA, learning_rate=1.5e-3, ratio=4.0), None),
    "lora-orthogonal": (replace(LORA, options={"init_lora_weights": "orthogonal"}), None),
    "lora-qk-r16": (replace(LORA, rank=16, targets=("q_proj", "k_proj")), None),
    "lora-all-r3": (replace(LORA, rank=3, alpha=6, targets="all-linear"), None),
}
"""Candidates that were tried with YaRN on `examples/data/validation.jsonl`.

They vary the learning rate for so few steps, and adapters of at most 2 % of the parameters. The goal is the result of
training all weights."""

RUNS = (
    *(f"{method}/untrained" for method in METHODS),
    *(f"{method}/{training}" for method in METHODS for training in TRAININGS),
)


def load(model: Path, device: str) -> tuple[Any, Any]:
    """Return the shipped model in float32 and its tokenizer."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return network.to(device).eval(), AutoTokenizer.from_pretrained(model)


def measure_control(args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Measure the untouched model by length, with its full context and truncated to the trained length."""
    network, tokenizer = load(args.model, args.device)
    results = compare(network, tokenizer, str(args.documents), ["none"], lengths=LENGTHS, start=args.start)
    keys = ("perplexity", "perplexity_tail", "perplexity_truncated", "perplexity_truncated_tail")
    return {row["length"]: {key: row[key] for key in keys} for row in results.rows}


def measure(network: Any, tokenizer: Any, args: argparse.Namespace, control: dict[str, Any]) -> dict[str, Any]:
    """Return rows by length and the sums of each document, for a model with its patch in force."""
    began = time.monotonic()
    results: Results = evaluate_perplexity(network, tokenizer, str(args.documents), LENGTHS, start=args.start)
    keys = passkey_accuracy(network, tokenizer, LENGTHS, args.passkey) if args.passkey else {}
    rows = []
    for row in results.rows:
        truncated = control[str(row["length"])]
        rows.append(
            {
                "length": row["length"],
                "perplexity": row["perplexity"],
                "perplexity_tail": row["perplexity_tail"],
                "gain": truncated["perplexity_truncated_tail"] / row["perplexity_tail"],
                "passkey": keys.get(row["length"]),
            }
        )
    inside = rows[0]["perplexity"] / control[str(LENGTHS[0])]["perplexity"] - 1
    fields = ("document", "length", "nll_sum", "tokens", "tail_nll_sum", "tail_tokens")
    documents = [{key: record[key] for key in fields} for record in results.per_document]
    seconds = round(time.monotonic() - began, 1)
    return {"rows": rows, "short_context_change": inside, "per_document": documents, "measure_seconds": seconds}


def make(name: str, args: argparse.Namespace, control: dict[str, Any]) -> dict[str, Any]:
    """Train and measure one run."""
    method, _, training = name.partition("/")
    network, tokenizer = load(args.model, args.device)
    if training == "untrained":
        with patch_model(network, method, factor=FACTOR):
            return measure(network, tokenizer, args, control)
    preset, pose = {**TRAININGS, **CANDIDATES}[training]
    output = args.work / name.replace("/", "-")
    if ended(output):  # killed while it was measured
        adapter = (output / "adapter").is_dir()
        trained = load_adapter(output / "adapter", network) if adapter else load_patched(output / "model")
        return {**measure(trained, tokenizer, args, control), **training_facts(output)}
    rows = args.batch * (1 if pose is None else FACTOR)  # rows of PoSE are shorter by the same factor
    at_once = min(rows, FACTOR) if pose else 1
    result = finetune(
        network,
        tokenizer,
        str(args.train),
        method,
        factor=FACTOR,
        output=output,
        preset=preset,
        pose=pose,
        steps=args.steps,
        batch_size=at_once,
        accumulation=rows // at_once,
        warmup=args.warmup,
        bf16=args.bf16,
        save_every=max(1, args.steps // 4),
        resume=True,
        seed=args.seed,
    )
    return {**measure(result.model, tokenizer, args, control), **training_facts(output)}


def ended(output: Path) -> bool:
    """Return whether the training in a directory has ended."""
    path = output / "provenance.json"
    return path.is_file() and "result" in json.loads(path.read_text(encoding="utf-8"))


def training_facts(output: Path) -> dict[str, Any]:
    """Return the provenance of a training for the result file."""
    provenance = json.loads((output / "provenance.json").read_text(encoding="utf-8"))
    facts = {key: provenance["result"][key] for key in ("parameters", "loss", "resumed_from", "device")}
    seconds = provenance["result"]["seconds"]
    return {**facts, "train_seconds": seconds, "preset": provenance["run"]["preset"]}


def show(name: str, run: dict[str, Any]) -> None:
    cells = ""
    for row in run["rows"]:
        key = "-" if row["passkey"] is None else f"{row['passkey']:.2f}"
        cells += f"  {row['perplexity']:7.2f} {row['gain']:.3f} {key}"
    trained = run.get("parameters", {}).get("trained", 0)
    print(
        f"{name:24} {trained:>9,} {cells}  {run['short_context_change']:+.2%}  {run.get('train_seconds', 0):.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the result file; finished runs in it are kept")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and adapters")
    parser.add_argument("--runs", help=f"with commas: {', '.join(RUNS)}, or yarn/ with one of {', '.join(CANDIDATES)}")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "tiny" / "tiny-rope")
    parser.add_argument("--train", type=Path, default=EXAMPLES / "data" / "train.jsonl", help="novels to train on")
    parser.add_argument("--documents", type=Path, default=EXAMPLES / "data" / "heldout.jsonl", help="to measure on")
    parser.add_argument("--start", type=int, default=2000, help="tokens to leave out of each, as front matter")
    parser.add_argument("--passkey", type=int, default=20, help="trials per length")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="rows of 4096 tokens per step")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train by autocast")
    parser.add_argument("--device", default="cpu", help="where untrained runs are measured; the Trainer takes a GPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    names = args.runs.split(",") if args.runs else RUNS
    run_names = {*RUNS, *(f"{method}/{training}" for method in (*METHODS, FADED) for training in CANDIDATES)}
    run_names |= {f"{FADED}/{training}" for training in ("untrained", *TRAININGS)}
    if unknown := [name for name in names if name not in run_names]:
        parser.error(f"no such runs: {', '.join(unknown)}")
    options = ("steps", "batch", "warmup", "seed", "bf16", "start", "passkey")
    files = {name: getattr(args, name).name for name in ("model", "train", "documents")}
    settings = {**files, **{name: getattr(args, name) for name in options}, "factor": FACTOR, "lengths": LENGTHS}
    content = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {"settings": settings}
    if content["settings"] != settings:
        parser.error(f"{args.output} is of other settings: {content['settings']}; this is {settings}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if "control" not in content:
        content["machine"] = {**machine(), "threads": args.threads}
        content["control"] = json.loads(json.dumps(measure_control(args)))
        content["runs"] = {}
    for name in names:
        if name not in content["runs"]:
            content["runs"][name] = make(name, args, content["control"])
            write_atomically(args.output, json.dumps(content, indent=1) + "\n")
        show(name, content["runs"][name])


if __name__ == "__main__":
    main()
