"""Bad input to `compare`: one clear line, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers

from ..conftest import EXAMPLES
from .helpers import LEARNED, MODEL, compare, error_of, run


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "none,yran"}, "unknown method 'yran'; did you mean 'yarn'?"),
        ({"methods": ","}, "got --methods ,. Pass at least one"),
        ({"methods": "yarn,yarn"}, "more than once. Pass it once"),
        ({"methods": "yarn(beta_fast=16),yarn( beta_fast = 16 )"}, "'yarn(beta_fast=16)' at factor 2 more than once"),
        ({"methods": "rerope(windw=32)"}, "rerope has no parameter 'windw'; did you mean 'window'?"),
        ({"methods": "rerope(window=32"}, "cannot read the parameters of 'rerope(window=32'"),
        ({"methods": "rerope(window=640)"}, "Expected a rerope window of 1 to 64 (the trained length), got 640"),
        ({"factor": 0}, "Expected a number above 0 and up to 16,777,216, got --factor 0"),
        ({"factor": "nan"}, "Expected --factor to be a number up to 1,099,511,627,776, got nan. Pass a smaller one."),
        ({"factor": "inf"}, "Expected --factor to be a number up to 1,099,511,627,776, got inf. Pass a smaller one."),
        ({"factor": "eight"}, "Expected --factor to be a number, got 'eight'. Pass a number, or leave --factor out."),
        ({"factor": "x8"}, "'x8'"),
        ({"factor": None}, "needs --factor or --target-length"),
        ({"factor": "1e9"}, "a number above 0 and up to 16,777,216, got --factor 1000000000.0"),
        (
            {"trained_length": "999999999999999"},
            "Expected --trained-length to be a whole number from 2 to 16,777,216, got '999999999999999'",
        ),
        ({"target_length": 100}, "factor 2 means 128 tokens, and --target-length is 100. Pass one of the two"),
        ({"methods": "none,none"}, "at factor 2 more than once"),
        ({"model": LEARNED, "methods": "table-linear", "factor": "2e5"}, "bytes; at most 2147483648 are made"),
        ({"factor": 0.5}, "below the trained length of 64"),
        ({"factor": None, "target_length": 32}, "below the trained length of 64"),
        (
            {"model": EXAMPLES / "tiny" / "tiny-alibi"},
            "Expected methods that apply, got only none: linear, yarn: extends rotary positions; bloom has alibi. "
            "Pass methods for alibi positions: alibi-linear",
        ),
        ({"model": "./no/such/model"}, "got ./no/such/model: no such folder."),
        (
            {"model": EXAMPLES / "data"},
            ". Pass a folder with a model and its tokenizer, or a Hub id such as org/name.",
        ),
        ({"dataset": "no/such.jsonl"}, "got no/such.jsonl: no such path"),
        ({"text_column": "body"}, "--text-column to be one of id, source, text"),
        ({"documents": 0}, "Expected --documents to be a whole number of 1 or more, got '0'. Pass --documents 8."),
        ({"longppl": ""}, "Expected text for --longppl, got an empty one"),
        ({"protocol": ""}, "Expected text for --protocol, got an empty one"),
        ({"device": ""}, "Expected text for --device, got an empty one"),
        ({"lengths": "64,128k"}, "separated by commas, got --lengths 64,128k."),
        ({"lengths": "1"}, "2 or more"),
        ({"lengths": "64,10000000"}, "10000000"),
        ({"protocol": "prefixx"}, "Expected --protocol to be one of prefix, sliding"),
        ({"stride": 8}, "Expected --stride to be left out for protocol 'prefix', got 8"),
        ({"alpha": 3}, "Expected --longppl with --alpha 3.0, got none. Pass --longppl, too"),
        ({"protocol": "sliding"}, "Expected stride for protocol 'sliding', got none. Pass --stride 128, in tokens"),
        ({"tasks": "passkey"}, "--retrieval to be 1 or more with --tasks passkey, got 0. Pass --retrieval 4, too"),
        ({"prefill_chunk": 0}, "Expected --prefill-chunk to be a whole number of 1 or more, got '0'"),
        ({"protocol": "sliding", "stride": 64}, "stride"),
        ({"passkey": -1}, "Expected --passkey to be a whole number from 0 to 10,000, got '-1'"),
        ({"passkey": 1, "lengths": "16"}, "for a prompt of the task 'passkey'"),
        ({"start": -1}, "Expected --start to be a whole number of 0 or more, got '-1'"),
        ({"dtype": "int8"}, "Expected --dtype to be one of float32, bfloat16, float16, auto, got 'int8'. Pass"),
        ({"device": "cuda:99"}, "Expected a device that torch has on this machine, got 'cuda:99'"),
        ({"device": "meta"}, "Expected a device that torch has on this machine, got 'meta'"),
        ({"device": "abacus"}, "Expected a device that torch has on this machine, got 'abacus'"),
        ({"metods": "none"}, "--metods"),
        ({"model": None}, "Expected --model, got none. Pass --model: Model folder, GGUF file or Hub id."),
        ({"config": "no.yaml"}, "no.yaml: No such file or directory. Pass a YAML file, as in --config run.yaml"),
        ({"config": EXAMPLES}, "Is a directory. Pass a YAML file, as in --config run.yaml"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    assert message in error_of(compare(output, **changed))
    assert not output.exists()


def test_names_of_methods_in_any_case_are_taken(tmp_path: Path) -> None:
    result = compare(tmp_path / "out", methods="YaRN", lengths="64", documents=1)
    assert result.exit_code == 0 and "yarn x2" in result.stdout


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("lots", "max_position_embeddings': TypeError"),
        (10**18, f"got the config of llama with a trained length of {10**18}"),
    ],
)
def test_a_config_with_wrong_values_is_refused_with_the_reason(positions: Any, message: str, tmp_path: Path) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    assert message in error_of(compare(tmp_path / "out", model=model, **{"trained-length": None}))


@pytest.mark.parametrize("length", [10**30, -5, "long"])
def test_lengths_that_results_cannot_have_are_refused(length: Any, tmp_path: Path) -> None:
    results = json.loads((EXAMPLES.parent / "results" / "demo" / "tiny-rope.json").read_text())
    results["rows"][0]["length"] = length
    (tmp_path / "results.json").write_text(json.dumps(results))
    message = error_of(run("report", tmp_path / "results.json", "--output", tmp_path / "out"))
    assert re.search(rf"results\.json: (Expected )?rows\.0\.length .*{length}", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metods: none", "got 'metods'. Did you mean 'methods'?"),
        ("metods: none", "Did you mean 'methods'?"),
        ("config: other.yaml", "got 'config'. "),
        ("factor: [2, 4]", "factor in"),
        ("lengths: [64, [128]]", "Pass a list of plain values"),
        ("methods: {yarn: 8}", "Pass a list of plain values"),
        ("passkey: true", "passkey in"),
        ("factor: eight", "Expected --factor to be a number, got 'eight'"),
        ("documents: 2.5", "Expected --documents to be a whole number of 1 or more, got '2.5'"),
        ("- none", "holds list. Pass settings, a line each"),
        ("", "holds NoneType. Pass settings, a line each"),
        ("factor: [2", "is not YAML"),
        ("factor: 2\nfactor: 4", "'factor' is there twice"),
        ("[" * 20_000 + "]" * 20_000, "is nested too deeply. Pass settings, a line each"),
    ],
)
def test_wrong_config_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    result = compare(tmp_path / "out", config=config, factor=None, documents=None)
    assert message in error_of(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl"),
        ("number.jsonl", '{"text": 3}\n', "Expected text in document '0'"),
        ("torn.jsonl", '{"text": "a b', "Expected JSON in line 1"),
        (
            "short.jsonl",
            '{"text": "Call me Ishmael."}\n',
            "got 1 of at most 8. Pass lengths up to 8, or longer documents.",
        ),
        ("empty.txt", "", "0 + 128, got 1 of at most 0. Pass longer documents."),
        ("notes.docx", "text", "notes.docx. Pass such a file"),
    ],
)
def test_data_that_cannot_be_measured_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert message in error_of(compare(tmp_path / "out", dataset=tmp_path / name))


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    assert "is missing or" in error_of(compare(tmp_path / "out", model=tmp_path / "model"))


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert "Cannot load" in error_of(compare(tmp_path / "out", model=tmp_path / "model"))


def test_an_encoder_is_refused_with_what_it_has(tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    assert "Expected methods that apply, got none: yarn: extends rotary positions; bert has learned" in error_of(
        compare(tmp_path / "out", model=tmp_path, methods="yarn")
    )


def test_an_output_with_files_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("precious")
    assert "with files" in error_of(compare(tmp_path))
    assert (tmp_path / "results.json").read_text() == "precious"


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "that can be written, got" in error_of(compare(tmp_path / "file" / "out"))


def test_an_output_without_write_permission_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:  # a mode would not do: tests may run as root, who may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    # The model does not exist either: the output is looked at first.
    message = error_of(compare(tmp_path / "out", model="./no/such/model"))
    assert "that can be written, got" in message and "Permission denied" in message


@pytest.mark.parametrize("words", [["inspect", ""], ["recommend", MODEL, "--output="], ["report", ""], ["env", ""]])
def test_empty_words_are_refused_by_every_command(words: list[str]) -> None:
    assert "got an empty one. Pass some, or leave it out." in error_of(run(*map(str, words)))
