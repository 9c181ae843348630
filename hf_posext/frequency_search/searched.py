"""The result of a search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.reading import write_atomically
from ..methods import LongRoPE
from ..plan import ExtensionPlan

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SearchedFactors:
    """
    The best factors of a search, as the plan of LongRoPE.

    The plan is native: a checkpoint that is saved with it opens in plain transformers, without this package.

    Args:
        plan (`ExtensionPlan`): of [`LongRoPE`] with the factors; for `patch_model`.
        objective (`str`): what was made small: `"tail"` or `"key-tokens"`.
        perplexity (`float`): of the objective's tokens, on the documents of the search. Of others it is larger.
        seeds (`Mapping[str, float]`): the same of the factors of YaRN and of NTK-aware interpolation.
        history (`tuple[Mapping, ...]`): by `generation`: `measured` genomes so far, and the `best` perplexity.
        provenance (`Mapping`): what is needed to search again.
    """

    plan: ExtensionPlan
    objective: str
    perplexity: float
    seeds: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, Any]

    @property
    def method(self) -> LongRoPE:
        """With the factors; for [`compare`] and `patch_model`."""
        (given,) = self.plan.parameters
        return LongRoPE(**{key: value for key, value in given.items() if key != "name"})

    def frame(self) -> pd.DataFrame:
        """The history, a line for each generation."""
        import pandas

        return pandas.DataFrame(self.history)

    def describe(self) -> str:
        """One line: what was found, against the better seed."""
        name = min(self.seeds, key=lambda seed: self.seeds[seed])
        gain = self.seeds[name] / self.perplexity - 1
        told = f"{100 * gain:.1f} % below {name}'s" if gain > 0 else f"no better than {name}'s"
        measured = self.history[-1]["measured"]
        return (
            f"{self.objective} perplexity {self.perplexity:.2f} at {self.plan.target_length} tokens, {told} "
            f"{self.seeds[name]:.2f}, after {measured} genomes; on the documents of the search: measure it on others"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        whole = {
            "plan": self.plan.to_dict(),
            "objective": self.objective,
            "perplexity": self.perplexity,
            "seeds": dict(self.seeds),
            "history": [dict(line) for line in self.history],
            "provenance": dict(self.provenance),
        }
        plain: dict[str, Any] = json.loads(json.dumps(whole, allow_nan=False))
        return plain

    def save_plan(self, path: str | Path) -> Path:
        """Write the plan to a file, for `ExtensionPlan.load`."""
        return write_atomically(path, json.dumps(self.plan.to_dict(), indent=2, allow_nan=False) + "\n")
