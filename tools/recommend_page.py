"""Write the measured part of `docs/recommend.md` from `results/recommend` and `results/search`.

python tools/recommend_page.py             # write it
python tools/recommend_page.py --check     # exit 1 if the committed page is out of date
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pages import ROOT, between_marks, publish, table

PAGE, RECOMMEND, SEARCH = ROOT / "docs" / "recommend.md", ROOT / "results" / "recommend", ROOT / "results" / "search"
BEGIN, END = "<!-- measured: tools/recommend_page.py -->\n", "<!-- end of what is measured -->\n"
HELD_BACK = ("tiny-learned", "tiny-alibi")
"""Models that were not used while the sweep was written."""


def recommend_table(results: list[dict[str, Any]]) -> str:
    """Return the table of recommendations, a line per model and target."""
    lines = []
    for result in sorted(results, key=lambda result: (result["model"], result["target_length"])):
        best, model = result["exhaustive"]["best"], result["model"].rpartition("/")[2]
        advice, count = result["recommended"]["answer"], len(result["exhaustive"]["contenders"])
        choice = _title(result["chosen_on_all_documents"])
        recommended = {"extend": choice, "as it is": "change nothing", "truncate": f"truncate (else {choice})"}[advice]
        name = f"{model} (held back)" if model in HELD_BACK else model
        lines.append(
            (
                *(name, str(result["target_length"]), str(count), str(result["documents"]), recommended, _title(best)),
                *(f"{result['gap']:.2%}", f"{result['cost']:.1%}", f"{best['gain']:.3f}"),
            )
        )
    heads = "model|target|contenders|documents|recommended|best of all|gap|cost|gain of the best".split("|")
    return table(heads, lines, left=9) + "\n"


def search_sentence(result: dict[str, Any]) -> str:
    """Return sentences on the result of the search on its own documents and on held-out ones."""
    search, heldout = result["search"], result["heldout"]
    ratio, span = heldout["searched_over_yarn"]["ratio"], heldout["searched_over_yarn"]["ci95"]
    rows = {row["method"].partition("(")[0]: row for row in heldout["rows"] if row["length"] == _target(search)}
    gain = 1 - search["perplexity"] / search["seeds"]["yarn"]
    verdict = "The search gains" if span[1] < 1 else "The search loses" if span[0] > 1 else "The interval includes 1"
    better = sum(change < 1 for change in heldout["searched_over_yarn"]["by_document"])
    count = len(heldout["documents"])
    mine, yarns = rows["longrope"], rows["yarn"]
    documents, genomes = len(search["provenance"]["documents"]), search["history"][-1]["measured"]
    return (
        f"`{result['command']}` measured {genomes} genomes on {documents} training novels. On these, the tail "
        f"perplexity of the best at {_target(search)} tokens is {gain:.2%} below that of YaRN. On {count} held-out "
        f"novels it is {mine['perplexity_tail']:.2f}, against {yarns['perplexity_tail']:.2f} for YaRN: {ratio:.4f} "
        f"times as much [{span[0]:.4f}, {span[1]:.4f}], and lower on {better} of {count}. {verdict}. The gain over "
        f"truncation is {mine['gain']:.3f}, against {yarns['gain']:.3f} for YaRN. Inside the trained length, "
        f"perplexity changes by {_short(heldout, 'longrope'):+.1%}, against {_short(heldout, 'yarn'):+.1%} for "
        "YaRN.\n"
    )


def measured() -> str:
    """Return the text between the marks."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECOMMEND.glob("*.json"))]
    search = json.loads((SEARCH / "tiny-rope.json").read_text(encoding="utf-8"))
    return f"{recommend_table(results)}\n## What the search found\n{search_sentence(search)}"


def _title(line: dict[str, Any]) -> str:
    return f"`{line['method']}`" if line["factor"] == 1 else f"`{line['method']}` x{line['factor']:.4g}"


def _target(search: dict[str, Any]) -> int:
    return int(search["plan"]["target_length"])


def _short(heldout: dict[str, Any], method: str) -> float:
    return float(min((row for row in heldout["rows"] if row["method"].startswith(method)), key=_length)["change"])


def _length(row: dict[str, Any]) -> int:
    return int(row["length"])


if __name__ == "__main__":
    sys.exit(publish(__doc__, lambda: {PAGE: between_marks(PAGE, BEGIN, END, measured())}))
