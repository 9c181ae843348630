"""`finetune`: what it writes and says, and one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_posext.adapters import load_adapter, verify_adapter

from ..conftest import EXAMPLES, logits, tokens
from .helpers import MODEL, NOVELS, error_of, run

OPTIONS: dict[str, Any] = {
    "model": MODEL,
    "dataset": EXAMPLES / "data" / "train.jsonl",
    "documents": 1,
    "method": "yarn",
    "trained-length": 64,
    "factor": 2,
    "steps": 2,
    "accumulation": 1,
    "warmup": 0,
    "learning-rate": 1e-3,
}


def finetune(output: Path, *flags: str, **changed: Any) -> Any:
    options = {**OPTIONS, **{name.replace("_", "-"): value for name, value in changed.items()}, "output": output}
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return run("finetune", *words, *flags)


def test_an_adapter_is_trained_and_what_it_did_is_told(tmp_path: Path) -> None:
    texts = tmp_path / "held.txt"
    texts.write_text(json.loads(NOVELS.read_text().splitlines()[0])["text"][:2000])
    options = {"lora_ratio": 4, "report_to": "tensorboard"}
    result = finetune(tmp_path / "out", evaluate=texts, every=1, passkey=1, lengths="96,128", rank=4, **options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("trained 43,008 parameters (0.75%), 2 steps, ")
    assert [line.partition(":")[0] for line in lines[1:]] == [
        lines[1].partition(":")[0],
        "perplexity at 96",
        "perplexity at 128",
        "passkey at 96",
        "passkey at 128",
        "adapter",
    ]
    assert lines[1].startswith("loss ") and lines[-1] == f"adapter: {tmp_path / 'out' / 'adapter'}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter",
        "checkpoints",
        "provenance.json",
        "training_log.json",
    }
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["run"]["preset"]["ratio"] == 4
    assert list((tmp_path / "out" / "checkpoints").rglob("events.out.tfevents.*"))
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    plain = logits(base.eval(), tokens(96))
    adapted = load_adapter(tmp_path / "out" / "adapter", base).eval()
    assert verify_adapter(adapted, tmp_path / "out" / "adapter")
    assert not torch.equal(logits(adapted, tokens(96)), plain)


def test_settings_come_from_a_file_too_and_a_run_that_has_ended_is_not_made_again(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("preset: full\nlearning_rate: 1.0e-4\nbf16: true\ngradient-checkpointing: true\nsteps: 1\n")
    result = finetune(tmp_path / "out", config=settings, learning_rate=None, steps=None)
    assert result.exit_code == 0, result.output
    settled = json.loads((tmp_path / "out" / "provenance.json").read_text())["run"]
    assert settled["preset"]["rank"] is None and settled["preset"]["learning_rate"] == 1e-4
    assert (
        settled["settings"]["bf16"]
        and settled["settings"]["gradient_checkpointing"]
        and settled["settings"]["steps"] == 1
    )
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    again = finetune(tmp_path / "out", "--resume", config=settings, learning_rate=None, steps=None)
    assert "got one that has ended. Pass another --output" in error_of(again)


@pytest.mark.parametrize(
    ("changed", "flags", "message"),
    [
        ({"method": None}, (), "Expected a method, got none. Pass one, as in --method yarn --factor 8."),
        ({"method": "yran"}, (), "unknown method 'yran'; did you mean 'yarn'?"),
        ({"method": "alibi-linear"}, (), "alibi-linear extends alibi positions; llama has rotary"),
        ({"factor": None}, (), "needs --factor or --target-length"),
        ({"preset": "lora+"}, (), "got 'lora+'. Did you mean 'lora'?"),
        ({"preset": "full", "rank": 8}, (), "Expected a preset with an adapter beside --rank, got 'full'"),
        (
            {"preset": "full", "lora_ratio": 4},
            (),
            "beside --lora-ratio, got 'full', which trains all weights. Pass --preset lora.",
        ),
        ({"lora_ratio": 0}, (), "ratio to be a number above 0, got 0.0"),
        (
            {"report_to": "tensorbord"},
            (),
            "Expected --report-to to be a tracker that is installed (",
        ),
        ({"rank": 0}, (), "Expected --rank to be a whole number of 1 or more, got '0'. Pass --rank 8."),
        ({"targets": "query"}, (), "peft cannot put the adapter on LlamaForCausalLM"),
        (
            {"learning_rate": "nan"},
            (),
            "--learning-rate to be a number up to 1,099,511,627,776, got nan. Pass",
        ),
        ({"length": 4096}, (), "--length to be 2 to 128 tokens, the target of yarn, got 4096"),
        ({"steps": 0}, (), "Expected --steps to be a whole number of 1 or more, got '0'. Pass --steps 1000."),
        ({"pose": 2, "length": 128}, (), "--length to be below the target of 128 tokens for pose, got 128"),
        ({"dtype": "bfloat16"}, (), "LlamaForCausalLM is bfloat16. Pass --bf16"),
        ({"patience": 2}, (), "--patience requires --evaluate. Pass both or neither."),
        ({"passkey": 2}, (), "--passkey requires --evaluate. Pass both or neither."),
        ({"dataset": "no/such.jsonl"}, (), "got no/such.jsonl: no such path"),
        ({"lengths": "64,x"}, (), "separated by commas, got --lengths 64,x"),
        ({"model": EXAMPLES / "tiny" / "tiny-alibi"}, (), "yarn extends rotary positions; bloom has alibi"),
        ({}, ("--load-in-4bit",), "Expected bitsandbytes for 4-bit weights, which is not installed"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(changed: dict[str, Any], flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in error_of(finetune(tmp_path / "out", *flags, **changed))
    assert not (tmp_path / "out").exists()


def test_texts_that_are_too_short_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    message = error_of(finetune(tmp_path / "out", dataset=tmp_path / "short.txt"))
    assert (
        "do not fill a row of 128 tokens" in message
        and "Pass longer documents or a smaller length, or pack them" in message
    )


def test_texts_to_measure_on_are_found_as_the_others_in_a_split_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads: list[Any] = []

    def load(source: str, *, limit: int | None = None, **options: Any) -> list[str]:
        loads.append((source, options))
        return ["A text."]

    monkeypatch.setattr("hf_posext.evaluation.load_documents", load)
    options = {"text_column": "body", "revision": "v1", "split": "train", "evaluate_split": "test"}
    for held_out in ("me/novels", "me/others"):
        error_of(finetune(tmp_path / "out", dataset="me/novels", evaluate=held_out, **options))
    trained_on = ("me/novels", {"text_column": "body", "split": "train", "revision": "v1"})
    same_source, other_source = (
        {"text_column": "body", "split": "test", "revision": revision} for revision in ("v1", None)
    )
    assert loads == [trained_on, ("me/novels", same_source), trained_on, ("me/others", other_source)]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds files already" in error_of(finetune(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
