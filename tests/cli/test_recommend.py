"""`recommend` and `search` on the shipped model, as if trained on 64 tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_posext import ExtensionPlan

from ..conftest import EXAMPLES
from .helpers import LEARNED, MODEL, NOVELS, error_of, run

OPTIONS: dict[str, Any] = {
    "dataset": NOVELS, "target-length": 128, "trained-length": 64, "start": 2000, "documents": 2
}  # fmt: skip
RECOMMEND = {"methods": "yarn,rerope", "passkey": 0, "budget": 6000}
SEARCH = {"population": 4, "generations": 1}


def call(command: str, output: Path, *flags: str, model: object = MODEL, **changed: Any) -> Any:
    defaults = RECOMMEND if command == "recommend" else SEARCH
    options = {
        **OPTIONS,
        **defaults,
        "output": output,
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return run(command, model, *words, *flags)


def test_a_recommendation_is_told_and_its_plan_written(tmp_path: Path) -> None:
    result = call("recommend", tmp_path / "new" / "plan.json")
    assert result.exit_code == 0, result.output
    output_text = " ".join(result.stdout.split())
    assert (
        output_text.startswith("Use rerope x2 to read 128 tokens (gain over truncation ")
        and "of a budget of 6000" in output_text
    )
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    plan = ExtensionPlan.load(tmp_path / "new" / "plan.json")
    assert plan.method == "rerope" and plan.target_length == 128
    assert "exists. Pass another --output" in error_of(call("recommend", tmp_path / "new" / "plan.json"))
    (tmp_path / "new" / "plan.json").unlink()
    assert "Pass --resume to go on with it" in error_of(call("recommend", tmp_path / "new" / "plan.json"))
    for _ in range(2):  # the second time beside the plan of a finished run, which more budget may change
        again = call("recommend", tmp_path / "new" / "plan.json", "--resume", "--json")
        assert again.exit_code == 0 and json.loads(again.stdout)["best"]["method"] == "rerope"
    (tmp_path / "other.json").touch()
    assert "exists. Pass another --output" in error_of(call("recommend", tmp_path / "other.json", "--resume"))


def test_a_search_writes_its_plan(tmp_path: Path) -> None:
    result = call("search", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "tail perplexity" in result.stdout and "measure it on others" in result.stdout
    plan = ExtensionPlan.load(tmp_path / "plan.json")
    assert plan.rotaries[0].rope_parameters["rope_type"] == "longrope"  # type: ignore[index]


@pytest.mark.parametrize(
    ("command", "changed", "message"),
    [
        (
            "recommend",
            {"target_length": 64},
            "Expected --target-length above the trained length of 64 tokens (--trained-length), got 64",
        ),
        ("recommend", {"budget": 100}, "Expected a budget of at least"),
        ("recommend", {"methods": "table-linear"}, "Every method is refused"),
        ("recommend", {"methods": "yarm"}, "did you mean 'yarn'"),
        ("recommend", {"dataset": "no.jsonl"}, "no such path"),
        ("recommend", {"target_length": 8_000_000, "budget": None}, "Expected documents of start + length tokens"),
        (
            "recommend",
            {"model": EXAMPLES / "tiny" / "tiny-alibi", "trained_length": None},
            "Pass --trained-length in tokens",
        ),
        ("recommend", {"output": "plan.yaml"}, "to be the name of a JSON file"),
        ("recommend", {"output": "/dev/null/plan.json"}, "can be written, got /dev/null"),
        ("recommend", {"target_length": None}, "Expected --target-length, got none. Pass --target-length: "),
        ("search", {"model": LEARNED}, "gpt2 has learned positions"),
        (
            "search",
            {"population": 2},
            "--population to be a whole number of 4 or more, got '2'. Pass",
        ),
        ("search", {"target_length": 64}, "which needs no search"),
        (
            "search",
            {"objective": "loss"},
            "--objective to be one of tail, key-tokens, got 'loss'. Pass",
        ),
    ],
    ids=str,
)
def test_wrong_input_is_one_line(command: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    output = changed.pop("output", tmp_path / "plan.json")
    assert message in error_of(call(command, output, **changed))
    assert not list(tmp_path.iterdir())
