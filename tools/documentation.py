"""Pages of the site that are not in `docs/`: README, changelog, the pages that they link to, and the reference.

`mkdocs.yml` registers `on_files` and `on_page_markdown` as hooks, and [`References`] as an extension of mkdocstrings.
A link means the same in the repository and on the site: its target becomes a page or a file of the site. A broken link
fails the build.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LABELLED = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)#:\s]+)\)")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "MODEL_CARD.md", "examples/README.md")

ROOMS = {
    "methods": "Methods",
    "patching": "Patching",
    "evaluation": "Evaluation",
    "diagnosis": "Diagnosis",
    "recommendation": "Recommendation",
    "frequency_search": "Frequency search",
    "reporting": "Reports",
    "training": "Training",
    "adapters": "Adapters",
    "export": "Export",
    "plan": "Plans",
    "scheme": "Schemes",
    "errors": "Errors",
    "testing": "Testing methods",
}
"""Title of the reference page of each room."""


def public_names(room: str) -> list[str]:
    """Return the `__all__` of a room, or the public classes and functions of a module without one."""
    package = ROOT / "hf_posext" / room / "__init__.py"
    tree = ast.parse((package if package.exists() else package.parent.with_suffix(".py")).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return sorted(ast.literal_eval(node.value))
    named = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [node.name for node in named if not node.name.startswith("_")]


def place(room: str, name: str) -> str:
    """Return the path under which the site documents a public name, also of a function named like its module."""
    module = ROOT / "hf_posext" / room / f"{name}.py"
    return f"hf_posext.{room}.{name}.{name}" if module.is_file() else f"hf_posext.{room}.{name}"


def site_path(path: str) -> str:
    """Return the path on the site of a file of the repository."""
    place = "index.md" if path == "README.md" else path
    return place.removeprefix("docs/")


def targets(path: str) -> list[str]:
    """Return the files of the repository that a page links to."""
    folder = PurePosixPath(path).parent
    linked = (os.path.normpath(folder / link) for link, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8")))
    return [target for target in linked if (ROOT / target).is_file()]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that others link to, and a reference page for each room."""
    pages = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path in pages:  # grows while pages link to others
        pages += [target for target in targets(path) if target.endswith(".md") and target not in pages]
    linked = {target for path in pages for target in targets(path)}
    for path in sorted({*pages, *linked}):
        if not path.startswith("docs/"):
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    for room, title in ROOMS.items():
        if (ROOT / "hf_posext" / room).is_dir() or (ROOT / "hf_posext" / f"{room}.py").is_file():
            sections = "\n\n".join(f"::: {place(room, name)}" for name in public_names(room))
            files.append(File.generated(config, f"reference/{room}.md", content=f"# {title}\n\n{sections}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page to the paths of their targets on the site."""
    uri = page.file.src_uri
    path = next((path for path in (f"docs/{uri}", uri) if (ROOT / path).is_file()), "README.md")

    def target(link: str) -> str:
        return os.path.normpath(PurePosixPath(path).parent / link)

    def moved(match: re.Match[str]) -> str:
        return f"]({os.path.relpath(site_path(target(match[1])), PurePosixPath(uri).parent)}{match[2] or ''})"

    def without_directories(match: re.Match[str]) -> str:
        return match[1] if (ROOT / target(match[2])).is_dir() else match[0]  # the site lists no directory

    return markdown if uri.startswith("reference/") else LINK.sub(moved, LABELLED.sub(without_directories, markdown))


PLACES = {name: place(room, name) for room in reversed(ROOMS) for name in public_names(room)}
REFERENCE = re.compile(r"\[`~?([\w.]+)(?:\(\))?`\](?![\[(])")


class References(griffe.Extension):  # type: ignore[misc]  # griffe is in .venv-docs alone
    """Extension that links public names to their reference, and documents settings by their help."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.is_attribute and str(obj.value).startswith("_setting("):
            obj.docstring = griffe.Docstring(ast.literal_eval(str(obj.value.arguments[0])), parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = REFERENCE.sub(self._link, obj.docstring.value)

    def _link(self, match: re.Match[str]) -> str:
        name = match[1].rsplit(".", 1)[-1]
        return f"[`{name}`][{PLACES[name]}]" if name in PLACES else f"`{name}`"
