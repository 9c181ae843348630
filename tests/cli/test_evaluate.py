"""`evaluate`: one model as it is, plain or saved with a patch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_posext import Results

from .helpers import MODEL, NOVELS, compare, error_of, run

OPTIONS = ("--dataset", NOVELS, "--lengths", "64,128", "--documents", 2)


def evaluate(output: Path, *words: object, model: object = MODEL) -> Any:
    return run("evaluate", "--model", model, *OPTIONS, "--output", output, *words)


def test_a_plain_model_without_a_control(tmp_path: Path) -> None:
    result = evaluate(tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path / 'out' / 'README.md'}"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "journal.jsonl", "perplexity.png", "results.csv", "results.json"}
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert [(row["method"], row["length"], row["gain"]) for row in results.rows] == [
        ("none", 64, None),
        ("none", 128, None),
    ]
    assert results.provenance["command"].startswith("hf-posext evaluate --model ")


def test_the_dtype_of_a_checkpoint(tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(MODEL, half)
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).save_pretrained(half)
    for flags, dtype in (((), "float32"), (("--dtype", "auto"), "bfloat16")):
        result = evaluate(tmp_path / dtype, *flags, model=half)
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-2] == f"measured by 1 process on cpu, in {dtype}"
        provenance = Results.load_json(tmp_path / dtype / "results.json").provenance
        assert provenance["dtype"] == dtype and provenance["trust_remote_code"] is False
    text = " ".join(run("evaluate", "--help").output.split())
    assert "auto: that of the checkpoint" in text and "default: float32" in text and "GGUF file" in text


def test_a_saved_patch_is_in_force_and_gains_what_it_gains_in_a_comparison(patched: Path, tmp_path: Path) -> None:
    result = evaluate(tmp_path / "one", "--control", MODEL, "--trained-length", 64, model=patched)
    assert result.exit_code == 0, result.output
    assert compare(tmp_path / "two", methods="rerope(window=32)").exit_code == 0
    evaluated, compared = (Results.load_json(tmp_path / name / "results.json") for name in ("one", "two"))
    for row, expected in zip(evaluated.rows, compared.rows, strict=True):
        assert row["method"] == "rerope(window=32)" and row["factor"] == 2
        for key in ("perplexity", "perplexity_truncated", "gain"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5)
    assert (
        evaluated.rows[0]["change"] == pytest.approx(compared.rows[0]["change"], abs=1e-5)
        and evaluated.rows[1]["change"] is None
    )
    assert evaluated.provenance["control"].endswith("tiny-rope")


def test_a_comparison_of_a_patched_model_says_what_to_type(patched: Path, tmp_path: Path) -> None:
    message = error_of(compare(tmp_path / "out", model=patched))
    assert "was saved with a patch" in message and "hf-posext evaluate" in message


def test_a_label_names_the_rows_and_settings_come_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("protocol: tail\ntail: 16\nprefill-chunk: 48\nlabel: mine\n")
    result = evaluate(tmp_path / "out", "--config", config)
    assert result.exit_code == 0, result.output
    results = Results.load_json(tmp_path / "out" / "results.json")
    assert {(row["method"], row["protocol"], row["tokens"]) for row in results.rows} == {("mine", "tail", 2 * 16)}
    assert results.provenance["prefill_chunk"] == 48
    command = results.provenance["command"]
    assert "--tail 16" in command and "--prefill-chunk 48" in command and "offload" not in command
    config.write_text("prefill-chunk: 48\noffload-cache: true\n")
    assert "Expected a CUDA device for --offload-cache" in error_of(evaluate(tmp_path / "x", "--config", config))
    config.write_text("offload-cache: 1\n")
    assert "--offload-cache in" in error_of(evaluate(tmp_path / "x", "--config", config))
    config.write_text("resume: true\n")
    assert "got 'resume'. " in error_of(evaluate(tmp_path / "x", "--config", config))


def test_a_finished_run_can_write_its_report_again(tmp_path: Path) -> None:
    assert evaluate(tmp_path / "out").exit_code == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    for path in (tmp_path / "out").iterdir():
        if path.name != "journal.jsonl":
            path.unlink()
    assert "--resume" in error_of(evaluate(tmp_path / "out"))
    assert evaluate(tmp_path / "out", "--resume").exit_code == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["rows"] == first["rows"] and again["per_document"] == first["per_document"]
