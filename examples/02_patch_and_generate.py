"""Patch a model, call plain `generate`, and undo the patch to the bit.

A number is hidden at the beginning of a text four times as long as the trained length, and asked for at its end. The
model does not find it as it is, and finds it under YaRN. After `undo` it is the same model as before.

python examples/02_patch_and_generate.py
python examples/02_patch_and_generate.py --model Qwen/Qwen3-0.6B --method yarn --factor 2 --length 65536
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import patch_model

TINY_ROPE = Path(__file__).resolve().parent / "tiny" / "tiny-rope"

KEY = "48213"
NEEDLE = f"The pass key is {KEY}. Remember it. {KEY} is the pass key.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
QUESTION = "What is the pass key? The pass key is"


def hidden_key(tokenizer: Any, length: int) -> torch.Tensor:
    """Return token ids, `(1, at most length)`: a line of filler, the key, filler, and the question."""
    line, rest = (len(tokenizer(text)["input_ids"]) for text in (FILLER, FILLER + NEEDLE + QUESTION))
    text = FILLER + NEEDLE + FILLER * ((length - rest) // line) + QUESTION
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]


def answer(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, prompt.shape[1] :]).strip().splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_ROPE, help="folder or Hub id")
    parser.add_argument("--method", default="yarn")
    parser.add_argument("--factor", type=float, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompt")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    prompt = hidden_key(tokenizer, options.length)
    with torch.inference_mode():
        before = model(prompt).logits

    print(f"a prompt of {prompt.shape[1]} tokens, the key {KEY} in its second line\n")
    print(f"as it is:  {answer(model, tokenizer, prompt)}")

    patch = patch_model(model, options.method, factor=options.factor)  # in place
    print(f"patched:   {answer(model, tokenizer, prompt)}\n")
    for line in patch.describe().splitlines():
        print(textwrap.fill(line, width=80, subsequent_indent="  "))

    patch.undo()  # or: with patch_model(model, ...): ...
    with torch.inference_mode():
        print(f"undone to the bit: {torch.equal(model(prompt).logits, before)}")


if __name__ == "__main__":
    main()
