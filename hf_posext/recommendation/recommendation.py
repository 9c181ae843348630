"""Recommendation: the answer, its reasons, its certainty, and its cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..deprecation import RenamedAttribute
from ..escaping import html_table, visible
from ..evaluation.reading import write_atomically
from ..plan import ExtensionPlan

if TYPE_CHECKING:
    import pandas as pd

EXTEND, AS_IT_IS, TRUNCATE = "extend", "as it is", "truncate"
"""Answers: apply a method, use the unpatched model, or truncate because no method is worth it."""


@dataclass(frozen=True)
class Recommendation:
    """Result of [`recommend`]: the method for longer texts, if any.

    Args:
        model (`str`): name of the model.
        answer (`str`): `"extend"`, `"as it is"`, or `"truncate"`.
        plan (`ExtensionPlan`): plan for `patch_model`. With `"truncate"`, it changes nothing and ends at the trained
            length.
        trained_length, target_length (`int`): lengths in tokens.
        best (`Mapping`): entry of `contenders` that ranks first within the limit, or first of all if none is within
            the limit. It is set even if truncation is better.
        gain (`float`): tail perplexity of the control at the target, divided by that of the best contender. Above 1
            the longer context helps.
        gain_ci95 (`tuple[float, float]`, *optional*): paired 95 % interval over documents; `None` for one document.
        control_documents (`int`): number of documents for the gain.
        short_limit (`float`): largest relative increase of perplexity allowed inside the trained length.
        contenders (`tuple[Mapping, ...]`): an entry for each measured contender, those with most documents first:
            `method`, `factor`, `documents`, `perplexity_tail`, `ratio` to the best on the same documents,
            `ratio_ci95`, `short_change`, `short_change_ci95`, `passkey`, `failure`.
        cost (`Mapping`): `tokens` processed by the model, the `budget`, and `exhaustive_tokens`, the cost of all
            contenders on all documents.
        use (`Mapping`): cost in use: `seconds` for the target length with the best contender, `seconds_trained` for
            the trained length with the unpatched model, and `cache_bytes_per_token` of the KV cache. Each may be
            `None`.
        left_out (`Mapping[str, str]`): reason for each method and contender that was not measured.
        notes (`tuple[str, ...]`): further remarks.
        provenance (`Mapping`): settings needed to repeat the measurement.
    """

    model: str
    answer: str
    plan: ExtensionPlan
    trained_length: int
    target_length: int
    best: Mapping[str, Any]
    gain: float
    gain_ci95: tuple[float, float] | None
    control_documents: int
    short_limit: float
    contenders: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, int]
    use: Mapping[str, float | None]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Recommendation({visible(self.model)}: {visible(self._answer())})"

    def _repr_html_(self) -> str:
        return html_table({"model": self.model, "plan": self.plan.describe(), "text": self.describe()})

    def to_frame(self) -> pd.DataFrame:
        """Return the contenders as a table."""
        import pandas

        return pandas.DataFrame(self.contenders)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types. Non-finite numbers become `None`."""
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        text = json.dumps(
            {**_plain(content | {"plan": self.plan.to_dict()}), "text": self.describe()}, allow_nan=False
        )
        plain: dict[str, Any] = json.loads(text)
        return plain

    def save(self, path: str | Path) -> Path:
        """Write the plan to a file, for `ExtensionPlan.load`."""
        return write_atomically(path, json.dumps(self.plan.to_dict(), indent=2, allow_nan=False) + "\n")

    def describe(self) -> str:
        """Return the answer, its certainty, and its cost in a few sentences."""
        sentences = (self._answer(), self._certainty(), self._inside(), self._use(), self._finetuning(), *self.notes)
        return " ".join(filter(None, sentences))

    frame = RenamedAttribute("to_frame")
    save_plan = RenamedAttribute("save")
    text = RenamedAttribute("describe")

    def _answer(self) -> str:
        best, plural = _title(self.best), "s" if self.control_documents > 1 else ""
        evidence = (
            f"gain over truncation {self.gain:.3f}{_span(self.gain_ci95)}, {self.control_documents} document{plural}"
        )
        if self.answer == EXTEND:
            return f"Use {best} to read {self.target_length} tokens ({evidence})."
        if self.answer == AS_IT_IS:
            return f"Change nothing: the model reads {self.target_length} tokens as it is ({evidence})."
        advice = f"Do not extend: truncate the input to the last {self.trained_length} tokens."
        if not self.best["short_change"] <= self.short_limit:
            limit = _percent(self.short_limit)
            return f"{advice} No contender keeps the change inside the trained length within {limit}."
        return f"{advice} Under the limit {best} reads {self.target_length} tokens best, yet no better ({evidence})."

    def _certainty(self) -> str:
        rivals = [line for line in self.contenders if line is not self.best and line["failure"] is None]
        within = [line for line in rivals if line["short_change"] <= self.short_limit]
        second = self._second([line for line in within if line["documents"] == self.best["documents"]])
        beyond = min((line for line in rivals if line not in within), key=lambda line: line["ratio"], default=None)
        if beyond is None or beyond["ratio"] >= 1:
            return second
        return (
            f"{second} {_title(beyond)} reads the target better (by {_percent(1 - beyond['ratio'])}), but is over the "
            f"limit: inside the trained length it changes perplexity by {_percent(beyond['short_change'])}."
        )

    def _second(self, finalists: list[Mapping[str, Any]]) -> str:
        if not finalists:
            return "No other contender came as far."
        second = min(finalists, key=lambda line: line["ratio"])
        span = second["ratio_ci95"]
        behind = span is not None and span[0] > 1
        sure = "clearly behind" if behind else "which the documents cannot tell apart from it"
        keys = ""
        if second["passkey"] is not None and self.best["passkey"] is not None:
            keys = f"; it finds {second['passkey']:.0%} of the passkeys, the first {self.best['passkey']:.0%}"
        times = f"{second['ratio']:.3f} times its perplexity{_span(span)}"
        return f"Next is {_title(second)} with {times}, {sure}{keys}."

    def _inside(self) -> str:
        span = self.best["short_change_ci95"]
        ends = "" if span is None else f" [{_percent(span[0])}, {_percent(span[1])}]"
        return (
            f"Inside the trained {self.trained_length} tokens {_title(self.best)} changes perplexity by "
            f"{_percent(self.best['short_change'])}{ends}."
        )

    def _use(self) -> str:
        costs = []
        seconds, trained, size = self.use["seconds"], self.use["seconds_trained"], self.use["cache_bytes_per_token"]
        if seconds and trained:
            costs.append(
                f"reading {self.target_length} tokens took {seconds:.2g} s here, and {self.trained_length} tokens "
                f"without it {trained:.2g} s"
            )
        if size:
            before, after = (size * length / 2**20 for length in (self.trained_length, self.target_length))
            costs.append(f"the KV cache grows from {before:.3g} to {after:.3g} MiB")
        return f"In use, {'; '.join(costs)}." if costs else ""

    def _finetuning(self) -> str:
        if self.answer == EXTEND:
            return "What fine-tuning would add was not measured (hf-posext finetune)."
        return "What fine-tuning would add was not measured."


def title(method: str, factor: float) -> str:
    """Return the display name of a contender: the method, and its factor unless that is 1."""
    return method if factor == 1 else f"{method} x{factor:.4g}"


def _title(line: Mapping[str, Any]) -> str:
    return "the model as it is" if line["method"] == "none" else title(line["method"], line["factor"])


def _span(ends: Any) -> str:
    """Format an interval as `" [0.980, 1.010]"`; `None` as an empty text."""
    return "" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
