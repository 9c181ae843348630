"""Make links of `README.md` absolute, and add the URLs of the repository to `pyproject.toml`, for a release.

PyPI shows README without the files beside it. Only the release workflow knows the address of the repository.

python tools/release_links.py https://github.com/OWNER/NAME v1.2.3
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

RELATIVE = r"(?!https?:|mailto:|#)[^)\s]+"


def absolute(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose relative links point to the files of a tag on GitHub, pictures to their bytes."""
    text = re.sub(rf"(!\[[^\]]*\]\()({RELATIVE})\)", rf"\1{repository}/raw/{tag}/\2)", text)
    return re.sub(rf"(\]\()({RELATIVE})\)", rf"\1{repository}/blob/{tag}/\2)", text)


def with_urls(project: str, repository: str, tag: str) -> str:
    """Return the text of `pyproject.toml` with the URLs of the repository."""
    urls = {
        "Repository": repository,
        "Documentation": f"{repository}/blob/{tag}/docs/getting_started.md",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    return project.replace("[project.scripts]\n", f"[project.urls]\n{lines}\n[project.scripts]\n", 1)


def main(folder: Path, repository: str, tag: str) -> None:
    """Rewrite both files in a folder."""
    for name, rewrite in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = folder / name
        path.write_text(rewrite(path.read_text(encoding="utf-8"), repository.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1], *sys.argv[1:])
