"""MkDocs hook: the site also shows files from outside docs/, and links to them work in it.

Pages link to files of the repository by relative paths, which work wherever the repository is
read. In the site, the files in ``PAGES`` are pages; all others that a page links to are copied
to ``files/``. A link to a file that does not exist fails the build (``mkdocs build --strict``).
"""

from __future__ import annotations

import logging
import re
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "experiments/README.md": "experiments.md",
}
"""Path in the repository -> page of the site."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^\s#()]+)")
"""Path of a relative Markdown link or image, without its anchor."""

log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages, and copies of what they and their copies link to."""
    root = dirname(config.config_file_path.replace("\\", "/"))
    for source, page in PAGES.items():
        if _exists(root, source, "mkdocs.yml"):
            files.append(File.generated(config, page, abs_src_path=join(root, source)))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for target in _targets(_source(file.src_uri), file.content_string):
            place = _place(target)
            if target.startswith("docs/") or files.get_file_from_path(place):
                continue
            if _exists(root, target, _source(file.src_uri)):
                copy = File.generated(config, place, abs_src_path=join(root, target))
                files.append(copy)
                waiting += [copy] if place.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the places of their targets in the site."""
    here = page.file.src_uri
    source = _source(here)

    def moved(match: re.Match[str]) -> str:
        return relpath(_place(_resolved(source, match[1])), dirname(here) or ".")

    return LINK.sub(moved, markdown)


def _targets(source: str, markdown: str) -> list[str]:
    return [_resolved(source, path) for path in LINK.findall(markdown)]


def _resolved(source: str, path: str) -> str:
    """Path in the repository of a link in the file ``source``."""
    return normpath(join(dirname(source), path))


def _place(target: str) -> str:
    """Path in the site of a file of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return PAGES.get(target, f"files/{target}")


def _source(place: str) -> str:
    """Path in the repository of a file of the site."""
    by_place = {page: source for source, page in PAGES.items()}
    if place.startswith("files/"):
        return place.removeprefix("files/")
    return by_place.get(place, f"docs/{place}")


def _exists(root: str, target: str, linked_from: str) -> bool:
    from pathlib import Path

    if (Path(root) / target).is_file():
        return True
    log.warning("%s links to %s, which is no file of the repository", linked_from, target)
    return False
