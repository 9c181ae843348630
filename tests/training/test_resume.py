"""A run that is stopped, or killed, and resumed gives the weights of one that never was: the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_posext.errors import InvalidParameterError, TrainingError
from hf_posext.training import Evaluation
from hf_posext.training.trainer import newest_checkpoint

from ..evaluation.helpers import random_texts
from ..helpers import ROOT
from .helpers import assert_same_bits, preset, train

RUN = """
import sys
from tests.training.helpers import train
train(sys.argv[1], steps=400, save_every=2, pose=2)
"""


class Stops(TrainerCallback):
    """Ctrl-C in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changed",
    [
        {"preset": preset("lora"), "pose": 2},
        {"preset": preset("lora-plus"), "accumulation": 2, "batch_size": 2, "seed": 3},
        {"preset": preset("dora", ratio=2.0), "gradient_checkpointing": True},
        {"preset": preset("full"), "evaluation": Evaluation(random_texts(2, 200), [128], every=2), "bf16": True},
        {"preset": preset("lora", options={"lora_dropout": 0.3}), "longce": 16},
    ],
    ids=["lora", "lora-plus", "dora", "full", "dropout"],
)
def test_six_steps_are_three_and_three(changed: dict[str, Any], tmp_path: Path) -> None:
    settings = {"steps": 6, "save_every": 3, "warmup": 2, **changed}
    uninterrupted = train(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", **settings, callbacks=[Stops(5)])
    parts = train(tmp_path / "parts", **settings, resume=True)
    assert parts.provenance["result"]["resumed_from"] == "checkpoint-3"
    assert_same_bits(parts.model, uninterrupted.model)
    assert parts.log == uninterrupted.log


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", RUN, str(output)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120
    while newest_checkpoint(output / "checkpoints") is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = newest_checkpoint(output / "checkpoints")
    assert reached is not None and not (output / "adapter").exists()
    half = output / "checkpoints" / "checkpoint-399"  # as if killed while it was saved
    shutil.copytree(reached, half)
    (half / "posext_plan.json").unlink()
    (half / "adapter_model.safetensors").write_bytes(b"half")

    settings = {"steps": 400, "save_every": 2, "pose": 2}
    stop = int(reached.name.rpartition("-")[2]) + 6
    for place in (output, tmp_path / "whole"):
        with pytest.raises(KeyboardInterrupt):
            train(place, **settings, resume=True, callbacks=[Stops(stop)])
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        files = [place / "checkpoints" / f"checkpoint-{stop}" / name for place in (output, tmp_path / "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=4, save_every=1, callbacks=[Stops(2)])
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, steps=4, save_every=1, resume=True, method="linear", seed=1)
    assert 'method: "yarn" -> "linear"' in str(caught.value) and '"seed": 0' in str(caught.value)
    with pytest.raises(TrainingError, match="Expected the settings of the run in .*, got others \\(data: "):
        train(tmp_path, steps=4, save_every=1, resume=True, texts=random_texts(2, 300))
    train(tmp_path, steps=4, save_every=1, resume=True)
    with pytest.raises(InvalidParameterError, match="got one that has ended. Pass another output="):
        train(tmp_path, steps=4, save_every=1, resume=True)


def test_resume_begins_where_there_is_nothing_yet(tmp_path: Path) -> None:
    first, second = train(tmp_path / "first"), train(tmp_path / "second", resume=True)
    assert_same_bits(first.model, second.model)
    assert second.provenance["result"]["resumed_from"] is None


def test_hostile_files_beside_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=4, save_every=1, callbacks=[Stops(2)])
    content_before = (tmp_path / "provenance.json").read_text()
    for content, message in (
        ("[" * 100_000, "is not JSON"),
        ("[]", "Expected an object in .*, got list"),
        ("{", "is not JSON"),
    ):
        (tmp_path / "provenance.json").write_text(content)
        with pytest.raises(TrainingError, match=message):
            train(tmp_path, steps=4, save_every=1, resume=True)
    (tmp_path / "provenance.json").write_text(json.dumps(json.loads(content_before)))
    strange = tmp_path / "checkpoints" / "checkpoint-..\\x"
    strange.mkdir()
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-2"


def test_a_checkpoint_that_holds_code_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (tmp_path / "executed", "x")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", steps=4, save_every=2, callbacks=[Stops(2)])
    torch.save({"state": Evil()}, tmp_path / "out" / "checkpoints" / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(TrainingError, match="checkpoint-2 cannot be read: Weights only load failed"):
        train(tmp_path / "out", steps=4, save_every=2, resume=True)
    assert not (tmp_path / "executed").exists()
