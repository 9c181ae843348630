"""Other packages, the machine and the commit: what an error, a bug report or a result has to name.

`pip install hf_posext` brings what patching, saving and loading need. A room that needs more calls [`require`] before
its own imports, so that the error names the command to type.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import __version__
from .errors import MissingExtraError

EXTRAS = {
    "eval": ("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "scipy"),
    "train": ("peft",),
    "app": ("gradio",),
    "gguf": ("gguf",),
    "serve": ("fastapi", "openai", "uvicorn"),
}
"""Modules of each extra, as in `pyproject.toml`. `train` and `app` contain `eval` there."""


def require(*extras: str) -> None:
    """Raise unless the packages of some extras are installed. Nothing is imported.

    Args:
        extras (`str`): keys of `EXTRAS`.

    Raises:
        MissingExtraError: at least one package is not installed.
    """
    missing = {extra: [name for name in EXTRAS[extra] if find_spec(name) is None] for extra in extras}
    names = [name for packages in missing.values() for name in packages]
    if names:
        wanted = ",".join(extra for extra, packages in missing.items() if packages)
        raise MissingExtraError(f"{', '.join(names)} not installed. Run: pip install 'hf_posext[{wanted}]'")


def hub_obstacle(name: str, kind: str) -> str | None:
    """Return the reason why a name cannot be looked up on the Hub, or `None`. This takes one request.

    Without a network, huggingface_hub repeats its requests for up to a minute. Copies in its cache are found without.

    Args:
        name (`str`): id of a repository.
        kind (`str`): `"model"` or `"dataset"`.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.file_download import repo_folder_name

    is_cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind)).is_dir()
    if is_cached or constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of httpx or its successor, by version
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            return f"this machine has no such path, and {constants.ENDPOINT} cannot be reached ({error})"
    return None


def versions_of(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, "not installed" without one.

    Args:
        packages (`str`): names on PyPI. `hf_posext` has a version in a bare checkout, too.
    """
    versions: dict[str, str] = {}
    for package in packages:
        try:
            versions[package] = __version__ if package == "hf_posext" else version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def machine() -> dict[str, Any]:
    """Return what a result was measured on, and when, for its provenance.

    Returns:
        `dict`: `date` (UTC), `processor`, `cores`, `memory_gb` (10^9 bytes; `None` where the system does not report
        it), `gpu` (name of the first one, or `None`), and `commit` of this package, `None` unless it runs from a
        clone. A commit ends in `+` where tracked files of the package differ from it.
    """
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others may not know the name
        memory = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
    }


def commit() -> str | None:
    """Return the commit of the clone that this package runs from, with `+` after it where the package was changed."""
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():  # site-packages may stand inside somebody else's repository
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or a clone that it refuses to read
        return None
