"""Inspect a model: its positions, the length that it was trained on, and the methods that extend it.

`detect_scheme` reads the config, `diagnose` the weights. They differ for `tiny-learned`: its config states 2,048
tokens, and its table was trained on a quarter of them.

python examples/01_inspect.py
python examples/01_inspect.py Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from hf_posext import detect_scheme, diagnose, list_methods

TINY = Path(__file__).resolve().parent / "tiny"
MODELS = [str(TINY / name) for name in ("tiny-rope", "tiny-learned", "tiny-alibi")]

PAGE: dict[str, Any] = {"width": 80, "break_on_hyphens": False, "initial_indent": "  ", "subsequent_indent": " " * 18}


def tokens(length: int | None, source: str) -> str:
    return f"{'unknown' if length is None else f'{length} tokens'} ({source})"


def inspect(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    scheme = detect_scheme(model)  # its config would do: detect_scheme(AutoConfig.from_pretrained(name))
    diagnosis = diagnose(model)  # no text runs through the model
    facts = {
        "scheme": scheme.kind,
        "generalizes by": scheme.generalization,
        "in its config": tokens(scheme.trained_length, scheme.trained_length_source),
        "in its weights": tokens(diagnosis.trained_length, diagnosis.trained_length_source),
        "methods": ", ".join(method.name for method in list_methods(scheme.kind) if method.name != "none"),
        "in short": diagnosis.verdict,
    }
    print(f"\n{Path(name).name}")
    for title, fact in facts.items():
        print(textwrap.fill(f"{title:<15} {fact}", **PAGE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="folders or Hub ids")
    for name in parser.parse_args().models:
        inspect(name)


if __name__ == "__main__":
    main()
