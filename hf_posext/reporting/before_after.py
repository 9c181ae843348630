"""A model before and after it was trained on, as one comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InvalidParameterError
from ..evaluation.protocols.control import CONTROL
from ..evaluation.results.results import Results
from ..evaluation.results.rows import Conditions, make_rows
from .merge import differences

if TYPE_CHECKING:
    from collections.abc import Mapping

THIS_MODEL = "this model"


def before_after(before: Results, after: Results) -> Results:
    """One comparison of a model before and after: gain over the truncated context, and change against the unpatched
    model, are of the same documents on both sides.

    Args:
        before ([`Results`]): of the base model: `"none"`, and whatever else it was compared with ([`compare`]); with
            the control where there is to be a gain.
        after ([`Results`]): of the extended or trained model alone ([`evaluate_perplexity`]).

    Returns:
        [`Results`]: all rows of `before`, and those of `after` under the name `"this model"`.

    Raises:
        InvalidParameterError: `after` is of several methods, or the two were measured otherwise.
    """
    methods = list(dict.fromkeys(row["method"] for row in after.rows))
    if len(methods) != 1:
        raise InvalidParameterError(
            f"results of the model after are of {', '.join(methods) or 'no method'}; measure it alone: "
            "evaluate_perplexity(model, ...)"
        )
    apart = differences([before, after])
    if apart:
        raise InvalidParameterError(f"before and after cannot be compared. {apart[0]} Measure both in the same way")
    records = [record | {"method": THIS_MODEL} for record in after.per_document]
    named = {key: _records(before, key) for key in (CONTROL, "none")}
    lengths = {record["length"] for record in records}
    for name, held in named.items():
        if held and not lengths <= {record["length"] for record in held}:
            raise InvalidParameterError(
                f"{name} was not measured at every length of the model after; measure it there"
            )
    row = after.rows[0]
    joined = row["documents"] // sum(record["length"] == row["length"] for record in records)
    conditions = Conditions(row["protocol"], row["bos"], row["dtype"], joined)
    rows = make_rows(
        records,
        conditions=conditions,
        control=_matching(named[CONTROL], records),
        baseline=_matching(named["none"], records),
        seed=before.provenance.get("seed") or 0,
    )
    rows = [_with_extras(new, old) for new, old in zip(rows, _by_length(after), strict=True)]
    retrieval = [entry | {"method": THIS_MODEL} for entry in after.retrieval]
    return Results(
        dict(before.provenance),
        [*before.rows, *rows],
        [*before.per_document, *records],
        [*before.retrieval, *retrieval],
    )


def _records(results: Results, method: str) -> list[dict[str, Any]]:
    return [record for record in results.per_document if record["method"] == method]


def _matching(held: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of another method on the same documents, in the same order."""
    if not held:
        return []
    by_key = {(record["document"], record["length"]): record for record in held}
    return [by_key[record["document"], record["length"]] for record in records]


def _by_length(results: Results) -> list[Mapping[str, Any]]:
    return sorted(results.rows, key=lambda row: row["length"])


def _with_extras(row: dict[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What no sums give again: passkeys, LongPPL."""
    return {**row, **{key: value for key, value in measured.items() if key not in row}}
