"""Write the measured tables of `docs/serving.md` from the results of `benchmarks/llama_cpp.py`.

python tools/llama_cpp_tables.py             # write them
python tools/llama_cpp_tables.py --check     # exit 1 if a committed table is out of date
"""

from __future__ import annotations

import json
import sys

from pages import ROOT, between_marks, publish, table

PAGE, RESULTS = ROOT / "docs" / "serving.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: tools/llama_cpp_tables.py -->\n", "<!-- end of what is measured -->\n"
HEADS = ("method", "transformers", "llama.cpp", "relative difference", "largest difference of a token, in nats")


def rows(file: str) -> str:
    """Return the table of one result file."""
    lines = [
        (
            f"`{row['method']}`",
            *(f"{row[side]:.3f}" for side in ("transformers", "llama.cpp")),
            f"{row['difference']:+.1e}",
            f"{row['largest_per_token']:.1e}",
        )
        for row in json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    ]
    return table(HEADS, lines) + "\n"


def measured() -> str:
    """Return the text between the marks: a small model of the project, then a public one."""
    return (
        "Perplexity of `tiny-rope` on four held-out novels of 2048 tokens, four times its trained length, in float32 "
        "(`python -m benchmarks.llama_cpp`, `benchmarks/results/llama_cpp.json`). The GGUF files were laid out by "
        "`tests/export/gguf_helpers.py`, since the converter does not know the tokenizer of `tiny-rope`:\n\n"
        f"{rows('llama_cpp.json')}\n"
        "SmolLM2-135M-Instruct goes the whole way of `SERVING.md`: `export_checkpoint`, llama.cpp's own "
        "`convert_hf_to_gguf.py` (float32), and `hf-posext gguf` where it names that step. One held-out novel of 2048 "
        "tokens, plans for twice 1024 tokens (`benchmarks/results/llama_cpp_converted.json`):\n\n"
        f"{rows('llama_cpp_converted.json')}"
    )


if __name__ == "__main__":
    sys.exit(publish(__doc__, lambda: {PAGE: between_marks(PAGE, BEGIN, END, measured())}))
