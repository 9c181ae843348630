"""Model cards with a comparison of a model before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.load import CARD_FILE, CONFIG_FILE, AdapterDirectory
from ..adapters.save import card_data, how_to_open, public_name, tags
from ..errors import InvalidParameterError
from ..evaluation.reading import write_atomically
from ..evaluation.results import Results
from ..evaluation.rows import Conditions, DocumentRecord, RetrievalRow, Row, make_rows
from ..evaluation.windows import CONTROL
from ..plan import ExtensionPlan
from .drawing import plot_perplexity
from .report import differences, flatten, render_template, results_to_model_index
from .tables import by_method, control_name, describe_methods, grids, lengths_of, notes

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

THIS_MODEL = "this model"


def before_after(before: Results, after: Results) -> Results:
    """Return one comparison of a model before and after training or extension.

    The gain over the truncated context and the change against the unpatched model are computed on the same documents.

    Args:
        before ([`Results`]): results of the base model from [`compare`], including `"none"`. The gain requires the
            truncation control.
        after ([`Results`]): results of the extended or trained model alone, from [`evaluate_perplexity`].

    Returns:
        [`Results`]: all rows of `before`, and those of `after` under the name `"this model"`.

    Raises:
        InvalidParameterError: `after` contains several methods or none, the two were measured with different
            settings, or `before` lacks a length of `after`.
    """
    methods = list(dict.fromkeys(row["method"] for row in after.rows))
    if len(methods) != 1:
        raise InvalidParameterError(
            f"Expected after to be results of one model alone, got those of {', '.join(methods) or 'no method'}. Pass "
            "what evaluate_perplexity(model, ...) returns."
        )
    apart = differences([before, after])
    if apart:
        raise InvalidParameterError(
            f"Expected before and after to be measured in the same way, got differences. {apart[0]} Measure both in "
            "the same way."
        )
    records = [DocumentRecord(record, method=THIS_MODEL) for record in after.per_document]
    control, unpatched = (
        [record for record in before.per_document if record.method == name] for name in (CONTROL, "none")
    )
    lengths = {record["length"] for record in records}
    for name, known in ((CONTROL, control), ("none", unpatched)):
        if known and not lengths <= {record["length"] for record in known}:
            raise InvalidParameterError(
                f"Expected {name} at every length of the model after, got "
                f"{sorted({record['length'] for record in known})}. Measure it at {sorted(lengths)}."
            )
    row = after.rows[0]
    joined = row["documents"] // sum(record["length"] == row["length"] for record in records)
    conditions = Conditions(row["protocol"], row["bos"], row["dtype"], joined)
    rows = make_rows(
        records,
        conditions=conditions,
        control=_matching(control, records),
        baseline=_matching(unpatched, records),
        seed=before.provenance.get("seed") or 0,
    )
    measured = sorted(after.rows, key=lambda row: row.length)
    # Passkeys and LongPPL cannot be computed from sums of NLL, so the measured values are kept.
    rows = [Row({**row, **computed}) for row, computed in zip(measured, rows, strict=True)]
    retrieval = [RetrievalRow(entry, method=THIS_MODEL) for entry in after.retrieval]
    return Results(
        dict(before.provenance),
        [*before.rows, *rows],
        [*before.per_document, *records],
        [*before.retrieval, *retrieval],
    )


def _matching(known: list[DocumentRecord], records: list[DocumentRecord]) -> list[DocumentRecord]:
    """Return another method's records of the same documents, in the same order; an empty list without such records."""
    by_key = {(record["document"], record["length"]): record for record in known}
    missing = [record["document"] for record in records if (record["document"], record["length"]) not in by_key]
    if known and missing:
        raise InvalidParameterError(
            f"Expected the same documents before and after, got no {missing[0]!r} before. Measure both on these."
        )
    return [by_key[record["document"], record["length"]] for record in records] if known else []


PICTURE = "before_after.png"
MEASURED = ("model", "dataset", "split", "revision", "protocol", "start", "dtype", "seed", "versions")
"""Settings of the measurement shown on a card."""


def write_model_card(
    directory: str | Path, before: Results, after: Results, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write the card of a saved adapter or checkpoint: `README.md` and `before_after.png`.

    Args:
        directory (`str` or `Path`): directory written by [`save_adapter`] or `patch.save_pretrained`. The two files
            are replaced.
        before ([`~hf_posext.evaluation.Results`]): results of the base model. The gain requires the control.
        after ([`~hf_posext.evaluation.Results`]): results of this model, measured with the same settings.
        training (`Mapping`, *optional*): provenance of the training, with any nesting.

    Returns:
        `Path`: the `README.md`.

    Raises:
        InvalidParameterError: before and after cannot be compared.
        PlanError, CheckpointError: the directory contains no adapter and no plan, or corrupt ones.
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    card = model_card(directory, before, after, training=training)
    plot_perplexity(before_after(before, after), directory / PICTURE)
    return write_atomically(directory / CARD_FILE, str(card))


def model_card(
    directory: str | Path, before: Results, after: Results, *, training: Mapping[str, Any] | None = None
) -> ModelCard:
    """Return the text of the card, with its metadata and the `model-index` of the measured values.

    Args:
        directory, before, after, training: as in [`write_model_card`].

    Returns:
        `huggingface_hub.ModelCard`: a card that can be pushed. The picture is a separate file.
    """
    from huggingface_hub import ModelCard, ModelCardData

    directory = Path(directory)
    results = before_after(before, after)
    adapter = AdapterDirectory.read(directory) if (directory / CONFIG_FILE).is_file() else None
    plan = ExtensionPlan.load(directory)
    whole = {"library_name": "transformers", "tags": tags(plan), "pipeline_tag": "text-generation"}
    data = ModelCardData(**whole) if adapter is None else card_data(adapter)
    data.model_name = directory.name
    rows = [Row(row, method=plan.method) for row in results.rows if row.method == THIS_MODEL]
    data.eval_results = results_to_model_index(Results(results.provenance, rows))
    described = zip(by_method(results), describe_methods(results), strict=True)
    text = render_template(
        "card.md.jinja",
        [results],
        name=directory.name,
        base=public_name((adapter and adapter.base_name) or results.provenance.get("model")),
        plan=plan,
        adapter=adapter is not None,
        sentences=[sentence for name, sentence in described if name == "none" or name.startswith(THIS_MODEL)],
        notes=notes(results),
        grids=grids(results),
        picture=PICTURE,
        control=control_name(results),
        trained_length=results.provenance.get("trained_length"),
        how_to_open=how_to_open(directory),
        training=flatten(training or {}),
        limits=_limits(results, plan),
        measured=flatten(
            {key: results.provenance.get(key) for key in MEASURED if results.provenance.get(key) is not None}
        ),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _limits(results: Results, plan: ExtensionPlan) -> list[str]:
    """Return the limits of the figures: gaps of the measurement, and conclusions that it does not support."""
    longest = lengths_of(results)[-1]
    rows = [row for row in results.rows if row["method"] == THIS_MODEL]
    limits = [
        f"The positions are for {plan.target_length} tokens; nothing above {longest} was measured."
        if longest < plan.target_length
        else f"Nothing above {longest} tokens was measured."
    ]
    if not results.short_context():
        limits.append("Its cost inside the trained length was not measured.")
    if all(row.get("passkey") is None for row in rows) and not results.retrieval:
        limits.append("Whether it retrieves distant information was not measured. Perplexity does not show this.")
    if all(row.get("gain") is None for row in rows):
        limits.append("Whether the longer context helps at all was not measured, because there was no control.")
    documents = max(row["documents"] for row in rows)
    read = f"{documents} documents of one kind" if documents > 1 else "one document"
    return [
        *limits,
        f"The figures are of {read}. Other texts and languages may give other values.",
        "It inherits the training data, the licence, and the biases of the base model.",
    ]
