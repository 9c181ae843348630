"""Measurement for these benchmarks: one thread, ways in turn, processor time, peak of resident memory.

A job prepares its model and tokens, warms up with a short run, and returns the function to measure, which has no
arguments. Every reading is taken in its own child process, forked from a server that has done the imports. No reading
uses memory or caches of an earlier one. Memory is read from /proc (Linux).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

Job = Callable[..., Callable[[], Any]]
STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "hf_posext.evaluation"])


@dataclass(frozen=True)
class Way:
    """
    One of several ways to compute the same result.

    Args:
        name (`str`): name in tables.
        job (`Job`): function of a module, which a child process can import.
        settings (`dict`): arguments of the job.
        needs (`int`): bytes of free memory below which the way is left out.
        once (`bool`): whether the way is read in the first turn only.
    """

    name: str
    job: Job
    settings: dict[str, Any] = field(default_factory=dict)
    needs: int = 0
    once: bool = False


@dataclass(frozen=True)
class Reading:
    """
    One measurement.

    Args:
        cpu_seconds (`float`): user and system time of the process.
        seconds (`float`): wall-clock time.
        peak_bytes (`int`): peak of resident memory, or of GPU memory on a GPU.
        extra_bytes (`int`): peak above the memory in use before the measured function.
        value (`Any`): result of the function.
    """

    cpu_seconds: float
    seconds: float
    peak_bytes: int
    extra_bytes: int
    value: Any


def read(job: Job, settings: dict[str, Any]) -> Reading | str:
    """Take a reading in this process, or return the reason why the way cannot run."""
    torch.set_num_threads(1)
    try:
        run = job(**settings)
        gc.collect()
        on_gpu = settings.get("device") == "cuda"
        before = _gpu_bytes(forget_peak=True) if on_gpu else _resident_bytes(forget_peak=True)
        cpu, clock = time.process_time(), time.perf_counter()
        value = run()
        if on_gpu:
            torch.cuda.synchronize()
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        peak = _gpu_bytes() if on_gpu else _resident_bytes()
        return Reading(cpu, clock, peak, peak - before, value)
    except torch.OutOfMemoryError:
        return "out of memory"
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"


def read_in_child(way: Way) -> Reading | str:
    """Take a reading in a child process, or return the reason why the way cannot run."""
    free = psutil.virtual_memory().available
    if way.settings.get("device") != "cuda" and way.needs > 0.8 * free:
        return f"needs {way.needs / 1e9:.1f} GB, and {free / 1e9:.1f} GB were free"
    environment = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ.update(environment)  # inherited by the server and its children
    with ProcessPoolExecutor(1, mp_context=CHILDREN) as pool:
        try:
            return pool.submit(read, way.job, way.settings).result()
        except BrokenProcessPool:
            return "the process was killed, most likely for its memory"


def read_in_turn(
    ways: Iterable[Way], repeats: int, done: Callable[[Way], object] = lambda way: None
) -> dict[str, list[Reading] | str]:
    """Return readings of each way, taken in turns. A way that cannot run is tried once."""
    readings_of: dict[str, list[Reading] | str] = {way.name: [] for way in ways}
    for turn in range(repeats):
        for way in ways:
            so_far = readings_of[way.name]
            if isinstance(so_far, str) or (turn and way.once):
                continue
            reading = read_in_child(way)
            readings_of[way.name] = reading if isinstance(reading, str) else [*so_far, reading]
            done(way)
    return readings_of


def seconds_in_turn(runs: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return the seconds of each function in this process, in turns of alternating order after one to warm up."""
    seconds_of: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            elapsed = seconds(runs[name], device)
            if turn:
                seconds_of[name].append(elapsed)
    return seconds_of


def seconds(run: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds of one call in this process: processor time, or on a GPU the time until it has finished."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(times: list[float], baseline_times: list[float]) -> float | None:
    """Return the median ratio of times in the same turn; `None` without any."""
    pairs = [a / b for a, b in zip(times, baseline_times, strict=False) if b > 0]
    return statistics.median(pairs) if pairs else None


def _resident_bytes(forget_peak: bool = False) -> int:
    """Return the peak of resident memory, or reset it and return the memory that is resident now."""
    if forget_peak:
        FORGET_PEAK.write_text("5")
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines["VmRSS" if forget_peak else "VmHWM"].split()[0])


def _gpu_bytes(forget_peak: bool = False) -> int:
    if forget_peak:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def free(device: str) -> None:
    """Return unused GPU memory to the system."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
