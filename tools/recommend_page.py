"""Write the measured part of `docs/recommend.md` from `results/recommend` and `results/search`.

python tools/recommend_page.py             # write it
python tools/recommend_page.py --check     # exit 1 where the committed page is not what the result files give
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pages import ROOT, between_marks, publish, table

PAGE, RECOMMEND, SEARCH = ROOT / "docs" / "recommend.md", ROOT / "results" / "recommend", ROOT / "results" / "search"
BEGIN, END = "<!-- measured: tools/recommend_page.py -->\n", "<!-- end of what is measured -->\n"
HELD_BACK = ("tiny-learned", "tiny-alibi")
"""Models that nobody looked at while the sweep was written."""


def recommend_table(results: list[dict[str, Any]]) -> str:
    """A line for each model and target."""
    lines = []
    for one in sorted(results, key=lambda one: (one["model"], one["target_length"])):
        best, model = one["exhaustive"]["best"], one["model"].rpartition("/")[2]
        advice, count = one["recommended"]["answer"], len(one["exhaustive"]["contenders"])
        mine = _title(one["chosen_on_all_documents"])
        told = {"extend": mine, "as it is": "change nothing", "truncate": f"truncate (else {mine})"}[advice]
        name = f"{model} (held back)" if model in HELD_BACK else model
        lines.append(
            (
                *(name, str(one["target_length"]), str(count), str(one["documents"]), told, _title(best)),
                *(f"{one['gap']:.2%}", f"{one['cost']:.1%}", f"{best['gain']:.3f}"),
            )
        )
    heads = "model|target|contenders|documents|recommended|best of all|gap|cost|gain of the best".split("|")
    return table(heads, lines, left=9) + "\n"


def search_sentence(result: dict[str, Any]) -> str:
    """Return the result of the search on its own documents, and on held-out ones."""
    search, heldout = result["search"], result["heldout"]
    ratio, span = heldout["searched_over_yarn"]["ratio"], heldout["searched_over_yarn"]["ci95"]
    rows = {row["method"].partition("(")[0]: row for row in heldout["rows"] if row["length"] == _target(search)}
    own = search["perplexity"] / search["seeds"]["yarn"] - 1
    worse = "below" if span[1] < 1 else "above" if span[0] > 1 else "not to be told apart from"
    said = f"{worse} YaRN's" if worse != "above" else "above YaRN's: the search did not beat it"
    better = sum(one < 1 for one in heldout["searched_over_yarn"]["by_document"])
    count = len(heldout["documents"])
    mine, yarns = rows["longrope"], rows["yarn"]
    return (
        f"`{result['command']}`: after {search['history'][-1]['measured']} genomes the tail perplexity at "
        f"{_target(search)} tokens on the {len(search['provenance']['documents'])} training novels that were searched "
        f"on is {-own:.2%} below YaRN's. On the {count} held-out novels it is {mine['perplexity_tail']:.2f} against "
        f"{yarns['perplexity_tail']:.2f}, {ratio:.4f} times as much [{span[0]:.4f}, {span[1]:.4f}] and lower on "
        f"{better} of {count}: {said}. Its gain over truncation is {mine['gain']:.3f}, YaRN's {yarns['gain']:.3f}; "
        f"inside the trained length it changes perplexity by {_short(heldout, 'longrope'):+.1%}, YaRN by "
        f"{_short(heldout, 'yarn'):+.1%}.\n"
    )


def measured() -> str:
    """Return the text between the marks."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECOMMEND.glob("*.json"))]
    found = json.loads((SEARCH / "tiny-rope.json").read_text(encoding="utf-8"))
    return f"{recommend_table(results)}\n## What the search found\n{search_sentence(found)}"


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
