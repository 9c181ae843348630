"""Tables, sentences, the picture and the report, from rows made by hand after the measured figures of tiny-rope."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy.stats import binomtest

from hf_posext.evaluation import Results
from hf_posext.evaluation.reading import portable, write_atomically
from hf_posext.evaluation.rows import share_interval
from hf_posext.reporting import (
    describe_methods,
    markdown_table,
    notes,
    plot_gain_by_position,
    plot_perplexity,
    print_tables,
    render_report,
    results_to_model_index,
    write_report,
)
from hf_posext.reporting.tables import format_perplexity, grids

from .helpers import LENGTHS, MEASURED, TRUNCATED, make_results, panels


def printed(results: Results) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    print_tables(results, console)
    return console.export_text().splitlines()


def test_the_table_has_the_control_as_a_row_of_its_own_and_gain_with_its_interval_at_the_longest_length() -> None:
    _, perplexity, gain, passkey = grids(make_results())
    assert dict(perplexity.rows)["truncated to 512"] == ("40.1 (40.0)", "39.7 (39.3)", "36.0 (32.7)", "34.8 (33.6)")
    assert dict(perplexity.rows)["yarn x8"][3] == "38.4 (37.6)"
    assert dict(perplexity.rows)["none"][3] == "138 (185)"
    assert dict(gain.rows)["yarn x8"] == ("0.92", "0.92", "0.92", "0.89 [0.87, 0.91]")
    assert dict(passkey.rows)["ntk x8"] == ("80 %", "60 %", "5 %", "0 %")
    assert "20 trials" in passkey.title


def test_questions_that_were_not_asked_are_left_out() -> None:
    _, only = grids(make_results(control=False, passkey=False))
    assert [name for name, _ in only.rows] == ["none", "linear x8", "ntk x8", "yarn x8"]


@pytest.mark.parametrize("lengths", [(512,), LENGTHS, tuple(2**n for n in range(7, 21))], ids=len)
def test_tables_fit_80_columns_whatever_the_number_of_lengths(lengths: tuple[int, ...]) -> None:
    results = make_results(lengths=lengths)
    for row in results.rows:
        row["method"] = row["method"].replace("ntk", "a-method-with-quite-a-long-name+resonance")
    lines = printed(results)
    assert max(map(len, lines)) <= 80
    headings = " ".join(line for line in lines if line.startswith("tokens"))
    in_grids = {length: 4 if length == min(512, lengths[-1]) else 3 for length in lengths}  # 4: short-context check
    assert {length: headings.split().count(str(length)) for length in lengths} == in_grids
    assert "…" not in "".join(lines)


def test_short_names_leave_room_for_the_head_of_their_column() -> None:
    results = make_results(control=False, passkey=False, lengths=(300,))
    results.rows = [row for row in results.rows if row["method"] == "none"]
    assert any(line.split() == ["tokens", "300"] for line in printed(results))


def test_a_method_measured_at_two_factors_has_two_rows() -> None:
    results = make_results()
    results.rows += [{**row, "factor": 16.0} for row in results.rows if row["method"] == "yarn"]
    assert [name for name, _ in grids(results)[1].rows][-2:] == ["yarn x8", "yarn x16"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.514, "2.51"), (40.06, "40.1"), (138.4, "138"), (51017.2, "51017"), (3e9, "3.0e+09"), (None, "-")],
)
def test_perplexities_show_three_digits(value: float | None, text: str) -> None:
    assert format_perplexity(value) == text


def test_markdown_is_the_same_table() -> None:
    results = make_results()
    lines = markdown_table(grids(results)[1]).splitlines()
    assert lines[:2] == ["| tokens | 512 | 1024 | 2048 | 4096 |", "| --- | ---: | ---: | ---: | ---: |"]
    assert lines[-1] == "| yarn x8 | 43.9 (43.4) | 43.2 (42.6) | 39.2 (35.5) | 38.4 (37.6) |"


def test_each_method_gets_its_sentence() -> None:
    none, linear, ntk, yarn = describe_methods(make_results())
    assert none == (
        "`none` holds up to 512 tokens and breaks by 1024 (tail perplexity 40.0 at 512, 106 there); "
        "at 4096 its perplexity is 5.5 times that of truncation (gain 0.18 [0.16, 0.20]); "
        "it retrieves 0 % of the passkeys there."
    )
    assert "keeps its perplexity level to 4096" in linear and "it costs 231 % [230, 232] of perplexity" in linear
    assert "holds up to 2048 tokens and breaks by 4096" in ntk
    assert yarn == (
        "`yarn x8` keeps its perplexity level to 4096 tokens (tail perplexity 43.4 at 512, 37.6 at 4096); "
        "inside the trained length, at 512, it costs 9 % [8, 10] of perplexity; "
        "at 4096 it loses 11 % to truncation (gain 0.89 [0.87, 0.91]); it retrieves 90 % of the passkeys there."
    )


@pytest.mark.parametrize(
    ("gain", "interval", "words"),
    [
        (1.08, [1.02, 1.11], "it gains 8 % over truncation (gain 1.08 [1.02, 1.11])"),
        (0.99, [0.97, 1.01], "it is level with truncation (gain 0.99 [0.97, 1.01])"),
        (0.9, None, "it loses 10 % to truncation (gain 0.90)"),
        (1.0, None, "it is level with truncation (gain 1.00)"),
        (1.004, [1.002, 1.006], "it gains 0.4 % over truncation (gain 1.00 [1.00, 1.01])"),
        (0.9951, [0.991, 0.999], "it loses 0.5 % to truncation (gain 1.00 [0.99, 1.00])"),
        (1.0003, [1.0001, 1.0004], "it is level with truncation (gain 1.00 [1.00, 1.00])"),
        (0.0, [0.0, 0.0], "its perplexity is inf times that of truncation (gain 0.00 [0.00, 0.00])"),
    ],
)
def test_a_sentence_says_which_side_of_truncation_it_is(gain: float, interval: Any, words: str) -> None:
    results = make_results()
    results.rows[-1] |= {"gain": gain, "gain_ci95": interval}
    assert f"at 4096 {words}" in describe_methods(results)[-1]


@pytest.mark.parametrize(
    ("change", "interval", "words"),
    [
        (0.09, [0.08, 0.1], "costs 9 % [8, 10] of perplexity"),
        (-0.09, [-0.1, -0.08], "saves 9 % [8, 10] of perplexity"),
        (-0.02, [-0.04, 0.01], "saves 2 % [-1, 4] of perplexity"),
        (0.004, [-0.0001, 0.0081], "costs 0.4 % [0.0, 0.8] of perplexity"),
        (0.0, None, "costs 0.0 % of perplexity"),
    ],
)
def test_a_cost_and_its_interval_are_of_the_same_quantity(change: float, interval: Any, words: str) -> None:
    results = make_results()
    for row in results.rows:
        row |= {"change": change, "change_ci95": interval}
    assert f"at 512, it {words};" in describe_methods(results)[-1]


def test_what_is_broken_from_the_first_length_on_does_not_hold() -> None:
    """Nothing within the trained length was measured, so that truncation is the level."""
    results = make_results(passkey=False)
    results.rows = [row for row in results.rows if row["length"] > 512]
    none, linear, ntk, yarn = describe_methods(results)
    assert none.startswith("`none` is broken at 1024 tokens (tail perplexity 106, and 39.3 truncated); at 4096")
    assert linear.startswith("`linear x8` is broken at 1024 tokens (tail perplexity 120, and 39.3 truncated)")
    assert "holds up to 2048 tokens and breaks by 4096" in ntk
    assert yarn.startswith("`yarn x8` keeps its perplexity level to 4096 tokens (tail perplexity 42.6 at 1024")
    results.rows = [row for row in results.rows if row["length"] == 4096]
    assert describe_methods(results)[0].startswith(
        "`none` is broken at 4096 tokens (tail perplexity 185, and 33.6 trun"
    )
    assert describe_methods(results)[3].startswith("`yarn x8` has a tail perplexity of 37.6 at 4096 tokens; at 4096")


def test_an_infinite_perplexity_breaks_a_method_also_after_it_was_read_from_a_file() -> None:
    results = make_results(control=False, passkey=False)
    results.rows[-1]["perplexity_tail"] = math.inf
    words = "`yarn x8` holds up to 2048 tokens and breaks by 4096 (tail perplexity 43.4 at 512, inf there)"
    assert words in describe_methods(results)[-1]
    assert describe_methods(Results.from_dict(results.to_dict())) == describe_methods(results)


def test_sentences_without_control_judge_the_curve_by_itself() -> None:
    none, _, _, yarn = describe_methods(make_results(control=False, passkey=False))
    assert none == "`none` holds up to 512 tokens and breaks by 1024 (tail perplexity 40.0 at 512, 106 there)."
    assert yarn.startswith("`yarn x8` keeps its perplexity level to 4096 tokens") and "truncation" not in yarn


def test_the_picture_is_as_wide_as_a_readme_and_replaces_in_one_step(tmp_path: Path) -> None:
    plot_perplexity(make_results(), tmp_path / "perplexity.png")
    assert imread(tmp_path / "perplexity.png").shape[1] == 1800
    assert [path.name for path in tmp_path.iterdir()] == ["perplexity.png"]


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({}, ["Perplexity of the second half of the text", "Gain over truncation", "Passkeys retrieved"]),
        ({"passkey": False}, ["Perplexity of the second half of the text", "Gain over truncation"]),
        ({"passkey": False, "control": False}, ["Perplexity of the second half of the text"]),
    ],
)
def test_the_picture_has_a_panel_for_each_question(
    options: dict[str, bool], titles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = panels(lambda: plot_perplexity(make_results(**options), tmp_path / "p.png"), monkeypatch)
    assert [panel.get_title() for panel in drawn] == titles


def test_the_picture_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perplexity, gain, passkey = panels(lambda: plot_perplexity(make_results(), tmp_path / "p.png"), monkeypatch)
    assert perplexity.get_yscale() == "log"
    assert all(panel.get_xscale() == "log" for panel in (perplexity, gain, passkey))
    assert [label.get_text() for label in passkey.get_xticklabels()] == ["512", "1024", "2048", "4096"]
    assert "trained length 512" in [text.get_text() for text in perplexity.texts]
    curves = [list(map(float, line.get_ydata())) for line in perplexity.lines]
    assert [tail for _, tail, _ in MEASURED["yarn"]] in curves
    assert [tail for _, tail in TRUNCATED] in curves
    # Of two documents, a bootstrap's 95 % interval goes from the easier to the harder one.
    assert any(low == pytest.approx([tail**0.9 for _, tail, _ in MEASURED["yarn"]], rel=1e-12) for low in curves)
    assert any(high == pytest.approx([tail**1.1 for _, tail, _ in MEASURED["yarn"]], rel=1e-12) for high in curves)
    assert any(list(line.get_ydata()) == [1.0, 1.0] for line in gain.lines), "the line of truncation is missing"
    labels = perplexity.get_legend_handles_labels()[1]
    assert labels == ["none, truncated to 512", "none", "linear x8", "ntk x8", "yarn x8"]


@pytest.mark.parametrize("lengths", [(512, 1024, 2048, 4096), (1000, 1024, 4096), (512,)])
def test_error_bars_at_one_length_stand_side_by_side(
    lengths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bar is at its own place, all are closer to their length than to another, and the axis contains them."""
    results = make_results(lengths=lengths)
    for panel in panels(lambda: plot_perplexity(results, tmp_path / "p.png"), monkeypatch):
        lines = [container[0].get_xdata() for container in panel.containers]  # type: ignore[index]
        assert len(lines) == 4
        places = np.log2(np.array(lines, dtype=float))
        assert (np.diff(places, axis=0) > 0).all(), "in the order of the methods"
        nearest = np.abs(places[..., None] - np.log2(lengths)).argmin(axis=-1)
        assert (nearest == np.arange(len(lengths))).all()
        low, high = np.log2(panel.get_xlim())
        assert (places > low).all() and (places < high).all()
        if min(np.diff(lengths), default=99) > 99:
            inches = np.diff(places, axis=0).min() / (high - low) * panel.get_position().width * 9
            assert inches * 72 > 2 * 2.5, "caps of 2.5 points to each side"


def test_values_that_are_missing_or_infinite_leave_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = make_results()
    results.rows[1] |= {"perplexity_tail": float("inf"), "passkey": None}
    results.rows[2] |= {"perplexity_tail": None, "gain": None, "gain_ci95": None}
    perplexity, *_ = panels(lambda: plot_perplexity(results, tmp_path / "p.png"), monkeypatch)
    assert [40.0, 185.0] in [list(map(float, line.get_ydata())) for line in perplexity.lines]
    assert dict(grids(results)[1].rows)["none"][1:3] == ("65.0 (inf)", "103 (-)")
    assert "breaks by 1024" in describe_methods(results)[0]


def test_the_report_is_complete_and_can_be_read_back(tmp_path: Path) -> None:
    results = make_results()
    readme = write_report(results, tmp_path / "new" / "out")
    names = {path.name for path in readme.parent.iterdir()}
    assert names == {"README.md", "gain_by_position.png", "perplexity.png", "results.csv", "results.json"}
    assert Results.load_json(readme.parent / "results.json") == results
    assert json.loads((readme.parent / "results.json").read_text())["provenance"]["trained_length"] == 512
    with open(readme.parent / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == len(results.rows)
    text = readme.read_text()
    assert all(sentence in text for sentence in describe_methods(results))
    assert all(markdown_table(grid) in text for grid in grids(results))
    assert "**Protocol `prefix`**: each document is read once" in text
    assert "```console\nhf-posext compare --model tiny\n```" in text
    assert r"| model | tiny\|rope |" in text, "a pipe in a name must not break the table"
    assert "| documents | a: 9000, b: 8000 |" in text and "| versions.torch | 2.13 |" in text


def test_what_happens_inside_the_trained_length_comes_first() -> None:
    results = make_results()
    first = grids(results)[0]
    assert first.title.startswith("Short-context check") and first.lengths == (512,)
    assert dict(first.rows)["yarn x8"] == ("+9.5 % [+8.5, +10.5]",) and "none" not in dict(first.rows)
    assert notes(results) == []
    text = render_report(results)
    assert text.index("+9.5 % [+8.5, +10.5]") < text.index("### Perplexity per token")


def test_what_no_table_shows_is_said() -> None:
    results = make_results(lengths=(1024, 2048))
    reason = "extends learned positions; llama has rotary"
    results.provenance["not_applicable"] = {
        name: f"{name} {reason}" for name in ("table-linear", "table-cubic")
    }  # fmt: skip
    note = f"Left out: table-linear, table-cubic ({reason})."
    assert notes(results) == [note, "No short-context check: no length up to 512 was measured."]
    assert note in " ".join(" ".join(printed(results)).split()) and note in render_report(results)
    for row in results.rows:
        row |= {"length": row["length"] // 4, "change": None, "change_ci95": None}
    assert notes(results)[1] == "No short-context check: none is not among the methods."
    without = make_results(control=False, lengths=(512,))
    without.rows = [row | {"method": "a model", "change": None, "change_ci95": None} for row in without.rows[-1:]]
    assert notes(without) == ["No short-context check: there was no control."]
    assert notes(Results({"trained_length": 512}, [row for row in results.rows if row["method"] == "none"])) == []


def test_the_gain_by_position_is_drawn_for_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (panel,) = panels(lambda: plot_gain_by_position(make_results(), tmp_path / "p.png"), monkeypatch)
    assert imread(tmp_path / "p.png").shape[1] == 1800
    lines = {line.get_label(): line for line in panel.lines}
    assert set(MEASURED) - {"none"} <= {str(label).removesuffix(" x8") for label in lines}
    for name, figures in MEASURED.items():
        line = lines[name if name == "none" else f"{name} x8"]
        # 1 %: these records count 256 tokens to each stretch, and the first token of a document is never scored
        assert list(line.get_ydata()) == pytest.approx([TRUNCATED[3][0] / figures[3][0]] * 16, rel=0.01)
        assert len(line.get_xdata()) == 16 and 120 < line.get_xdata()[0] < 136


def test_intervals_that_were_infinite_are_left_out() -> None:
    results = make_results()
    results.rows[-1] |= {"gain_ci95": [None, 1.0], "change_ci95": [None, 0.1]}
    results.rows[-4] |= {"change_ci95": [None, 0.1]}
    assert dict(grids(results)[2].rows)["yarn x8"][3] == "0.89"
    assert dict(grids(results)[0].rows)["yarn x8"] == ("+9.5 %",)


def test_a_report_without_control_does_not_speak_of_it() -> None:
    text = render_report(make_results(control=False, passkey=False))
    assert "runcat" not in text.replace("gain over truncation and passkeys by context length", "")
    assert "**passkeys**" not in text.lower()


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    write_atomically(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_paths_inside_the_working_directory_become_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable(str(tmp_path / "a" / "b")) == "a/b"
    for name in ("org/name", "none,linear", "", str(tmp_path.parent / "other")):
        assert portable(name) == name


def test_bits_per_byte_are_a_table_of_their_own(tmp_path: Path) -> None:
    results = make_results()
    assert "Bits per byte" not in render_report(results)
    for row in results.rows:
        row["bits_per_byte"] = row["length"] / 1000
    (grid,) = (grid for grid in grids(results) if grid.title.startswith("Bits per byte"))
    assert dict(grid.rows)["yarn x8"] == ("0.512", "1.024", "2.048", "4.096")
    assert render_report(results).count("Bits per byte") == 2, "the table, and what it means"


def legacy_results(name: str = "legacy-yarn") -> Results:
    """As a legacy protocol gives them: means of groups, of which there is no second half."""
    results = make_results()
    for row in results.rows:
        row |= {"protocol": name, "perplexity_tail": row["perplexity"]}
        row["perplexity_truncated_tail"] = row["perplexity_truncated"]
    for record in results.per_document:
        record |= {"first": None, "position_nll_sums": None, "groups": 2, "group_mean_sum": 7.0}
    return results


def test_every_output_marks_a_legacy_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, mark = legacy_results(), "(legacy-yarn: a published average, not per token)"
    titles = [grid.title for grid in grids(results)]
    assert titles == [
        f"Short-context check: change of perplexity inside the trained length {mark}",
        f"Perplexity {mark}",
        f"Gain over truncation {mark} (above 1: the longer context pays)",
        "Passkeys retrieved (greedy decoding, 20 trials)",
    ]
    assert dict(grids(results)[1].rows)["yarn x8"][3] == "38.4", "without a second half"
    assert mark in " ".join(line.strip() for line in printed(results))
    for sentence in describe_methods(results):
        assert f"` {mark} " in sentence and "tail" not in sentence
    text = render_report(results)
    assert "except where it is marked as legacy" in text and "**Protocol `legacy-yarn`**: legacy" in text
    panel = panels(lambda: plot_perplexity(results, tmp_path / "perplexity.png"), monkeypatch)[0]
    assert panel.get_title() == f"Perplexity\n{mark}" and "per token" not in panel.get_ylabel()
    write_report(results, tmp_path)
    assert not (tmp_path / "gain_by_position.png").exists()
    assert {entry.metric_name.endswith(" (legacy-yarn)") for entry in results_to_model_index(results)} == {True}
    assert "legacy" not in render_report(make_results())


def test_intervals_of_a_legacy_average_are_of_its_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven nats in two groups, in both documents: the interval has no width there."""
    panel = panels(lambda: plot_perplexity(legacy_results(), tmp_path / "perplexity.png"), monkeypatch)[0]
    low, high = panel.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((math.exp(3.5), MEASURED["none"][0][0]))


@pytest.mark.parametrize(("growth", "words"), [(1.25, "keeps its perplexity level"), (1.25001, "breaks by 1024")])
def test_a_quarter_more_perplexity_is_broken(growth: float, words: str) -> None:
    results = make_results(control=False, passkey=False, lengths=(512, 1024))
    for row in results.rows:
        row["perplexity_tail"] = 40.0 if row["length"] == 512 else 40.0 * growth
    assert all(words in sentence for sentence in describe_methods(results))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("trained", [64, 100, 512, 131072])
@pytest.mark.parametrize("lengths", [(128,), (64, 128), LENGTHS], ids=str)
def test_the_words_at_the_trained_length_are_inside_their_panel(
    lengths: tuple[int, ...], trained: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = make_results(lengths=lengths, passkey=False)
    results.provenance["trained_length"] = trained
    for draw in (plot_perplexity, plot_gain_by_position):
        for panel in panels(lambda draw=draw: draw(results, tmp_path / "p.png"), monkeypatch):  # type: ignore[misc]
            inside = panel.get_window_extent()
            assert inside.width > 100 and inside.height > 100
            for words in panel.texts:
                extent = words.get_window_extent()
                assert inside.x0 - 1 <= extent.x0 and extent.x1 <= inside.x1 + 1


def test_shares_have_their_intervals_in_the_report() -> None:
    results = make_results()
    assert "At 4096 tokens, with 95 % intervals (Wilson): none 0 % [0, 16] of 20; linear x8" in render_report(results)
    assert "yarn x8 90 % [70, 97] of 20." in render_report(results)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (1, 20), (7, 13)])
def test_the_interval_of_a_share_is_that_of_scipy(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert share_interval(successes / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_results_are_one_line_and_a_table_in_notebooks() -> None:
    results = make_results()
    assert repr(results) == (
        "Results(tiny|rope; methods none, linear x8, ntk x8, yarn x8; lengths 512, 1024, 2048, 4096; protocol prefix; "
        "8 documents)"
    )
    results.rows[0]["method"] = "<script>"
    html = results._repr_html_()
    assert html.count("<tr") == len(results.rows) + 1 and "&lt;script&gt;" in html and "<script>" not in html
    assert repr(Results()).startswith("Results(a model; methods none measured")


@pytest.mark.parametrize(("low", "high"), [(33.0, 40.0), (41.0, 48.0), (1.2, 1.9), (30.0, 300.0), (5.0, 5e6)])
def test_every_range_of_perplexities_has_ticks(
    low: float, high: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = make_results(control=False, passkey=False, lengths=(512, 1024))
    results.per_document = []
    for row in results.rows:
        row["perplexity_tail"] = low if row["length"] == 512 else high
    (panel,) = panels(lambda: plot_perplexity(results, tmp_path / "p.png"), monkeypatch)
    bottom, top = panel.get_ylim()
    assert 2 <= sum(bottom <= tick <= top for tick in panel.get_yticks()) <= 10


def test_lengths_that_do_not_fit_side_by_side_stand_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths, rotation in ((LENGTHS, 0.0), (tuple(2**n for n in range(7, 21)), 90.0)):
        results, drawn = make_results(lengths=lengths), 0
        for panel in panels(lambda results=results: plot_perplexity(results, tmp_path / "p.png"), monkeypatch):  # type: ignore[misc]
            labels = [label for label in panel.get_xticklabels() if label.get_visible() and label.get_text()]
            boxes = [label.get_window_extent() for label in labels]
            assert {label.get_rotation() for label in labels} <= {rotation}
            assert all(box.x1 < next_box.x0 for box, next_box in itertools.pairwise(boxes)), "none overlap"
            drawn += len(labels)
        assert drawn >= 2 * len(lengths), "in the lowest panels"


def test_positions_that_are_labelled_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths, expected in (
        (LENGTHS, [0, *LENGTHS]),
        (tuple(2**n for n in range(9, 16)), [2048, 4096, 8192, 16384]),
    ):
        results = make_results(lengths=lengths)
        (panel,) = panels(lambda results=results: plot_gain_by_position(results, tmp_path / "p.png"), monkeypatch)  # type: ignore[misc]
        assert set(expected) <= set(panel.get_xticks()) and lengths[-1] in panel.get_xticks()
        boxes = sorted((label.get_window_extent() for label in panel.get_xticklabels()), key=lambda box: box.x0)
        assert all(box.x1 < next_box.x0 for box, next_box in itertools.pairwise(boxes))
