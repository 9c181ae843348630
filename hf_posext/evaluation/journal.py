"""Crash-safe journal of a run: a finished task is on disk before the next one starts.

Each line is one JSON object. The first line contains everything that the run depends on, and each later line contains
a task and its value:

    {"schema": 3, "configuration": {"model": "...", "lengths": [512, 4096], ...}}
    {"task": {"kind": "nll", "method": "yarn", "factor": 8.0, "lengths": [512], "document": "book-1"}, "value": [...]}

Process 0 writes `journal.jsonl`, and process n writes `journal-n.jsonl` next to it. A resumed run reads all of these
files, so it may have a different number of processes. A journal has one writer: a second run is refused while the
first one is active.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..decode import short
from ..errors import JournalError
from ..patching.frequencies import forget_length
from ..plan import ExtensionPlan
from ..processes import WriterLock, everywhere, journal_file, journal_files, processes_of, rank_of
from .scorer import autocast_dtype, model_name
from .setup import Setup
from .tasks import Task, key_text
from .tokens import TokenizedDocuments

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEMA = 3

LISTED = 5
"""Most differences between two runs in a message. Two models differ in dozens of entries."""

SAMPLES = 32
"""Number of values of each tensor in a fingerprint, in addition to the sum, which does not depend on their order."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype with as many bits as a value, by the value's size in bytes."""


class RunJournal:
    """Mapping from finished tasks to their values, kept in a file.

    `journal[task] = value` appends a line and waits until it is on disk (fsync). A run that is killed at any moment
    loses only the current task. A torn last line is cut off on resume. Nothing is written before the first task is
    finished. `values` contains the values finished by all processes, by `key_text`.

    Args:
        path (`str` or `Path`): file of process 0. The files of other processes are named after it.
        configuration (`Mapping`): everything that the measurements depend on, in plain JSON types.
        rank (`int`, *optional*, defaults to 0): index of this process.
        processes (`int`, *optional*, defaults to 1): number of processes of this run.

    Raises:
        JournalError: the journal has another configuration, another run is writing it, a line is corrupt, or a file
            cannot be read or written.
    """

    def __init__(self, path: str | Path, configuration: Mapping[str, Any], rank: int = 0, processes: int = 1) -> None:
        self.path = journal_file(path, rank)
        self._header = {"schema": SCHEMA, "configuration": json.loads(json.dumps(configuration))}
        self._file: FileIO | None = None
        self._size = 0  # bytes of the complete lines that this process has read or written
        self.values: dict[str, Any] = {}
        self._lock = WriterLock(path, rank, processes)
        try:
            for file in journal_files(path):
                self.values |= dict(self._read(file))
        except JournalError:
            self.close()
            raise

    def __contains__(self, task: Task) -> bool:
        return key_text(task) in self.values

    def __getitem__(self, task: Task) -> Any:
        return self.values[key_text(task)]

    def __setitem__(self, task: Task, value: Any) -> None:
        """Write the value of a finished task, in plain JSON types. If the disk is full, all earlier lines are kept."""
        try:
            if self._file is None:
                self._file = self._open()
            self._write(self._file, {"task": task.key, "value": value})
        except OSError as error:
            raise JournalError(
                f"cannot write {self.path}: {error.strerror}; all that was finished before is kept there: make room, "
                "then run the same again with --resume (in Python, with the same journal=)"
            ) from error

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> FileIO:
        """Open the file with its header, and cut off a torn last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(self.path, "a+")
        file.seek(0)
        self._require_unchanged(file.readall().rfind(b"\n") + 1)
        file.truncate(self._size)
        if not self._size:
            self._write(file, self._header)
        return file

    def _write(self, file: FileIO, entry: Mapping[str, Any]) -> None:
        status = os.fstat(file.fileno())
        self._require_unchanged(status.st_size)
        if not (self.path.exists() and os.path.samestat(status, self.path.stat())):  # another run may start there
            raise JournalError(
                f"{self.path} was moved or deleted during the run, and what is finished with it. Start again in a "
                "directory that nothing else changes."
            )
        data = memoryview(json.dumps(entry).encode() + b"\n")
        self._size += len(data)
        while data:  # a disk that is nearly full accepts only part of it
            data = data[file.write(data) :]
        os.fsync(file.fileno())

    def _require_unchanged(self, size: int) -> None:
        """Refuse lines that this process neither read nor wrote, in case the file system has no locks."""
        if size != self._size:
            raise JournalError(
                f"{self.path} has {size} bytes where this run left {self._size}: another run writes it; end that one, "
                "and go on with --resume (in Python, with the same journal=), or give another output"
            )

    def _read(self, file: Path) -> Iterator[tuple[str, Any]]:
        try:
            *lines, torn = (data := file.read_bytes()).split(b"\n")  # the rest after the last newline
        except OSError as error:
            raise JournalError(
                f"cannot read the journal {file}: {error.strerror}. Pass another --output (in Python, journal=)."
            ) from error
        if file == self.path:
            self._size = len(data) - len(torn)
        for number, line in enumerate(lines, 1):
            entry = _parsed(line, ("task", "value") if number > 1 else ("schema", "configuration"))
            if entry is None:
                raise JournalError(
                    f"{file} is corrupt at line {number}: {short(line.decode(errors='replace'))}. Delete that line to "
                    "go on without this measurement, or the whole file to begin anew."
                )
            if number > 1:
                yield json.dumps(entry["task"]), entry["value"]
            elif entry != self._header:
                differences = list(_differences("", entry, self._header))
                more = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
                raise JournalError(
                    f"{file} is the journal of another run, which cannot be continued by this one: "
                    f"{'; '.join(differences[:LISTED])}{more}. Pass another output, or the earlier settings."
                )


@contextmanager
def open_journal(
    path: str | Path | None, configuration: Mapping[str, Any], accelerator: Accelerator | None
) -> Iterator[RunJournal | None]:
    """Open the journal of this process, with the finished tasks of all processes; `None` without a path.

    Every process raises the [`JournalError`] of one.
    """
    if path is None:
        yield None
        return
    rank, processes = rank_of(accelerator), processes_of(accelerator)
    journals: list[RunJournal] = []  # not exchanged, because a lock belongs to its process

    def read() -> dict[str, Any]:
        journals.append(RunJournal(path, configuration, rank, processes))
        return journals[0].values

    try:
        for values in everywhere(read, accelerator):  # machines may not share a directory
            journals[0].values |= values
        yield journals[0]
    finally:
        for journal in journals:
            journal.close()


def _parsed(line: bytes, keys: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and tuple(entry) == keys else None


def _differences(path: str, earlier: Any, current: Any) -> Iterator[str]:
    """Describe the differences between two JSON values, such as `lengths.0 is 512 there and 1024 here`."""
    if isinstance(earlier, dict) and isinstance(current, dict):
        for key in earlier | current:
            yield from _differences(f"{path}.{key}", earlier.get(key), current.get(key))
    elif isinstance(earlier, list) and isinstance(current, list) and len(earlier) == len(current):
        for index, pair in enumerate(zip(earlier, current, strict=True)):
            yield from _differences(f"{path}.{index}", *pair)
    elif earlier != current:
        name = path.removeprefix(".").removeprefix("configuration.")
        yield f"{name} is {short(earlier)} there and {short(current)} here"


def run_identity(
    setup: Setup, models: Sequence[Any], plans: Sequence[ExtensionPlan | None], **dependencies: Any
) -> dict[str, Any]:
    """Return everything that the measurements of a run depend on.

    Options that save memory are not included. They change only the rounding, and a run that was killed for lack of
    memory can then continue with smaller chunks.
    """
    config, versions = setup.config, dict(setup.provenance["versions"])
    return {
        "versions": {name: versions[name] for name in ("hf_posext", "torch", "transformers")},
        "models": [
            {
                "model": model_name(model),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                "autocast": (dtype := autocast_dtype(model)) and str(dtype).removeprefix("torch."),
                "matmul": torch.get_float32_matmul_precision(),
                "attention": getattr(model.config, "_attn_implementation", None),
                "config": _config(model),
                "weights": weights_fingerprint(model),
            }
            for model in models
        ],
        "plans": [None if plan is None else plan.to_dict() for plan in plans],
        "lengths": setup.lengths,
        "protocol": setup.protocol.name,
        "stride": config.stride,
        "tail": config.tail,
        "start": config.start,
        "seed": config.seed,
        "tokens": tokens_fingerprint(setup.documents),
        **dependencies,
    }


def tokens_fingerprint(documents: TokenizedDocuments) -> str:
    """Return a fingerprint of the ids, tokens, and bytes of all documents, in order."""
    digest = hashlib.sha256(repr((documents.ids, documents.bos, tuple(documents.tokens.shape))).encode())
    for table in (documents.tokens, documents.byte_ends):
        digest.update(b"" if table is None else table.numpy().tobytes())
    return digest.hexdigest()


def _config(model: Any) -> dict[str, Any]:
    """Return a model's config, including quantisation, without its path and the version of transformers."""
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Return a fingerprint of a model's numbers: each tensor by name, shape, dtype, and values, and plain floats.

    Tensors are parameters, buffers (even if they are not saved), and everything else that quantised layers save. Plain
    floats are the attributes of modules, such as epsilons or the scaling of an adapter. The active adapters count too.
    If weights are sharded, every process has to call this function.
    """
    forget_length(model)  # the buffers of a dynamic rotary module depend on what was read
    tensors = dict(model.named_parameters()) | dict(model.named_buffers(remove_duplicate=False)) | model.state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            _add(digest, name, tensor)
    for name, module in model.named_modules():
        numbers = sorted((key, value) for key, value in vars(module).items() if _is_numeric(value))
        digest.update(repr((name, numbers, _adapters_of(module))).encode())
    return digest.hexdigest()


def _is_numeric(value: Any) -> bool:
    """Return `True` for a float or a dictionary of floats. Integers are excluded, because some of them count calls."""
    values = value.values() if isinstance(value, dict) else [value]
    return bool(values) and all(isinstance(item, float) for item in values)


def _adapters_of(module: nn.Module) -> list[Any]:
    """Return the active adapters of a layer, and whether all are disabled; empty for a layer without adapters."""
    states = [getattr(module, name, None) for name in ("active_adapters", "disable_adapters")]
    return [state for state in states if state is not None and not callable(state)]  # a whole model has methods


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    elif is_traceable_wrapper_subclass(tensor):  # quantised by torchao: the numbers are in the inner tensors
        for part in tensor.__tensor_flatten__()[0]:
            _add(digest, f"{name}.{part}", getattr(tensor, part))
        return
    if tensor.numel() and not tensor.is_meta:  # offloaded weights have no values to read
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        # Integer sums do not depend on the order of summation. The sampled values record the order of the tensor.
        bits = values.view(BITS[values.element_size()]).reshape(-1)
        places = torch.arange(SAMPLES, device=bits.device) * (bits.numel() - 1) // (SAMPLES - 1)
        digest.update(torch.cat([bits[places].long(), bits.sum(dtype=torch.int64)[None]]).cpu().numpy().tobytes())
