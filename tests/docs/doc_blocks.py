"""Code in Markdown files and docstrings, by section, with the places where it stands."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line of code."""

    language: str
    code: str
    line: int


@dataclass
class Section:
    """What stands under a second-level heading, or before the first one."""

    file: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.file}: {self.title}" if self.title else self.file


def pages() -> list[Path]:
    """The Markdown files whose code is run: README.md and docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def prose() -> list[Path]:
    """All Markdown files for people: those of ``pages``, and the ones beside other code."""
    others = (ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))
    beside = (path for top in ("examples", "experiments") for path in (ROOT / top).rglob("*.md"))
    return [*pages(), *(path for path in others if path.exists()), *sorted(beside)]


def sections(path: Path) -> list[Section]:
    """The sections of a Markdown file, in order, those without code too."""
    text = path.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    inside = [range(*fence.span()) for fence in fences]
    file = path.relative_to(ROOT).as_posix()
    starts = [
        (heading.start(), heading[1])
        for heading in re.finditer(r"^## (.+)$", text, re.M)
        if not any(heading.start() in fence for fence in inside)
    ]
    found = [(0, Section(file, "")), *((at, Section(file, title)) for at, title in starts)]
    for fence in fences:
        at, _ = fence.span()
        section = [section for start, section in found if start <= at][-1]
        code = inspect.cleandoc("\n" + fence["code"]) + "\n" if fence["indent"] else fence["code"]
        section.blocks.append(Block(fence["language"], code, text.count("\n", 0, at) + 2))
    return [section for _, section in found]


def commands(code: str) -> list[str]:
    """The lines of a shell block, joined where they go on, without comments."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    plain = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [line for line in plain if line]


def modules_with_examples() -> list[str]:
    """Public modules whose docstrings have ``>>>`` examples."""
    files = [*(ROOT / "zofo_optim").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = [path for path in files if ">>> " in path.read_text(encoding="utf-8")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in sorted(found)]
    return [name.removeprefix("kernels/").replace("/", ".") for name in names]


def docstring_examples(module: ModuleType) -> Iterator[tuple[str, str, int]]:
    """Name, code and line of a module's ``>>>`` examples."""
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        if test.examples:
            code = "".join(example.source for example in test.examples)
            yield test.name, code, (test.lineno or 0) + test.examples[0].lineno + 1
