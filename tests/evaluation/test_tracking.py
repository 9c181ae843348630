"""Results in the tools that people already have: trackers, `datasets`, model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from huggingface_hub import ModelCard, ModelCardData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_posext.errors import InvalidParameterError
from hf_posext.evaluation import Results, log_results
from hf_posext.evaluation.results import ROW_KEYS
from hf_posext.reporting import results_to_model_index


def a_row(method: str, factor: float, length: int, perplexity: float, **columns: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(ROW_KEYS)
    counts = {"protocol": "prefix", "bos": "none", "dtype": "float32", "tokens": 8 * (length - 1), "documents": 8}
    return {**row, "method": method, "factor": factor, "length": length, "perplexity": perplexity, **counts, **columns}


@pytest.fixture
def results() -> Results:
    rows = [
        a_row("none", 1.0, 512, 30.0, gain=1.0, change=0.0, ci95=[29.0, 31.0]),
        a_row("none", 1.0, 4096, float("inf")),
        a_row("yarn", 8.0, 512, 31.0, gain=1.0, change=0.03, ci95=[30.0, 32.0]),
        a_row("yarn", 8.0, 4096, 28.0, gain=1.1, change=-0.9, passkey=0.75, passkey_trials=4),
    ]
    return Results({"dataset": "emozilla/pg19", "recipe": "pg19", "split": "test", "revision": "c0217"}, rows)


def test_tensorboard(results: Results, tmp_path: Path) -> None:
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path, cpu=True)
    accelerator.init_trackers("runs")
    log_results(results, accelerator)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert curves == {
        "perplexity/none-x1": [(512, 30.0)],
        "perplexity/yarn-x8": [(512, 31.0), (4096, 28.0)],
        "gain/none-x1": [(512, 1.0)],
        "gain/yarn-x8": [(512, 1.0), (4096, np.float32(1.1))],  # what a file of TensorBoard holds is float32
        "change/none-x1": [(512, 0.0)],
        "change/yarn-x8": [(512, np.float32(0.03)), (4096, np.float32(-0.9))],
        "passkey/yarn-x8": [(4096, 0.75)],
    }


class Recorder(GeneralTracker):
    """Any other tracker: accelerate hands it what we log."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((step, values))


def test_other_trackers_get_ascending_steps_of_plain_numbers(results: Results) -> None:
    recorder = Recorder()
    accelerator = Accelerator(log_with=recorder, cpu=True)
    accelerator.init_trackers("runs")
    log_results(results, accelerator)
    assert [step for step, _ in recorder.logged] == [512, 4096], "each once: wandb drops what goes back"
    assert recorder.logged[1][1] == {
        "perplexity/yarn-x8": 28.0,
        "gain/yarn-x8": 1.1,
        "change/yarn-x8": -0.9,
        "passkey/yarn-x8": 0.75,
    }


def test_curves_of_a_legacy_protocol_say_so() -> None:
    recorder = Recorder()
    accelerator = Accelerator(log_with=recorder, cpu=True)
    accelerator.init_trackers("runs")
    row = a_row("none", 1.0, 512, 30.0, protocol="legacy-yarn", passkey=0.5, passkey_trials=4)
    log_results(Results({}, [row]), accelerator)
    assert recorder.logged[0][1] == {"perplexity-legacy-yarn/none-x1": 30.0, "passkey/none-x1": 0.5}


def test_without_a_tracker_nothing_is_lost_silently(results: Results) -> None:
    with pytest.raises(InvalidParameterError, match="init_trackers"):
        log_results(results, Accelerator(cpu=True))


def test_results_open_as_datasets(results: Results, tmp_path: Path) -> None:
    loaded = Results.load_json(results.save_json(tmp_path / "results.json"))
    table = datasets.Dataset.from_pandas(loaded.to_frame())
    assert len(table) == 4
    assert table["method"][:] == ["none", "none", "yarn", "yarn"]
    assert table["perplexity"][:] == [30.0, None, 31.0, 28.0]
    assert table["ci95_low"][:] == [29.0, None, 30.0, None]
    assert table.filter(lambda row: row["method"] == "yarn")["length"][:] == [512, 4096]


def test_model_index(results: Results) -> None:
    data = ModelCardData(model_name="my-model", eval_results=results_to_model_index(results))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n# My model\n")
    entries = card.data.eval_results
    assert entries is not None
    values = {(entry.dataset_config, entry.metric_name): entry.metric_value for entry in entries}
    assert values == {
        ("none x1, 512 tokens", "Perplexity"): 30.0,
        ("none x1, 512 tokens", "Gain over the truncated context"): 1.0,
        ("yarn x8, 512 tokens", "Perplexity"): 31.0,
        ("yarn x8, 512 tokens", "Gain over the truncated context"): 1.0,
        ("yarn x8, 4096 tokens", "Perplexity"): 28.0,
        ("yarn x8, 4096 tokens", "Gain over the truncated context"): 1.1,
        ("yarn x8, 4096 tokens", "Passkey retrieval"): 0.75,
    }
    assert {(entry.dataset_type, entry.dataset_name, entry.dataset_split) for entry in entries} == {
        ("emozilla/pg19", "pg19", "test")
    }
    assert entries[0].dataset_args == {
        "method": "none", "factor": 1.0, "length": 512, "protocol": "prefix", "documents": 8, "tokens": 4088,
    }  # fmt: skip


def test_a_card_does_not_show_whose_machine_it_was(results: Results, tmp_path: Path) -> None:
    results.provenance = {"dataset": str(tmp_path / "novels.jsonl")}
    assert {(entry.dataset_type, entry.dataset_name) for entry in results_to_model_index(results)} == {
        ("novels.jsonl", "novels.jsonl")
    }
    (named, *_) = results_to_model_index(results, dataset_name="My novels")
    assert named.dataset_name == "My novels"
