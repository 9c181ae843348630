"""Perplexity of documents from NLL sums and token counts, as a metric for `evaluate`.

The file must not import from this package, because `evaluate.load` copies it elsewhere. That loader finds imports by a
regular expression that matches one import per line.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np

DESCRIPTION = """\
exp(sum of NLL / sum of tokens) over documents: every token weighs the same, whichever document it is from. With byte
counts also bits per byte, which can be compared between tokenizers."""

INPUTS = """\
Args:
    nll_sums (`list[float]`): for each document the sum of -log p(token | tokens before it), in nats.
    tokens (`list[int]`): for each document how many tokens that sum is of.
    byte_counts (`list[int]`, *optional*): for each document the UTF-8 bytes of those tokens; given to `compute`.
Returns:
    `perplexity` (float), `bits_per_byte` (float, with byte counts only), `n_tokens` (int), `n_documents` (int)."""

CITATION = """\
@article{jelinek1977perplexity,
  title={Perplexity: a measure of the difficulty of speech recognition tasks},
  author={Jelinek, Fred and Mercer, Robert L and Bahl, Lalit R and Baker, James K},
  journal={The Journal of the Acoustical Society of America},
  year={1977}
}"""


class LongDocumentPerplexity(evaluate.Metric):  # type: ignore[misc]  # evaluate has no type information
    """Token-weighted perplexity over documents.

    The mean of the documents' perplexities is deliberately not reported. It is another number, dominated by the worst
    document, and tables that mix the two are not comparable.

    Example:

    ```python
    >>> LongDocumentPerplexity().compute(nll_sums=[210.0, 96.0], tokens=[70, 30])["n_tokens"]
    100
    ```

    Raises:
        ValueError: `compute` is called without documents or tokens, with a negative count, with an NLL sum that is
            negative, not finite, or of no tokens, or with `byte_counts` that are all 0 or do not have one count per
            document.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"nll_sums": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(
        self, *, nll_sums: list[float], tokens: list[int], byte_counts: list[int] | None = None
    ) -> dict[str, Any]:
        if len(nll_sums) == 0:
            raise ValueError("Expected documents, got none. Pass one NLL sum and one token count for each.")
        for index, (nll, count) in enumerate(zip(nll_sums, tokens, strict=True)):
            if not math.isfinite(nll):
                raise ValueError(
                    f"Expected nll_sums[{index}] to be finite, got {nll}. Leave out documents whose logits were not "
                    "finite."
                )
            if count < 0:
                raise ValueError(
                    f"Expected tokens[{index}] to be 0 or more, got {count}. Pass how many tokens were scored."
                )
            if nll < 0 or (nll > 0 and count == 0):
                raise ValueError(
                    f"Expected nll_sums[{index}] to be a sum of -log p over {count} tokens, got {nll}. Pass that sum."
                )
        nll, count = np.sum(nll_sums, dtype=np.float64), int(np.sum(tokens))
        if count == 0:
            raise ValueError(
                "Expected tokens to average over, got counts of 0 only. Pass documents of 2 tokens or more."
            )
        with np.errstate(over="ignore"):
            result = {"perplexity": float(np.exp(nll / count))}
        if byte_counts is not None:
            if len(byte_counts) != len(nll_sums) or min(byte_counts) < 0 or sum(byte_counts) == 0:
                raise ValueError(
                    f"Expected byte_counts of 0 or more, one for each of {len(nll_sums)} documents and not all 0, got "
                    f"{list(byte_counts)[:8]}. Pass the bytes of the scored tokens."
                )
            result["bits_per_byte"] = float(nll / math.log(2) / sum(byte_counts))
        return {**result, "n_tokens": count, "n_documents": len(nll_sums)}
