"""Make README.md and pyproject.toml ready for a package index, which lacks the repository.

    python .github/release.py https://github.com/OWNER/NAME v1.2.3

Relative links in README.md become links to the tag, and ``[project.urls]`` gets the repository's.
The repository itself says nowhere where it is hosted, so a fork publishes its own links. For other
hosts than GitHub, and where the pages are published elsewhere, change ``URLS`` and ``FILE`` here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^\s#()]*)(?P<rest>[^\s()]*)\)"
)
FILE = {"": "{url}/blob/{tag}/{path}", "!": "{url}/raw/{tag}/{path}"}
"""Where a file is shown, and where an image's bytes are."""
URLS = {
    "Source": "{url}",
    "Documentation": "{url}/blob/{tag}/docs/getting-started.md",
    "Changelog": "{url}/blob/{tag}/CHANGELOG.md",
    "Issues": "{url}/issues",
}


def absolute(readme: str, url: str, tag: str) -> str:
    """The README with links that work anywhere."""

    def changed(match: re.Match[str]) -> str:
        place = FILE[match["image"]].format(url=url, tag=tag, path=match["path"] or "README.md")
        return f"{match['image']}[{match['text']}]({place}{match['rest']})"

    return LINK.sub(changed, readme)


def with_urls(pyproject: str, url: str, tag: str) -> str:
    """pyproject.toml with the repository's links in ``[project.urls]``.

    Raises:
        ValueError: it has some already, or no such table.
    """
    start = re.search(r"^\[project\.urls\].*\n", pyproject, re.M)
    if start is None:
        raise ValueError("pyproject.toml must have a table [project.urls]")
    before, after = pyproject[: start.end()], pyproject[start.end() :]
    if "Source" in after.split("\n[")[0]:
        raise ValueError("[project.urls] must not have a Source yet")
    lines = [f'{name} = "{place.format(url=url, tag=tag)}"\n' for name, place in URLS.items()]
    return before + "".join(lines) + after


def check_version(pyproject_root: Path, tag: str) -> None:
    """The tag is the version that is being released.

    Raises:
        ValueError: it is another one.
    """
    text = (pyproject_root / "zofo_optim" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.M)
    if tag != f"v{version}":
        raise ValueError(f"the tag must be v{version}, the version in zofo_optim, got {tag!r}")


def main(url: str, tag: str, root: Path = ROOT) -> None:
    """Change both files in place."""
    check_version(root, tag)
    url = url.rstrip("/")
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = root / name
        path.write_text(change(path.read_text(encoding="utf-8"), url, tag), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
