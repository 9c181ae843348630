"""Measure a patched model on as many processes as the launcher starts, with the numbers of one process.

An `Accelerator` is all that this needs. Documents are distributed, sums are gathered and never averaged, and every
process gets the whole result. `eval_job.py` shows comparisons with a journal that resume.

python examples/04_accelerate_eval.py
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/04_accelerate_eval.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import evaluate_perplexity, load_documents, patch_model
from hf_posext.reporting import print_tables

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "tiny" / "tiny-rope", help="folder or Hub id")
    parser.add_argument("--dataset", default=HERE / "data" / "heldout.jsonl")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--method", default="yarn")
    parser.add_argument("--factor", type=float, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048])
    options = parser.parse_args()

    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(accelerator.device)
    patch_model(model, options.method, factor=options.factor)
    results = evaluate_perplexity(
        model,
        AutoTokenizer.from_pretrained(options.model),
        load_documents(options.dataset, limit=options.documents),
        options.lengths,
        start=2000,  # past the front matter of a novel
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        print_tables(results)
        print(f"{results.rows[0]['documents']} documents on {accelerator.num_processes} process(es)")
    accelerator.end_training()


if __name__ == "__main__":
    main()
