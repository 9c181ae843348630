"""A comparison on as many processes as the launcher starts, which resumes when it is started again:

accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/eval_job.py --output runs/demo
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/eval_job.py --output runs/demo
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import compare, load_documents
from hf_posext.reporting import print_tables, write_report

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "tiny" / "tiny-rope"))
    parser.add_argument("--dataset", default=str(HERE / "data" / "heldout.jsonl"))
    parser.add_argument("--documents", type=int, default=None)
    parser.add_argument("--methods", nargs="+", default=["none", "linear", "yarn"])
    parser.add_argument("--factor", type=float, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--output", type=Path, required=True, help="directory of the report and of the journal")
    arguments = parser.parse_args()

    # A process that has no more documents waits for the others: longer than the ten minutes that NCCL gives them.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").to(accelerator.device)
    results = compare(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        load_documents(arguments.dataset, limit=arguments.documents),
        arguments.methods,
        factor=arguments.factor,
        lengths=arguments.lengths,
        journal=arguments.output / "journal.jsonl",
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        print_tables(results)
        print(f"{accelerator.num_processes} processes; report: {write_report(results, arguments.output)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
