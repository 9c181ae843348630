"""A method of your own package, which `hf_posext` finds by its entry point.

A method is one small class of pure maths, and `hf_posext` needs no change for it. This one is Su Jianlin's
NTK-RoPE-mixed. A package names it in its `pyproject.toml`,

    [project.entry-points."hf_posext.methods"]
    ntk-mixed = "my_package.ntk_mixed:NTKMixed"

After its installation `patch_model(model, "ntk-mixed")`, `--methods ntk-mixed` and `"ntk-mixed+dual-chunk"` work. To
be that package, this file writes the two small files that pip would write.

python examples/07_custom_method.py
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_posext import compare, list_methods, load_documents
from hf_posext.errors import InvalidParameterError
from hf_posext.methods import FrequencyMethod
from hf_posext.methods.rotary import as_longrope, frequencies
from hf_posext.plan import ExtensionPlan, RotaryPlan
from hf_posext.reporting import print_tables
from hf_posext.scheme import Rotary
from hf_posext.testing import check_method

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class NTKMixed(FrequencyMethod):
    """Between NTK-aware and linear: each digit of a position has its own base.

    `inv_freq_i * exp(-a * (i + 1) ** power)`, with `a` such that the slowest of the `n` pairs is divided by the whole
    factor: `a = ln(factor) / n ** power`.

    Args:
        power (`float`, *optional*, defaults to 0.625): 0 is linear interpolation, 1 almost NTK-aware.
    """

    name: ClassVar[str] = "ntk-mixed"
    title: ClassVar[str] = "NTK-RoPE-mixed"
    url: ClassVar[str] = "https://kexue.fm/archives/9706"

    power: float = 0.625

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise InvalidParameterError(f"Expected a power of 0 to 1, got {self.power}.")

    def rescale(self, rotary: Rotary, current: RotaryPlan, plan: ExtensionPlan) -> RotaryPlan:
        places = torch.arange(1, rotary.pairs + 1, dtype=torch.float32)
        slower = torch.exp(-math.log(plan.factor) * (places / rotary.pairs) ** self.power)
        return as_longrope(rotary, frequencies(current, rotary) * slower, plan)


def install(folder: Path) -> None:
    """Write the metadata that `pip install` writes for a package with this method. Its module is this file."""
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    entry = f"[hf_posext.methods]\nntk-mixed = {Path(__file__).stem}:NTKMixed\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")
    sys.path += [str(folder), str(HERE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "tiny" / "tiny-rope", help="folder or Hub id")
    parser.add_argument("--dataset", default=HERE / "data" / "heldout.jsonl")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["none", "linear", "ntk", "ntk-mixed"])
    parser.add_argument("--factor", type=float, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048])
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        (info,) = [method for method in list_methods("rotary") if method.name == NTKMixed.name]
    print(f"{info.name}: {info.title}, {info.url}\n{info.summary}\n")
    check_method(NTKMixed())
    print("It keeps the contract: plan, effect, undo, cache, padding, save and load.\n")
    results = compare(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(options.model),
        load_documents(options.dataset, limit=options.documents),
        options.methods,
        factor=options.factor,
        lengths=options.lengths,
        start=2000,  # past the front matter of a novel
    )
    print_tables(results)


if __name__ == "__main__":
    main()
