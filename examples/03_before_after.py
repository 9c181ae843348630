"""Compare methods on held-out novels, with each other and with the same model truncated.

A comparison shows the cost of each method inside the trained length, the perplexity past it, the gain over truncating
the input, and the passkeys found. `--output` gets the report with pictures.

python examples/03_before_after.py
python examples/03_before_after.py --model Qwen/Qwen3-0.6B --factor 2 --lengths 32768 65536 --dataset novels.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import compare, load_documents
from hf_posext.reporting import print_tables, write_report

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "tiny" / "tiny-rope", help="folder or Hub id")
    parser.add_argument("--dataset", default=HERE / "data" / "heldout.jsonl")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["none", "linear", "yarn", "self-extend"])
    parser.add_argument("--factor", type=float, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--passkey", type=int, default=3, help="passkeys to hide and ask for, at each length")
    parser.add_argument("--output", type=Path, default=Path("reports") / "before_after")
    options = parser.parse_args()

    results = compare(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(options.model),
        load_documents(options.dataset, limit=options.documents),
        options.methods,
        factor=options.factor,
        lengths=options.lengths,
        passkey=options.passkey,
        start=2000,  # past the front matter of a novel
    )
    print_tables(results)
    print(f"\nthe report: {write_report(results, options.output)}")


if __name__ == "__main__":
    main()
