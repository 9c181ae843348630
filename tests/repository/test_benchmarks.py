"""The benchmarks run, at tiny sizes, and what they compare is equal; how long it took is never asserted."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_posext.methods import methods

from ..helpers import ROOT

FOLDER = ROOT / "benchmarks"
OPTIONAL = {"lm_eval", "longppl"}


@pytest.fixture(scope="module", autouse=True)
def found_from_here() -> Iterator[None]:
    """The scripts import each other by name, and run with one thread; readings are taken in this process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        measure = script("measure")
        patch.setattr(measure, "read_in_child", lambda way: measure.read(way.job, way.settings))
        costs = script("costs")
        patch.setattr(costs, "read_in_child", measure.read_in_child)
        # transformers takes seconds to import, in each of many interpreters
        patch.setattr(costs, "BASELINE", "import json")
        patch.setattr(costs, "IMPORTS", ("import hf_posext",))
        yield
    torch.set_num_threads(threads)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


class Results:
    """Runs a script when it is first asked for, and keeps what it has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--output", str(path), *self._more(name)])
                script(name).main()
        assert not list(self.folder.glob("*.partial.json"))
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def _more(self, name: str) -> list[str]:
        picture = ["--picture", str(self.folder / "scaling.png")]
        on_cpu = ["--repeats", "1", "--device", "cpu"]
        return {"scaling": picture, "gpu": on_cpu, "gpu_decoding": on_cpu}.get(name, ["--repeats", "2"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("results"))


def test_ways_of_perplexity_agree(results: Results) -> None:
    result = results.of("perplexity")
    left_out = set()
    for sweep in result["parts"].values():
        for name, row in sweep["rows"].items():
            if "left_out" in row:
                left_out.add(name)
                assert row["left_out"] == f"{name} is not installed"
            elif name != "floor":
                assert len(row["nll"]) == len(sweep["lengths"]) and row["deviation"] <= 1e-5
        assert sweep["rows"]["hf_posext"]["readings"] == 2
    assert left_out <= OPTIONAL
    apart = [goal for goal in result["goals"] if goal["what"].startswith("NLL apart")]
    assert len(apart) == 5 and all(goal["met"] is not False for goal in apart)


def test_docs_recipe_weighs_windows_by_one_token_less() -> None:
    """Its own average differs from the one by token, which is compared; the two are equal with one window."""
    peers, models = script("peers"), script("models")
    model, ids = models.llama("tiny", 300), models.text(64, 300)[None]
    assert peers.docs_windows(model, ids, 64, 32)[0] == pytest.approx(peers.docs_windows(model, ids, 64, 32)[1])
    by_token, as_published = peers.docs_windows(model, ids, 32, 16)
    assert abs(by_token - as_published) > 1e-4


def test_cpu(results: Results) -> None:
    result = results.of("cpu")
    rows = [row for part in result["parts"].values() for row in part]
    kinds = {"import", "patch_model", "forward", "prefill", "memory", "decode", "training"}
    assert {row["what"] for row in rows} == kinds
    ways = {kind: [row["way"] for row in rows if row["what"] == kind] for kind in ("prefill", "training")}
    assert ways["training"] == ways["prefill"] and "plain" in ways["training"]
    assert all(row["seconds"] > 0 for row in rows if row["what"] != "import")
    assert all(row["error"] < 1e-6 for row in rows if row["what"] == "prefill"), "float32 against float64"
    published = [row for row in rows if row["way"].endswith("as published")]
    assert len(published) == 2 and all(row["apart"] < 1e-5 for row in published)
    assert all(row["weights_in_place"] for row in rows if row["what"] == "patch_model")


def test_a_layer_is_trained_by_its_given_states() -> None:
    """The sum of its output is that of the values, each times its weights: what they are worth together is known."""
    layers = script("layers")
    grads = layers.Layer("tiny", 64, 8, layers.remapping(window=8, chunk=12, group=4)["self-extend"]).train()
    assert [grad.abs().max() > 0 for grad in grads] == [True] * 3
    assert grads[2].sum().item() == pytest.approx(64 * 4 * 8, rel=1e-5)


def test_gpu_script_on_the_cpu(results: Results) -> None:
    result = results.of("gpu")
    rows = [row for name, part in result["parts"].items() if not name.startswith("perplexity") for row in part]
    errors = [row["error"] for row in rows if row["what"] == "prefill"]
    assert len(errors) == 3 * 5 and max(errors) < 1e-6
    assert {goal["found"] is None for goal in result["goals"] if "131,072" in goal["what"]} == {True}
    assert [goal["found"] is not None for goal in result["goals"] if goal["what"].startswith("1.2 B")] == [True] * 3


def test_gpu_decoding_on_the_cpu(results: Results) -> None:
    """Steps of all ways are timed, and steps of the shorter length alone."""
    result = results.of("gpu_decoding")
    ways = ["plain", *script("gpu").METHODS]
    assert {name: [row["way"] for row in part] for name, part in result["parts"].items()} == {
        "graph 32768": ways,
        "decode 32768": ways,
    }
    modes = [words for words, kind, baseline in script("gpu_decoding").AGAINST if baseline == "plain"]
    for goal in result["goals"]:
        (words,) = (candidate for candidate in (*modes, "as PyTorch picks") if candidate in goal["what"])
        assert (goal["found"] is not None) == (words in modes and "32,768" in goal["what"])


def test_scaling(results: Results) -> None:
    result = results.of("scaling")
    assert [curve["way"] for curve in result["parts"].values()] == list(script("scaling").WAYS)
    assert (results.folder / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_fit_finds_what_made_the_values() -> None:
    lengths = (1024, 2048, 4096, 8192)
    curve = script("scaling").fit(lengths, [3e-4 * n + 2e-8 * n**2 for n in lengths], (1, 2))
    assert curve["coefficients"] == pytest.approx([3e-4, 2e-8]) and curve["largest_residual"] < 1e-9


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    output, names = script("output"), []

    def part(name: str) -> Callable[[], str]:
        return lambda: names.append(name) or name

    path = tmp_path / "some.json"
    output.Run("some", {"repeats": 1}, path).part("first", part("first"))
    again = output.Run("some", {"repeats": 1}, path)
    assert [again.part(name, part(name)) for name in ("first", "second")] == ["first", "second"]
    assert names == ["first", "second"]
    changed = output.Run("some", {"repeats": 2}, path)
    assert changed.part("first", part("third")) == "third", "settings that are not the same"
    again.finish([])
    assert [file.name for file in tmp_path.iterdir()] == ["some.json"]
    assert json.loads(path.read_text())["command"] == "python benchmarks/some.py --repeats 1"
    command = output.Run("some", {"tiny": True, "quick": False}, None).content["command"]
    assert command == "python benchmarks/some.py --tiny"


def test_page_of_a_machine_that_measured_nothing() -> None:
    assert "not measured" in script("page").render(FOLDER / "none")


@pytest.mark.parametrize("name", ["perplexity", "cpu", "scaling", "gpu", "gpu_decoding"])
def test_results_say_what_they_are(name: str, results: Results) -> None:
    """With goals in which nothing is amiss, and a page that shows them."""
    result = results.of(name)
    assert (
        result["command"].startswith(f"python benchmarks/{name}.py --")
        and str(results.folder) not in result["command"]
    )
    assert result["machine"]["date"] and result["machine"]["versions"]["torch"] and "gpu" in result["machine"]
    assert result["goals"]
    for goal in result["goals"]:
        (bound,) = {"at_most", "at_least"} & goal.keys()
        value = goal["found"]
        expected = None if value is None else value <= goal[bound] if bound == "at_most" else value >= goal[bound]
        assert goal["what"] and goal["met"] is expected, goal
    text = script("page").render(results.folder)
    assert all(goal["what"] in text for goal in result["goals"]) and result["command"] in text


def test_every_method_for_a_shipped_model_was_measured() -> None:
    """The page of methods has a row for each: by itself, or on top of another."""
    benchmark = script("methods")
    kinds = {"bucket-linear", "bucket-max-distance", "sinusoid-linear"}  # no such model is shipped
    compositions = "+".join(
        row["method"]
        for path in benchmark.RESULTS.glob("*.json")
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    )
    names = {part.partition("(")[0] for part in re.split(r"\+", compositions)}
    assert {name for name in methods() if name not in names} == kinds


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_can_be_imported(path: Path) -> None:
    script(path.stem)
