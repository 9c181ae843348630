"""Measuring for these benchmarks: one thread, ways in turn, processor time, peak of resident memory.

A job is a function that gets ready whatever it measures (model, tokens, a short run to warm up) and returns what is
measured, a function without arguments. Every reading is taken in its own child process, forked from a server that
has done the imports, so that none finds memory or caches that another has left. Memory is read from /proc (Linux).
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
    One way of doing what others do as well.

    Args:
        name (`str`): in tables.
        job (`Job`): a function of a module.
        settings (`dict`): its arguments.
        needs (`int`): bytes without which it is not tried.
        once (`bool`): whether it is read in the first turn only.
    """

    name: str
    job: Job
    settings: dict[str, Any] = field(default_factory=dict)
    needs: int = 0
    once: bool = False


@dataclass(frozen=True)
class Reading:
    """
    Args:
        cpu_seconds (`float`): user and system time of the process.
        seconds (`float`): on the clock.
        peak_bytes (`int`): peak of memory; of the GPU's own memory there.
        extra_bytes (`int`): the same above what was in use when the measured function began.
        value (`Any`): what the function returned.
    """

    cpu_seconds: float
    seconds: float
    peak_bytes: int
    extra_bytes: int
    value: Any


def read(job: Job, settings: dict[str, Any]) -> Reading | str:
    """A reading in this process, or why there is none."""
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
    """A reading in a child process, or why there is none."""
    free = psutil.virtual_memory().available
    if way.settings.get("device") != "cuda" and way.needs > 0.8 * free:
        return f"needs {way.needs / 1e9:.1f} GB, and {free / 1e9:.1f} GB were free"
    environment = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ.update(environment)  # of the server, and by it of the children
    with ProcessPoolExecutor(1, mp_context=CHILDREN) as pool:
        try:
            return pool.submit(read, way.job, way.settings).result()
        except BrokenProcessPool:
            return "the process was killed, most likely for its memory"


def read_in_turn(
    ways: Iterable[Way], repeats: int, done: Callable[[Way], object] = lambda way: None
) -> dict[str, list[Reading] | str]:
    """Readings of each way, one of each before the next of any; a way that cannot run is not tried again."""
    found: dict[str, list[Reading] | str] = {way.name: [] for way in ways}
    for turn in range(repeats):
        for way in ways:
            so_far = found[way.name]
            if isinstance(so_far, str) or (turn and way.once):
                continue
            reading = read_in_child(way)
            found[way.name] = reading if isinstance(reading, str) else [*so_far, reading]
            done(way)
    return found


def seconds_in_turn(runs: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each function, in this process; in turns that go forth and back, after one to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            taken = seconds(runs[name], device)
            if turn:
                found[name].append(taken)
    return found


def seconds(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call, in this process: of the processor, or with a GPU until that has finished."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(ours: list[float], others: list[float]) -> float | None:
    """The median of the ratios of what was read in the same turn; `None` where there was nothing."""
    pairs = [a / b for a, b in zip(ours, others, strict=False) if b > 0]
    return statistics.median(pairs) if pairs else None


def _resident_bytes(forget_peak: bool = False) -> int:
    """The peak of resident memory, or what is resident now, where the peak of the past shall no longer count."""
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
    """Give memory of a GPU that is not in use to others."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
