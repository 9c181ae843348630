"""Patch a model, add LoRA, and train a few steps at the target length.

`finetune` is transformers' Trainer and peft on a patched model. The directory of the adapter contains the plan of its
positions. A real run takes some hundred steps of 64 long rows: raise `--steps` and `--accumulation`.
`06_load_adapter.py` opens the adapter.

python examples/05_lora_finetune.py
python examples/05_lora_finetune.py --model Qwen/Qwen3-0.6B --factor 2 --length 65536 --learning-rate 2e-4
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import finetune, load_documents
from hf_posext.training import PRESETS, Evaluation

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "tiny" / "tiny-rope", help="folder or Hub id")
    parser.add_argument("--dataset", default=HERE / "data" / "train.jsonl", help="to train on")
    parser.add_argument("--heldout", default=HERE / "data" / "heldout.jsonl", help="to measure on, before and after")
    parser.add_argument("--documents", type=int, default=2, help="to measure on")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="to measure at, in tokens")
    parser.add_argument("--method", default="yarn")
    parser.add_argument("--factor", type=float, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row to train on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulation", type=int, default=2, help="rows in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="small models want more than large ones")
    parser.add_argument("--output", type=Path, default=Path("reports") / "lora_finetune", help="a new directory")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists. Pass another --output, or remove it.")

    tuned = finetune(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(options.model),
        load_documents(options.dataset),
        options.method,
        factor=options.factor,
        preset=replace(PRESETS["lora"], learning_rate=options.learning_rate),
        length=options.length,
        steps=options.steps,
        accumulation=options.accumulation,
        warmup=options.steps // 10,
        evaluation=Evaluation(
            load_documents(options.heldout, limit=options.documents),
            lengths=options.lengths,
            every=options.steps,  # and once before the first step
            start=2000,  # past the front matter of a novel
        ),
        output=options.output,
    )
    trained, of = tuned.provenance["result"]["parameters"].values()
    size = f"{options.steps} steps of {options.accumulation} rows of {options.length} tokens"
    print(f"{options.method} and LoRA: {size}, {trained:,} of {of:,} parameters\n")
    print(f"{'perplexity at':<16}" + "".join(f"{length:>8}" for length in options.lengths))
    for entry in tuned.log:
        if f"eval_perplexity_{options.lengths[0]}" in entry:
            measured = (entry[f"eval_perplexity_{length}"] for length in options.lengths)
            print(f"{'after' if entry['step'] else 'before':<16}" + "".join(f"{value:>8.2f}" for value in measured))
    print(f"\nthe adapter, with its plan: {tuned.path}")


if __name__ == "__main__":
    main()
