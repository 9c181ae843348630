"""Directory of a run: the trained weights, and a provenance that allows the run to be repeated.

| path in `output` | content |
|---|---|
| `adapter` or `model` | the trained weights, with their plan |
| `checkpoints` | the newest two checkpoints of the Trainer |
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
    """Refuse an output directory that contains files without a run to resume."""
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
    """Write the facts that determine the trained weights, or compare them with those of the run to resume."""
    output.mkdir(parents=True, exist_ok=True)
    run = json.loads(json.dumps(run))
    if not (output / PROVENANCE).is_file():
        versions = {**versions_of(*PACKAGES), "python": platform.python_version()}
        command = shlex.join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])])
        _write(output, {"run": run, "versions": versions, "command": command})
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
    """Remove the record of a run that ended before its first checkpoint. The run can then be started again."""
    (output / PROVENANCE).unlink(missing_ok=True)
    for directory in (output / CHECKPOINTS, output):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def finish(output: Path, result: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the log and the result of a run, and return the whole provenance."""
    write_atomically(output / LOG, json.dumps(log, indent=1) + "\n")
    provenance = {**_read(output), "result": result}
    _write(output, provenance)
    return provenance


def provenance_of(saved: Path) -> dict[str, Any] | None:
    """Return the provenance of the run that saved an adapter or a model; `None` for any other folder."""
    saved = saved.resolve()
    if not (saved.parent / PROVENANCE).is_file():
        return None
    provenance = _read(saved.parent)
    result = provenance.get("result")
    return provenance if isinstance(result, dict) and result.get("path") == saved.name else None


def _write(output: Path, provenance: dict[str, Any]) -> None:
    write_atomically(output / PROVENANCE, json.dumps(provenance, indent=1) + "\n")


def _read(output: Path) -> dict[str, Any]:
    try:
        provenance = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{output / PROVENANCE} is not JSON: {error}. Pass another output") from error
    if not isinstance(provenance, dict):
        raise TrainingError(f"{output / PROVENANCE} holds no object. Pass another output")
    return provenance


def save(network: nn.Module, patch: Patch, trainer: Trainer, output: Path) -> Path:
    """Save an adapter to `output/adapter`, or a model to `output/model`, with its plan, and return the path.

    FSDP shards are gathered in every process.
    """
    adapted = isinstance(network, PeftModel)
    path = output / ("adapter" if adapted else "model")
    if trainer.is_fsdp_enabled:
        _gather(network)
    if trainer.args.should_save:
        # the final name only ever belongs to a complete result
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
    """Replace the FSDP shards of a network by whole weights on the CPU. It can no longer be trained."""
    whole: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                if id(weight) not in whole:  # tied weights stay tied
                    whole[id(weight)] = nn.Parameter(weight.full_tensor().cpu(), requires_grad=weight.requires_grad)
                setattr(module, name, whole[id(weight)])
