"""Directory of a run: the trained weights, and a provenance that reproduces the run.

| path in `output` | what |
|---|---|
| `adapter` or `model` | what was trained, with its plan |
| `checkpoints` | the Trainer's; the newest two |
| `training_log.json` | loss, gradient norm and learning rate of each step, and every evaluation |
| `provenance.json` | base, method, plan, preset, settings, data, seeds, versions, trainable parameters, time |
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..adapters import save_adapter
from ..errors import InvalidParameterError, TrainingError
from ..evaluation.reading import portable, write_atomically
from ..packages import versions_of
from ..patching import Patch

CHECKPOINTS = "checkpoints"
LOG = "training_log.json"
PROVENANCE = "provenance.json"

PACKAGES = ("hf_posext", "transformers", "peft", "accelerate", "datasets", "torch")


def check_output(output: Path, resume: bool) -> None:
    """Refuse a directory in which something would be lost.

    Raises:
        InvalidParameterError: it holds files, and the run is not one to resume; or the run there has ended.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not resume:
        raise InvalidParameterError(
            f"output {output} holds files already. Pass another, or resume=True to go on with the run that is there"
        )
    if not (output / PROVENANCE).is_file():
        raise InvalidParameterError(
            f"output {output} holds files and no {PROVENANCE}, so there is no run to resume. Pass another output"
        )
    if "result" in _read(output):
        raise InvalidParameterError(
            f"the run in {output} has ended; there is nothing to resume: give another output to train again"
        )


def begin(output: Path, run: dict[str, Any]) -> None:
    """Write what a run is, or compare it with what is there.

    Args:
        output (`Path`): of the run.
        run (`dict`): all that decides which weights come out.

    Raises:
        TrainingError: the run there is another one; says in what.
    """
    output.mkdir(parents=True, exist_ok=True)
    run = json.loads(json.dumps(run))
    if not (output / PROVENANCE).is_file():
        _write(output, {"run": run, "versions": _versions(), "command": _command()})
        return
    before = _read(output).get("run", {})
    changed = [
        f"{name}: {json.dumps(before.get(name))} -> {json.dumps(value)}"
        for name, value in run.items()
        if before.get(name) != value
    ]
    if changed:
        raise TrainingError(
            f"the run in {output} is another one ({'; '.join(changed)}). Pass the same settings, or another output"
        )


def forget(output: Path) -> None:
    """Remove the files of a run that ended before its first checkpoint, so that it can be restarted."""
    (output / PROVENANCE).unlink(missing_ok=True)
    for directory in (output / CHECKPOINTS, output):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def finish(output: Path, result: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the log and what came out; returns the whole provenance."""
    write_atomically(output / LOG, json.dumps(log, indent=1) + "\n")
    provenance = {**_read(output), "result": result}
    _write(output, provenance)
    return provenance


def provenance_of(saved: Path) -> dict[str, Any] | None:
    """Return the provenance of the run that saved an adapter or a model; `None` for any other folder.

    Raises:
        TrainingError: a provenance that cannot be read.
    """
    saved = saved.resolve()
    if not (saved.parent / PROVENANCE).is_file():
        return None
    found = _read(saved.parent)
    result = found.get("result")
    return found if isinstance(result, dict) and result.get("path") == saved.name else None


def _write(output: Path, provenance: dict[str, Any]) -> None:
    write_atomically(output / PROVENANCE, json.dumps(provenance, indent=1) + "\n")


def _read(output: Path) -> dict[str, Any]:
    try:
        found = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{output / PROVENANCE} is not JSON: {error}. Pass another output") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{output / PROVENANCE} holds no object. Pass another output")
    return found


def _versions() -> dict[str, str]:
    return {**versions_of(*PACKAGES), "python": platform.python_version()}


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])])


def save(network: nn.Module, patch: Patch, trainer: Trainer, output: Path) -> Path:
    """Save the adapter into `output/adapter`, or the model into `output/model`, with its plan.

    Args:
        network (`PeftModel` or `PreTrainedModel`): trained; shards of it are put together on every process.
        patch ([`Patch`]): in force on it.
        trainer (`Trainer`): that trained it.
        output (`Path`): of the run.
    """
    adapted = isinstance(network, PeftModel)
    path = output / ("adapter" if adapted else "model")
    if trainer.is_fsdp_enabled:
        _gather(network)
    if trainer.args.should_save:
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        if adapted:
            save_adapter(network, partial)
        else:
            patch.save_pretrained(partial)
        partial.rename(path)
    return path


@torch.no_grad()
def _gather(network: nn.Module) -> None:
    """Gather FSDP shards to whole weights on the CPU. The model cannot be trained afterwards."""
    whole: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                if id(weight) not in whole:  # tied weights stay tied
                    whole[id(weight)] = nn.Parameter(weight.full_tensor().cpu(), requires_grad=weight.requires_grad)
                setattr(module, name, whole[id(weight)])
