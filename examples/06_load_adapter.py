"""Open an adapter with the positions that it was trained with, merge it, and export it to plain transformers.

An adapter belongs to a base *and* a plan. `verify_adapter` reports why two do not fit, and `load_adapter` joins them.
The merged and exported model opens without this package.

python examples/05_lora_finetune.py    # writes the adapter
python examples/06_load_adapter.py
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import export_checkpoint, load_adapter, load_documents, verify_adapter

HERE = Path(__file__).resolve().parent


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return the logits, and a phrase with the perplexity of the text."""
    output = model(input_ids=ids, labels=ids)
    return output.logits, f"perplexity {output.loss.exp():6.1f} over {ids.shape[1]} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=Path("reports") / "lora_finetune" / "adapter")
    parser.add_argument("--model", default=HERE / "tiny" / "tiny-rope", help="the base: folder or Hub id")
    parser.add_argument("--dataset", default=HERE / "data" / "heldout.jsonl", help="of which the first text is read")
    parser.add_argument("--length", type=int, default=2048, help="tokens to read")
    options = parser.parse_args()
    if not options.adapter.is_dir():
        parser.error(f"there is no adapter in {options.adapter}; run examples/05_lora_finetune.py first")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    (novel,) = load_documents(options.dataset, limit=1)
    ids = tokenizer(novel.text, return_tensors="pt", verbose=False)["input_ids"][:, 2000 : 2000 + options.length]

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    print(f"the base alone:        {read(base, ids)[1]}")
    fit = verify_adapter(base, options.adapter)
    print(textwrap.fill(f"does the adapter fit?  {'yes' if fit else 'no'}: {'; '.join(fit.reasons)}", width=80))

    model = load_adapter(options.adapter, base, tokenizer=tokenizer)  # patches the base, then puts the adapter on it
    logits, answer = read(model, ids)
    print(f"\nwith patch, adapter:   {answer}")
    print(f"does it fit now?       {'yes' if verify_adapter(model, options.adapter) else 'no'}")

    merged = model.merge_and_unload()  # the patch stays
    merged_logits, answer = read(merged, ids)
    print(f"merged:                {answer}")
    print(f"                       logits differ by {(merged_logits - logits).abs().max():.0e} at most")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merged"
        export_checkpoint(merged, path, "transformers", tokenizer=tokenizer)
        plain = AutoModelForCausalLM.from_pretrained(path).eval()  # nothing of hf_posext
    plain_logits, answer = read(plain, ids)
    print(f"plain transformers:    {answer}")
    print(f"                       logits differ by {(plain_logits - merged_logits).abs().max():.0e} at most")
    print(f"                       in its config: {plain.config.max_position_embeddings} tokens")


if __name__ == "__main__":
    main()
