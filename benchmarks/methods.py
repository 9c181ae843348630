"""Gain over truncation and passkeys of every method of the registry, on the shipped models.

Each group of methods is one comparison: eight times the trained length, the first held-out novels, and passkeys if the
model retrieves them. A stopped group continues from its journal in reports/methods.

    python benchmarks/methods.py                                  # every group
    python benchmarks/methods.py --groups tables,biases
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from shipped import ROOT, load, novels

import hf_posext
from hf_posext.errors import InvalidParameterError
from hf_posext.methods import FrequencyMethod, Method, as_method
from hf_posext.methods.base import methods
from hf_posext.scheme import PositionalScheme

RESULTS, JOURNALS = ROOT / "results" / "methods", ROOT / "reports" / "methods"
DOCUMENTS, START, TRAINED, FACTOR, PASSKEYS = 4, 2000, 512, 8, 5
LENGTHS = [512, 1024, 2048, 4096]

ON_TOP = {
    "log-n": "rerope+log-n",
    "llama4-temperature": "rerope+llama4-temperature",
    "resonance": "yarn+resonance",
    "fade": "rerope+fade",
    "decay": "leaky-rerope+decay",
    "dpe": "dpe(table='llama-3', window=256)",
}
"""Compositions that stand for methods which need a base method."""


@dataclass(frozen=True)
class Group:
    """
    Methods that are compared with each other on one model.

    Args:
        model (`str`): name of a shipped model.
        holds (`Callable[[type[Method]], bool]`): whether a method belongs to the group.
        variants (`tuple[str, ...]`, *optional*): further methods, with settings of their own.
        passkeys (`int`, *optional*): trials at each length. 0 for a model that finds few within its trained length,
            and for methods whose passkeys are in `results/fading`.
    """

    model: str
    holds: Callable[[type[Method]], bool]
    variants: tuple[str, ...] = ()
    passkeys: int = PASSKEYS


def remaps(method: type[Method]) -> bool:
    """Return whether a method acts inside attention."""
    return method.kinds == ("rotary",) and not issubclass(method, FrequencyMethod)


GROUPS = {
    "tables": Group("tiny-learned", lambda method: "learned" in method.kinds, passkeys=0),
    "biases": Group("tiny-alibi", lambda method: "alibi" in method.kinds),
    "frequencies": Group("tiny-rope", lambda method: issubclass(method, FrequencyMethod), ("yarn(variant='radix')",)),
    "remapping": Group(
        "tiny-rope",
        remaps,
        (
            "jet-long(offset=True)",
            "jet-long(frequencies=True)",
            "leaky-rerope+fade",
            "self-extend+fade",
            "dual-chunk+fade",
        ),
        passkeys=0,
    ),
}


def chosen(group: Group, scheme: PositionalScheme) -> list[Method]:
    """Return the methods of a group: plain, on top of another method, or as their example if defaults fail."""
    chosen_methods: list[Method] = (
        [] if scheme.ends else [as_method("none")]
    )  # a table ends, so `none` cannot read as far
    for name, cls in methods().items():
        if name == "none" or not group.holds(cls):
            continue
        method = as_method(ON_TOP.get(name, name))
        try:
            method.plan(scheme, factor=FACTOR, trained_length=TRAINED)
        except InvalidParameterError:
            method = cls.example(scheme)
        chosen_methods.append(method)
    return [*chosen_methods, *map(as_method, group.variants)]


def measure(name: str) -> None:
    """Measure one group and write its result file."""
    group = GROUPS[name]
    model, tokenizer = load(group.model)
    JOURNALS.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)

    def save(results: hf_posext.Results) -> None:
        results.provenance["command"] = f"python benchmarks/methods.py --groups {name}"
        results.save_json(RESULTS / f"{name}.json")

    results = hf_posext.compare(
        model,
        tokenizer,
        novels("heldout", DOCUMENTS),
        chosen(group, hf_posext.detect_scheme(model)),
        lengths=LENGTHS,
        factor=FACTOR,
        trained_length=TRAINED,
        passkey=group.passkeys,
        start=START,
        journal=JOURNALS / f"{name}.jsonl",
        on_method=save,
    )
    save(results)
    for row in results.rows:
        print(name, row["method"], row["length"], f"{row['gain']:.4f}", row.get("passkey"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help="with commas between them")
    for name in parser.parse_args().groups.split(","):
        measure(name)


if __name__ == "__main__":
    main()
