"""Other packages: their versions, and the extra of `hf_posext` that installs each.

`pip install hf_posext` brings what patching, saving and loading need. A room that needs more calls [`require`] before
its own imports, so that the error names the command to type.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .errors import MissingExtraError
from .version import __version__

EXTRAS = {
    "eval": ("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "scipy"),
    "train": ("peft",),
    "app": ("gradio",),
    "gguf": ("gguf",),
}
"""Modules of each extra, as in `pyproject.toml`. `train` and `app` contain `eval` there."""


def require(*extras: str) -> None:
    """
    Raise unless the packages of some extras are installed. Nothing is imported.

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


def versions_of(*packages: str) -> dict[str, str]:
    """
    Return the installed version of each package, "not installed" without one.

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
