"""Write `docs/architectures.md`, the list of rotary models that can be patched, from the results of the three sweeps.

python tools/sweep_table.py --collect   # first make the result files from the last `make sweep`
python tools/sweep_table.py             # write the table
python tools/sweep_table.py --check     # exit 1 if the committed table is out of date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import transformers
from pages import ROOT, publish
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.append(str(ROOT / "benchmarks"))
from output import machine  # type: ignore[import-not-found]

# Where pytest's cache keeps what the sweep sets under "sweep/...".
CACHE = ROOT / ".pytest_cache" / "v" / "sweep"
FREQUENCIES = ROOT / "results" / "sweep-frequencies.json"
LATE = ROOT / "results" / "sweep-late.json"
MORE = ROOT / "results" / "sweep-methods.json"
TABLE = ROOT / "docs" / "architectures.md"
METHODS = ("linear", "yarn", "llama3", "longrope")
CHECKS = ("full", "padded", "decode", "doubled", "remapped", "undo")

HEAD = """\
# Architectures

Made by `make sweep`, not edited by hand.

## Frequency methods

transformers {transformers}: of {causal} causal-LM types, {rotary} have rotary frequencies. Of these {works} work,
{refused} are refused and {fails} fail. {other} have another scheme; the frequency methods are refused by name. No tiny
model of {not_built} is built.

For each type a tiny random model is patched at factor 4. The logits past the trained length must change; they must
equal those of a model of the same weights that transformers itself configured; linear interpolation by 4 must give at
position 4p what the unpatched model gives at p (where the model ships unscaled); `undo` must restore every bit.
Sliding windows are wider than the trained length here, so that every set of frequencies is patched. A set whose
layers see less than that stays as it is, and needs no list for longrope.

- `=`: works, and equals transformers' own to the bit.
- `works`: everything except that comparison, which transformers cannot run; the note gives the reason.

| type | rotary sets | linear | yarn | llama3 | longrope | note |
|---|---|---|---|---|---|---|
"""

LATE_HEAD = """
## Remapping methods

These rotate inside attention: rerope, self-extend, dual-chunk and similar ones. transformers {transformers}: of {all}
rotary causal-LM types, {works} work, {refused} are refused by name and {fails} fail. Checked on the same tiny models,
with sliding windows smaller than the input where a model has them:

- full, padded, decode: with a window beyond the input, the logits equal the unpatched model's in a full forward, in a
  left-padded batch of three lengths, and in cached decoding token by token.
- doubled: with every position doubled inside attention, the logits equal those of the unpatched model at doubled
  positions.
- remapped: with a window within the input they change, and cached decoding agrees with the full forward.
- undo: restores every bit, and leaves nothing on the model or in the registries of transformers.

Equal means within 1e-5 of the largest logit. Indexers (DeepSeek's sparse attention) still select keys by the positions
of the unpatched model.

| type | full | padded | decode | doubled | remapped | undo | note |
|---|---|---|---|---|---|---|---|
"""

MORE_HEAD = """
## Methods that fade, follow rows or map pairs

On the same models. Each of these must change the logits past the trained length and leave no trace after `undo`, or is
refused by name. Groups of pairs that are all alike (`dpe`) must give what `self-extend` gives.

| method | works | refused | fails |
|---|---:|---:|---:|
"""


def collect() -> dict[Path, dict[str, Any]]:
    """Return the content of the result file of each sweep that the cache of pytest contains.

    Raises:
        ValueError: if there is none, or if types are missing or were swept under another version of transformers.
    """
    rotary, late, by_method, schemes, not_built = (
        {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted((CACHE / kind).glob("*"))}
        for kind in ("rotary", "late", "methods", "other", "not_built")
    )
    types = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unswept = types - rotary.keys() - schemes.keys() - not_built.keys() if rotary else set()
    reference = rotary or json.loads(FREQUENCIES.read_text(encoding="utf-8"))["rotary"]
    for swept in filter(None, (late, by_method)):
        unswept |= reference.keys() ^ swept.keys()
    records = [*rotary.values(), *late.values(), *by_method.values()]
    stale = sum(record.pop("transformers") != transformers.__version__ for record in records)
    if unswept or stale or not records:
        raise ValueError(
            f"Expected all types swept under this transformers, got {len(unswept)} missing and {stale} stale. "
            "Run make sweep."
        )
    version = {"transformers": transformers.__version__, "machine": machine()}
    contents = {
        FREQUENCIES: {"rotary": rotary, "other": schemes, "not_built": not_built},
        LATE: {"rotary": late},
        MORE: {"rotary": by_method},
    }
    return {path: version | content for path, content in contents.items() if content["rotary"]}


def verdict(record: dict[str, Any]) -> str:
    """Return `works`, `refused` or `fails`. A type works if linear, yarn and llama3 work; longrope needs lists."""
    cells = [record["cells"][method]["verdict"] for method in METHODS]
    if "fails" in cells:
        return "fails"
    return "refused" if "refused" in cells[:3] else "works"


def show_sets(sets: list[dict[str, Any]]) -> str:
    """Return the sets of frequencies in a few words: `full_attention: 8 pairs, base 1e+06`."""
    words = []
    for rotary in sets:
        name = f"{rotary['name']}: " if rotary["name"] else ""
        shipped = "" if rotary["shipped_type"] == "default" else f", {rotary['shipped_type']}"
        words.append(f"{name}{rotary['pairs']} pairs, base {rotary['theta']:g}{shipped}")
    return "; ".join(words)


def render_late(results: dict[str, Any]) -> str:
    """Return the table of the remapping methods as Markdown."""
    cells = {name: [record["verdicts"][check] for check in CHECKS] for name, record in results["rotary"].items()}
    fails = sum("fails" in row for row in cells.values())
    refused = sum("refused" in row and "fails" not in row for row in cells.values())
    counts = {"all": len(cells), "works": len(cells) - fails - refused, "refused": refused, "fails": fails}
    text = LATE_HEAD.format(transformers=results["transformers"], **counts)
    for name, row in cells.items():
        text += f"| {name} | {' | '.join(row)} | {results['rotary'][name]['reason']} |\n"
    return text


def render_more(results: dict[str, Any]) -> str:
    """Return the table of the third sweep, followed by the refused types by reason."""
    rotary, text = results["rotary"], MORE_HEAD
    for method in next(iter(rotary.values()))["verdicts"]:
        verdicts = [record["verdicts"][method] for record in rotary.values()]
        counts = (str(verdicts.count(word)) for word in ("works", "refused", "fails"))
        text += f"| `{method}` | {' | '.join(counts)} |\n"
    refused: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for name, record in rotary.items():
        for method, reason in record["reasons"].items():
            # without the type, the method and the advice, the reason is the same for all types of a kind
            kind = re.sub(
                rf"^{name}(_text)?:? (model\S* )?| for {method.partition('(')[0]}$",
                "",
                re.split("; |, got ", reason)[0],
            )
            methods, types = refused.setdefault(kind, ({}, {}))
            methods[f"`{method}`"] = types[name] = None
    text += "\nRefused:\n\n"
    return text + "".join(
        f"- {kind} ({', '.join(methods)}): {', '.join(types)}\n" for kind, (methods, types) in refused.items()
    )


def render(results: dict[str, Any], late: dict[str, Any], methods: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
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
    text += render_late(late) + render_more(methods)
    text += "\n## Other schemes\n\n"
    schemes = sorted(set(results["other"].values()))
    for scheme in schemes:
        types = ", ".join(name for name, its in results["other"].items() if its == scheme)
        text += f"- **{scheme}**: {types}\n"
    text += "\n## Not built\n\n"
    text += "".join(f"- {name}: {reason}\n" for name, reason in results["not_built"].items())
    return text


def pages() -> dict[Path, str]:
    """Return the page of the result files."""
    return {TABLE: render(*(json.loads(file.read_text(encoding="utf-8")) for file in (FREQUENCIES, LATE, MORE)))}


def write_results() -> None:
    """Write the records of the last sweep to the result files."""
    for file, results in collect().items():
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(publish(__doc__, pages, collect=write_results))
