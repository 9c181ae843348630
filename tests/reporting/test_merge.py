"""Several runs in one report."""

from __future__ import annotations

import csv
import io
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from matplotlib.image import imread
from rich.console import Console

from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation import Results
from hf_posext.reporting import (
    differences,
    markdown_table,
    merge_runs,
    merged_grids,
    plot_side_by_side,
    print_grids,
    run_titles,
    write_merged_report,
)

from .helpers import make_results, panels

SCHEMES = {
    "tiny-learned": ("learned", "none", "learned table: no generalization"),
    "tiny-alibi": ("alibi", "extrapolation", "ALiBi: extrapolation"),
    "tiny-rope": ("rotary", "interpolation", "RoPE: interpolation"),
}


def a_run(model: str = "tiny-rope", methods: tuple[str, ...] = ("none", "yarn"), **provenance: Any) -> Results:
    """The rows of some methods, as if measured on that model."""
    lengths = (512, 1024, 2048) if model == "tiny-learned" else (512, 1024, 2048, 4096)
    run = make_results(passkey=False, lengths=lengths)
    kind, generalization, _ = SCHEMES[model]
    run.provenance |= {"model": f"examples/{model}", "kind": kind, "generalization": generalization, **provenance}
    run.rows = [row for row in run.rows if row["method"] in methods]
    run.per_document = [record for record in run.per_document if record["method"] in (*methods, "truncated")]
    return run


def three_schemes() -> dict[str, Results]:
    return {f"{model}.json": a_run(model) for model in SCHEMES}


def test_runs_of_one_model_become_one_and_what_both_measured_is_kept_once() -> None:
    first, second = a_run(methods=("none", "yarn")), a_run(methods=("none", "linear"))
    second.provenance["not_applicable"] = {"table-linear": "table-linear extends learned positions"}
    (merged,) = merge_runs({"a": first, "b": second})
    assert [row["method"] for row in merged.rows] == ["none"] * 4 + ["yarn"] * 4 + ["linear"] * 4
    keys = [(record["document"], record["method"], record["length"]) for record in merged.per_document]
    assert len(keys) == len(set(keys)) == 2 * 4 * 4, "two documents, four lengths, three methods and the control"
    assert merged.provenance["not_applicable"] == second.provenance["not_applicable"]
    assert first.provenance["not_applicable"] == {} and len(first.rows) == 8, "what was given stays as it was"


def test_other_key_tokens_are_another_run() -> None:
    usual = {"evaluator": "yarn x8", "alpha": 2.0, "beta": -2.0, "short_length": 256, "stride": 64, "left_out": []}
    first, second = (a_run(longppl=criterion) for criterion in (usual, {**usual, "alpha": 1.5}))
    runs = merge_runs({"a": first, "b": second})
    assert len(runs) == 2
    assert run_titles(runs) == [
        f"tiny-rope (longppl by yarn x8 with alpha {alpha}, beta -2, short_length 256)" for alpha in ("2", "1.5")
    ]


def test_what_any_run_left_out_is_told_once_with_its_run(tmp_path: Path) -> None:
    short, broken = {"document": "s", "tokens": 7}, {"document": "c", "tokens": 900, "reason": "yarn: not finite"}
    unread = {"passkey": "linear at 4096", "reason": "out of memory"}
    first = a_run(methods=("none", "yarn"), left_out=[short, broken])
    second = a_run(methods=("none", "linear"), left_out=[short, unread])
    third = a_run(methods=("none",), left_out=[short])
    (merged,) = merge_runs({"a": third, "b": first, "c": second})
    assert merged.provenance["left_out"] == [short, {**broken, "run": "b"}, {**unread, "run": "c"}]
    assert third.provenance["left_out"] == [short], "what was given stays as it was"
    (alike,) = merge_runs({"b": first, "again": a_run(methods=("yarn",), left_out=[short, broken])})
    assert alike.provenance["left_out"] == [short, broken], "nothing is ambiguous"
    text = write_merged_report({"a": third, "b": first, "c": second}, tmp_path).read_text()
    assert text.count("Left out: document c in b (yarn: not finite)") == 1
    assert text.count("Left out: passkey linear at 4096 in c (out of memory)") == 1


@pytest.mark.parametrize("order", [("plain", "full"), ("full", "plain")])
def test_what_only_one_run_found_is_kept_whichever_comes_first(order: tuple[str, str]) -> None:
    full = a_run(methods=("none", "yarn"))
    for row in full.rows:
        row |= {"passkey": 0.75, "passkey_trials": 20}
    full.retrieval = [{"method": "none", "factor": 1.0, "task": "needle", "length": 512, "depth": 0.5, "trials": 4}]
    full.retrieval[0]["accuracy"] = 0.5
    plain = a_run(methods=("none",))
    plain.retrieval = [full.retrieval[0] | {"accuracy": None}]
    for row in plain.rows:
        row |= dict.fromkeys(("gain", "gain_ci95", "perplexity_truncated", "perplexity_truncated_tail"))
    for record in plain.per_document:
        record["position_nll_sums"] = None
    (merged,) = merge_runs({name: {"full": full, "plain": plain}[name] for name in order})
    key = itemgetter("method", "length")
    assert sorted(merged.rows, key=key) == sorted(full.rows, key=key)
    key = itemgetter("document", "method", "length")
    assert sorted(merged.per_document, key=key) == sorted(full.per_document, key=key)
    assert merged.retrieval == full.retrieval
    assert plain.rows[0]["gain"] is None and "passkey" not in plain.rows[0], "what was given stays as it was"


def test_runs_that_contradict_each_other_are_refused() -> None:
    altered = a_run()
    altered.rows[0]["nll_sum"] *= 1 + 1e-5
    with pytest.raises(InvalidParameterError, match="a.json and b.json to agree on none at 512"):
        merge_runs({"a.json": a_run(), "b.json": altered})
    altered.rows[0]["nll_sum"] /= 1 + 1e-5 - 1e-8  # what another number of threads may make
    assert len(merge_runs({"a.json": a_run(), "b.json": altered})) == 1


def test_a_run_without_rows_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="Expected rows in b.json, got none"):
        merge_runs({"a.json": a_run(), "b.json": Results({"model": "x"})})


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("protocol", "sliding", "protocol (prefix, sliding)"),
        ("start", 2000, "start (0, 2000)"),
        ("dtype", "bfloat16", "dtype (float32, bfloat16)"),
        ("documents", [{"document": "c", "tokens": 9000}], "documents (2 documents, 1 document)"),
    ],
)
def test_what_was_measured_otherwise_stays_apart_and_says_so(key: str, value: Any, difference: str) -> None:
    runs = merge_runs({"a": a_run(), "b": a_run(**{key: value})})
    assert len(runs) == 2
    assert differences(runs) == [f"Compare within a model, not across: the runs differ in {difference}."]
    titles = run_titles(runs)
    assert len(set(titles)) == 2 and all(title.startswith("tiny-rope (") and key in title for title in titles)
    perplexity = merged_grids(runs, titles)[1]
    assert [name for name, cells in perplexity.rows if not cells] == titles, "each has its block of the table"


def test_as_many_other_documents_are_not_called_the_same() -> None:
    others = [{"document": "a", "tokens": 9000}, {"document": "c", "tokens": 8000}]
    runs = merge_runs({"a": a_run(), "b": a_run(documents=others)})
    assert len(runs) == 2 and "documents (2 documents each, not the same)" in differences(runs)[0]


def asked(trials: int, seed: int = 0, depths: tuple[float, ...] = (0.0, 1.0)) -> Results:
    """A run that has asked this many passkeys, and as many retrieval questions at each depth."""
    run = a_run(seed=seed)
    for row in run.rows:
        row |= {"passkey": 0.5, "passkey_trials": trials}
    answer = {"method": "none", "factor": 1.0, "task": "passkey", "length": 512, "accuracy": 0.5, "trials": trials}
    return Results(run.provenance, run.rows, run.per_document, [{**answer, "depth": depth} for depth in depths])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            asked(8),
            "passkeys (4 trials, seed 0, 8 trials, seed 0); retrieval (4 trials at depths 0/1, seed 0, 8 trials",
        ),
        (asked(4, seed=1), "passkeys (4 trials, seed 0, 4 trials, seed 1); retrieval"),
        (asked(4, depths=(0.5,)), "retrieval (4 trials at depths 0/1, seed 0, 4 trials at depths 0.5, seed 0)"),
    ],
)
def test_answers_to_other_questions_stay_apart(other: Results, difference: str) -> None:
    """One table would show them under the trials of the first, and drop the second answers of a method of both."""
    runs = merge_runs({"a": asked(4), "b": other, "without": a_run(), "again": asked(4)})
    assert len(runs) == 2 and difference in differences(runs)[0]
    assert len(set(run_titles(runs))) == 2
    assert [row["passkey_trials"] for row in runs[0].rows] == [4] * len(runs[0].rows)


def test_runs_that_were_measured_alike_need_no_warning() -> None:
    runs = merge_runs(three_schemes())
    assert differences(runs) == [] and run_titles(runs) == list(SCHEMES)


def test_titles_are_never_alike() -> None:
    first, second = a_run(documents=[{"document": "a"}]), a_run(documents=[{"document": "b"}])
    assert run_titles(merge_runs({"a": first, "b": second})) == ["tiny-rope #1", "tiny-rope #2"]


def test_one_table_has_a_block_for_each_model_and_fits_80_columns() -> None:
    runs = merge_runs(three_schemes())
    short_context, perplexity, gain = merged_grids(runs, run_titles(runs))
    assert perplexity.lengths == (512, 1024, 2048, 4096) and short_context.lengths == (512,)
    names = [name for name, _ in perplexity.rows]
    assert names == [name for model in SCHEMES for name in (model, "truncated to 512", "none", "yarn x8")]
    assert dict(perplexity.rows)["yarn x8"][3] == "38.4 (37.6)"
    assert perplexity.rows[3][1][3] == "", "the learned table was not measured at 4096"
    assert "| **tiny-alibi** |  |  |  |  |" in markdown_table(gain).splitlines()
    console = Console(width=80, record=True, file=io.StringIO())
    print_grids([short_context, perplexity, gain], ["That is all."], console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1] == "That is all."
    assert sum(line.strip() == "tiny-alibi" for line in lines) == 3


def test_the_short_context_check_comes_first_also_where_the_first_run_has_none() -> None:
    runs = [a_run("tiny-alibi", trained_length=256), a_run()]
    titles = [grid.title for grid in merged_grids(runs, ["one", "two"])]
    assert len(titles) == 3 and titles[0].startswith("Short-context check")
    assert titles[1:] == [grid.title for grid in merged_grids(runs[:1], ["one"])]


def test_the_picture_has_a_column_for_each_model_under_its_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list(three_schemes().values())
    drawn = panels(lambda: plot_side_by_side(runs, list(SCHEMES), tmp_path / "p.png"), monkeypatch)
    assert imread(tmp_path / "p.png").shape[1] == 1800
    uppers, lowers = drawn[:3], drawn[3:]
    titles = [panel.get_title().replace(":\n", ": ") for panel in uppers]
    assert titles == [f"{name}\n{words}" for name, (*_, words) in SCHEMES.items()]
    for row in (uppers, lowers):
        assert len({panel.get_ylim() for panel in row}) == 1, "one scale, so that columns can be compared"
    legends = [dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True)) for panel in lowers]
    assert len({legend["yarn x8"].lines[0].get_color() for legend in legends}) == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_models_is_drawn(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = [f"model {i}" for i in range(count)]
    drawn = panels(lambda: plot_side_by_side([a_run()] * count, titles, tmp_path / "p.png"), monkeypatch)
    assert len(drawn) == 2 * count


def test_the_merged_report_is_complete(tmp_path: Path) -> None:
    runs = three_schemes()
    runs["tiny-alibi.json"].provenance["not_applicable"] = {"ntk": "ntk extends rotary positions; bloom has alibi"}
    readme = write_merged_report(runs, tmp_path / "new")
    per_model = {f"{model}_{file}" for model in SCHEMES for file in ("results.json", "gain_by_position.png")}
    assert {path.name for path in readme.parent.iterdir()} == {
        "README.md",
        "perplexity.png",
        "results.csv",
        *per_model,
    }
    for model, run in zip(SCHEMES, merge_runs(runs), strict=True):
        assert Results.load_json(readme.parent / f"{model}_results.json").rows == run.rows
    text = readme.read_text()
    assert text.startswith("# Side by side: tiny-learned, tiny-alibi, tiny-rope\n")
    assert all(f"### {name} ({words})" in text for name, (*_, words) in SCHEMES.items())
    assert "Left out: ntk (extends rotary positions; bloom has alibi)." in text
    merged = merge_runs(runs)
    assert all(markdown_table(grid) in text for grid in merged_grids(merged, run_titles(merged)))
    assert text.count("hf-posext compare --model tiny\n") == 3 and "| tiny-rope.json | examples/tiny-rope |" in text
    with open(readme.parent / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["tiny-learned"] * 6 + ["tiny-alibi"] * 8 + ["tiny-rope"] * 8
    assert rows[-1]["method"] == "yarn" and float(rows[-1]["perplexity"]) == 38.4


def retrieved(method: str) -> list[dict[str, Any]]:
    factor = 1.0 if method == "none" else 8.0
    row = {"method": method, "factor": factor, "task": "multi-key", "depth": 0.5, "accuracy": 0.25, "trials": 4}
    return [row | {"length": length} for length in (512, 4096)]


def test_runs_of_one_model_are_one_card_with_all_that_one_run_has(tmp_path: Path) -> None:
    first, second = a_run(), a_run(methods=("none", "linear"))
    second.provenance["command"] = "hf-posext compare --methods linear"
    first.retrieval, second.retrieval = retrieved("none") + retrieved("yarn"), retrieved("linear")
    readme = write_merged_report({"a.json": first, "b.json": second}, tmp_path)
    text = readme.read_text()
    pictures = {"gain_by_position.png", *(f"retrieval_{name}.png" for name in ("none", "yarn_x8", "linear_x8"))}
    assert {path.name for path in tmp_path.iterdir()} == {
        *pictures,
        *("README.md", "perplexity.png", "results.csv", "results.json", "retrieval.csv"),
    }
    assert all(f"]({name})" in text for name in pictures) and "[`results.json`](results.json)." in text
    merged = Results.load_json(tmp_path / "results.json")
    assert [row["method"] for row in merged.rows] == ["none"] * 4 + ["yarn"] * 4 + ["linear"] * 4
    assert len(merged.retrieval) == 6 and merged.provenance["command"].splitlines() == [
        "hf-posext compare --model tiny",
        "hf-posext compare --methods linear",
    ]
    card = ModelCard(text)
    assert card.data.model_name == "tiny-rope" and card.text.strip().startswith("# Side by side: tiny-rope\n")
    values = {
        (entry.dataset_args["method"], entry.dataset_args["length"], entry.metric_name): entry.metric_value
        for entry in card.data.eval_results
    }
    assert len(values) == len(card.data.eval_results)
    for row in merged.rows:
        assert values[row["method"], row["length"], "Perplexity"] == row["perplexity"]
        assert values[row["method"], row["length"], "Gain over the truncated context"] == row["gain"]


def test_what_has_no_control_at_the_longest_length_has_no_gain_by_position(tmp_path: Path) -> None:
    alone = make_results(passkey=False, control=False, lengths=(512, 1024, 2048, 8192))
    alone.provenance |= a_run().provenance
    alone.rows = [row for row in alone.rows if row["method"] == "linear"]
    alone.per_document = [record for record in alone.per_document if record["method"] == "linear"]
    write_merged_report({"a.json": a_run(), "b.json": alone}, tmp_path)
    assert not (tmp_path / "gain_by_position.png").exists()
