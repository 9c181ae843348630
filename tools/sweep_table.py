"""Write `docs/architectures.md`, which rotary models can be patched, from `results/sweep-frequencies.json`.

python tools/sweep_table.py --collect   # first make the result file from the last `make sweep`
python tools/sweep_table.py             # write the table
python tools/sweep_table.py --check     # exit 1 where the committed table is not what the result file gives
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
# Where pytest's cache keeps what the sweep sets under "sweep/...".
CACHE = ROOT / ".pytest_cache" / "v" / "sweep"
RESULTS = ROOT / "results" / "sweep-frequencies.json"
TABLE = ROOT / "docs" / "architectures.md"
METHODS = ("linear", "yarn", "llama3", "longrope")

HEAD = """\
# Architectures

Made by `make sweep` and `python tools/sweep_table.py --collect`; not edited by hand.

transformers {transformers}: of {causal} causal-LM types, {rotary} have rotary frequencies. Of these {works} work,
{refused} are refused and {fails} fail. {other} have another scheme, and the frequency methods are refused by name;
of {not_built} no tiny model is built.

For each type a tiny random model is patched at factor 4. The logits past the trained length must change; they must
equal those of a model of the same weights that transformers itself configured; linear interpolation by 4 must give at
position 4p what the unpatched model gives at p (where the model ships unscaled); `undo` must restore every bit.
Sliding windows are made wider than the trained length here, so that every set of frequencies is patched; a set whose
layers see less than that is left as it is, and needs no list of longrope.

- `=`: works, and equals transformers' own to the bit.
- `works`: everything but that comparison, which transformers cannot run; the note says why.

| type | rotary sets | linear | yarn | llama3 | longrope | note |
|---|---|---|---|---|---|---|
"""


def collect() -> dict[str, Any]:
    """The records of the last sweep.

    Raises:
        ValueError: types are missing, or were swept under another version of transformers.
    """
    rotary, other, not_built = (
        {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (CACHE / kind).glob("*")}
        for kind in ("rotary", "other", "not_built")
    )
    missing = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - rotary.keys() - other.keys() - not_built.keys()
    stale = [name for name, record in rotary.items() if record["transformers"] != transformers.__version__]
    if missing or stale:
        raise ValueError(f"{len(missing)} types not swept, {len(stale)} under another transformers; run make sweep")
    for record in rotary.values():
        del record["transformers"]
    return {
        "transformers": transformers.__version__,
        "rotary": dict(sorted(rotary.items())),
        "other": dict(sorted(other.items())),
        "not_built": dict(sorted(not_built.items())),
    }


def verdict(record: dict[str, Any]) -> str:
    """`works`, `refused` or `fails`. A type works if linear, yarn and llama3 do; longrope needs lists that fit."""
    cells = [record["cells"][method]["verdict"] for method in METHODS]
    if "fails" in cells:
        return "fails"
    return "refused" if "refused" in cells[:3] else "works"


def show_sets(sets: list[dict[str, Any]]) -> str:
    """The sets of frequencies in a few words: `full_attention: 8 pairs, base 1e+06`."""
    words = []
    for rotary in sets:
        name = f"{rotary['name']}: " if rotary["name"] else ""
        shipped = "" if rotary["shipped_type"] == "default" else f", {rotary['shipped_type']}"
        words.append(f"{name}{rotary['pairs']} pairs, base {rotary['theta']:g}{shipped}")
    return "; ".join(words)


def render(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    verdicts = [verdict(record) for record in results["rotary"].values()]
    counts = {word: verdicts.count(word) for word in ("works", "refused", "fails")}
    sizes = {kind: len(results[kind]) for kind in ("rotary", "other", "not_built")}
    text = HEAD.format(transformers=results["transformers"], causal=sum(sizes.values()), **sizes, **counts)
    for name, record in results["rotary"].items():
        outcomes = [record["cells"][method] for method in METHODS]
        cells = " | ".join("=" if cell.get("equals_native") else cell["verdict"] for cell in outcomes)
        reasons = dict.fromkeys(cell["reason"] for cell in outcomes if "reason" in cell)
        notes = "; ".join([*filter(None, [record["note"]]), *reasons])
        text += f"| {name} | {show_sets(record['sets'])} | {cells} | {notes} |\n"
    text += "\n## Other schemes\n\n"
    schemes = sorted(set(results["other"].values()))
    for scheme in schemes:
        types = ", ".join(name for name, its in results["other"].items() if its == scheme)
        text += f"- **{scheme}**: {types}\n"
    text += "\n## Not built\n\n"
    text += "".join(f"- {name}: {reason}\n" for name, reason in results["not_built"].items())
    return text


def main() -> int:
    """Collect, write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="make the result file from the last sweep first")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    if arguments.collect:
        RESULTS.write_text(json.dumps(collect(), indent=1) + "\n", encoding="utf-8")
    text = render(json.loads(RESULTS.read_text(encoding="utf-8")))
    if arguments.check:
        if TABLE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TABLE.name} is not what {RESULTS.name} gives; run python tools/sweep_table.py", file=sys.stderr)
        return 1
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
