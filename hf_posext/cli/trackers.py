"""Trackers of results: TensorBoard, Weights & Biases, MLflow, and others that accelerate supports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidParameterError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..evaluation import Results


def check_tracker(option: str, name: str, installed: list[str]) -> None:
    """Refuse, before any work, a tracker that is not installed.

    Args:
        option (`str`): name of the option, for the message.
        name (`str`): requested tracker.
        installed (`list[str]`): trackers that the library can use on this machine.

    Raises:
        InvalidParameterError: the tracker is unknown or not installed.
    """
    if name not in installed:
        names = ", ".join(sorted(installed)) or "none; pip install tensorboard"
        raise InvalidParameterError(f"{option} is {name!r}; installed here are: {names}")


def accelerate_trackers() -> list[str]:
    """Return the trackers that `accelerate` can log to on this machine."""
    from accelerate.tracking import get_available_trackers

    return [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]


def track(results: Results, name: str, output: Path, accelerator: Accelerator | None) -> None:
    """Log the results of a finished run as curves over the context length.

    Trackers that write files write to `hf_posext` in `output`.
    """
    from accelerate import Accelerator

    from ..evaluation import log_results

    on_cpu = accelerator is None or accelerator.device.type == "cpu"
    tracking = Accelerator(cpu=on_cpu, log_with=name, project_dir=output)
    tracking.init_trackers("hf_posext")
    log_results(results, tracking)
    for tracker in tracking.trackers:
        tracker.finish()
