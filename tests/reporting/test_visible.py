"""Names from outside in reports, tables and on the terminal: shown as they are, and nothing more."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
from html import escape
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.cells import cell_len
from rich.console import Console

from hf_posext import patch_model
from hf_posext.cli import app
from hf_posext.cli.console import PlainConsole, fail, say
from hf_posext.escaping import alt, cell, code, console, csv_cell, inline, prose, visible
from hf_posext.evaluation import Results
from hf_posext.reporting import print_tables, render_report, write_merged_report, write_report

from ..conftest import tiny_llama
from .helpers import make_results

HOSTILE = "a|b$x^$`c ``` <img src=x onerror=alert(1)> ![p](http://x/y.png) \\](z) &lt;b&gt;\x1b[31m\x07\u202e"


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\x1b[31m\x07\x00", r"\x1b[31m\x07\x00"), ("\x9b\u202e", r"\x9b\u202e"), ("a\tb\nç é 字", "a\tb\nç é 字")],
)
def test_control_characters_are_shown(text: str, expected: str) -> None:
    assert visible(text) == expected


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", '=HYPERLINK("x")'])
def test_a_text_that_a_spreadsheet_computes_gets_an_apostrophe(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", [-1.5, 3, None, True, "yarn", "a=b"])
def test_other_cells_stay_as_they_are(value: object) -> None:
    assert csv_cell(value) is value or csv_cell(value) == value


@pytest.mark.parametrize("escaped", [inline, alt, cell, code])
def test_a_name_marks_up_nothing(escaped: object) -> None:
    html = rendered(f"x {escaped(HOSTILE)} y")  # type: ignore[operator]
    assert "<img" not in html and "<a" not in html and "\x1b" not in html
    assert html.count("<p>") == 1


@pytest.mark.parametrize("length", range(1, 10))
def test_any_name_renders_as_it_is_wherever_it_stands(length: int) -> None:
    rng, letters = random.Random(length), "ab1é _*~`\\[]()<>&#|$!+-=.:;\"'{}/?^@%,"
    for _ in range(200):
        name = "".join(rng.choices(letters, k=length))
        shown = escape(" ".join(name.split()), quote=False).replace('"', "&quot;")
        if not shown:
            continue
        places = {
            f"x {inline(name)} y": f"<p>x {shown} y</p>",
            inline(name): f"<p>{shown}</p>",
            f"# {inline(name)}": f"<h1>{shown}</h1>",
            f"- **{inline(name)}**: y": f"<li><strong>{shown}</strong>: y</li>",
            f"![{alt(name)}](own.png)": f'<p><img src="own.png" alt="{shown}" /></p>',
            f"| h |\n| --- |\n| {cell(name)} |": f"<td>{shown}</td>",
            f"| h |\n| --- |\n| **{cell(name)}** |": f"<td><strong>{shown}</strong></td>",
        }
        for source, html in places.items():
            assert html in rendered(source), (name, source)


def test_code_of_a_sentence_of_the_package_stays_code() -> None:
    assert rendered(prose("a_ `b*` <i> `c` *d*")) == "<p>a_ <code>b*</code> &lt;i&gt; <code>c</code> *d*</p>\n"
    assert rendered(prose("` _a_")) == "<p>` _a_</p>\n", "a backtick alone"


def test_words_with_underscores_stay_readable() -> None:
    assert inline("yarn(beta_fast=16) x8, -1 < 2, a & b") == "yarn(beta_fast=16) x8, -1 < 2, a & b"
    assert cell("2 - 1 = 1. #3") == "2 - 1 = 1. #3"


def test_a_description_keeps_its_picture() -> None:
    html = rendered(f"![{alt('a] ![b](c) [d')}](own.png)")
    assert html == '<p><img src="own.png" alt="a] ![b](c) [d" /></p>\n'


@pytest.mark.parametrize("text", ["a|b", r"a\|b", r"a\\|b"])
def test_a_pipe_ends_no_cell(text: str) -> None:
    html = rendered(f"| h | i |\n| --- | --- |\n| {cell(text)} | 2 |\n")
    assert f"<td>{text}</td>" in html and html.count("<td>") == 2


def test_a_command_does_not_end_its_block() -> None:
    command = "run --label '\n```\n# x\n````\n<script>'"
    html = rendered(console(command))
    assert html.count("<code") == 1 and "<h1>" not in html and "<script" not in html


@pytest.mark.filterwarnings("error")
def test_no_name_marks_up_a_report(tmp_path: Path) -> None:
    results = make_results()
    results.rows = [row | {"method": HOSTILE} if row["method"] == "yarn" else row for row in results.rows]
    results.provenance |= {
        "model": HOSTILE,
        "dataset": HOSTILE,
        "command": f"run\n```\n{HOSTILE}",
        "not_applicable": {HOSTILE: HOSTILE},
        "left_out": [{"document": HOSTILE, "reason": HOSTILE}],
        "versions": {HOSTILE: HOSTILE},
    }
    write_merged_report({HOSTILE: results, "b": make_results()}, tmp_path)
    for text in (render_report(results), (tmp_path / "README.md").read_text(encoding="utf-8")):
        html = rendered(text)
        assert "<img src=x" not in html and 'href="z' not in html and "http://x/y.png)" in html
        assert 'src="http' not in html and "\x1b" not in html and "\x07" not in html
        assert html.count("</pre>") == 1


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    results = make_results()
    results.rows = [row | {"method": "=1+1"} if row["method"] == "yarn" else row for row in results.rows]
    write_report(results, tmp_path / "alone")
    write_merged_report({"a": results}, tmp_path / "merged")
    for path in tmp_path.glob("*/results.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["method"] for row in rows if "1+1" in row["method"]] == ["'=1+1"] * 4
        changes = [float(row["change"]) for row in rows]
        assert changes == pytest.approx([row["change"] for row in results.rows]) and min(changes) < 0


NAMES = {
    "pipe": "a|b",
    "script": "<script>alert(1)</script>",
    "formula": "=cmd|' /C calc'!A0",
    "line": "a\nb\r\n| x | y |",
    "ansi": "\x1b[31mred\x1b[0m\x9b2J",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202ecba\u2066\u200f\u061c",
    "hidden label": "_nolegend_",
    "long": "x" * 10_000,
    "blank": " ",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_a_name_from_outside_is_right_in_every_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = make_results()
    results.rows = [row | {"method": name} if row["method"] == "yarn" else row for row in results.rows]
    results.per_document = [
        record | {"method": name if record["method"] == "yarn" else record["method"], "document": name}
        for record in results.per_document
        if record["document"] == "a"
    ]
    answer = {"task": name, "length": 512, "depth": 0.5, "accuracy": 0.5, "trials": 4, "method": name, "factor": 8.0}
    results.provenance |= {"model": name, "command": name, "left_out": [{"document": name, "reason": "out of memory"}]}
    results = Results(results.provenance, results.rows, results.per_document, [answer])
    file = io.StringIO()
    print_tables(results, Console(width=80, file=file))
    lines = file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80 and len(lines) < 250
    for character in "\x1b\x9b\u202e\u2066\u200f\u061c":
        assert character not in file.getvalue()
    saved = legends(monkeypatch)
    readme = write_report(results, tmp_path / "report")
    write_merged_report({name: results, "b": make_results()}, tmp_path / "merged")
    assert saved and all(len(names) >= 4 and max(map(len, names)) <= 100 for names in saved), "all lines have a legend"
    assert Results.load_json(readme.parent / "results.json").rows[-1]["method"] == name, "files keep the whole name"
    for path in (readme, tmp_path / "merged" / "README.md"):
        html = rendered(path.read_text(encoding="utf-8"))
        assert "<script" not in html and html.count("<pre>") == 1
    with (readme.parent / "results.csv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == len(results.rows) and not any(row["method"].startswith("=") for row in rows)
    assert {imread(path).shape[1] for path in tmp_path.glob("*/*.png")} == {1800}


def legends(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names in the legend of every picture of lines that is drawn from now on."""
    saved: list[list[str]] = []
    save = Figure.savefig

    def look(figure: Figure, *args: object, **settings: object) -> None:
        saved.extend([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", look)
    return saved


def test_the_terminal_shows_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    say("plan \x1b]0;x\x07")
    fail("bad \x1b[2J")
    PlainConsole().print("name \x1b[31m")
    output = capsys.readouterr()
    assert output.out == "plan \\x1b]0;x\\x07\nname \\x1b[31m\n" and output.err == "error: bad \\x1b[2J\n"


def test_tables_on_the_terminal_show_control_characters() -> None:
    results = make_results()
    results.rows = [row | {"method": "a\x1b[2J[bold]"} if row["method"] == "yarn" else row for row in results.rows]
    file = io.StringIO()
    print_tables(results, Console(width=80, file=file))
    assert "\x1b" not in file.getvalue() and r"a\x1b[2J[bold]" in file.getvalue()


def test_inspect_shows_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1, "max_position_embeddings": 64}
    monkeypatch.chdir(tmp_path)
    folder = Path("a\x1b[31mb")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        app(["inspect", str(folder)])
    out = capsys.readouterr().out
    assert not ended.value.code and "\x1b" not in out and r"a\x1b[31mb (llama)" in out


def test_objects_show_themselves_on_one_line_and_as_a_table() -> None:
    """Names come from configs: nothing in them acts on a terminal or a notebook."""
    model = tiny_llama()
    with patch_model(model, "yarn", factor=2) as patch:
        plan = dataclasses.replace(patch.plan, method="<b>\x1b")
        scheme = dataclasses.replace(patch.plan.scheme, model_type="<b>\x1b")
        for item in (patch, plan, scheme):
            assert "\n" not in repr(item) and "\x1b" not in repr(item) and len(repr(item)) < 200
            html = item._repr_html_()
            assert html.startswith("<table><tr>") and "<b>" not in html and "\x1b" not in html
        assert repr(patch.plan) == f"ExtensionPlan({patch.plan.describe()})"
        assert repr(patch.plan.scheme) == f"PositionalScheme({patch.plan.scheme.describe()})"
    assert "undone" in repr(patch) and "undone" in patch._repr_html_()
