"""Running blocks of code where they stand."""

from __future__ import annotations

import contextlib
import io
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from doc_blocks import Block, Section, commands
from doc_names import MAKERS, add_names

Makers = Mapping[str, Callable[[], Any]]

RUN = ("python -m zofo_optim.journal",)
"""Commands of the pages that are run. All others are checked by test_commands.py, which says why
they are not run."""


def run_python(
    code: str, file: str, line: int, names: dict[str, Any], makers: Makers = MAKERS
) -> str:
    """Execute a block, with what it takes for granted; errors name its place.

    Returns:
        What it printed.
    """
    compiled = compile("\n" * (line - 1) + code, file, "exec")
    add_names(compiled, names, makers)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compiled, names)
    return printed.getvalue()


def run_command(command: str) -> str:
    """Run ``python -m module arguments`` in this process.

    Returns:
        What it printed.
    """
    _, _, module, *arguments = shlex.split(command, comments=True)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        mock.patch.object(sys, "argv", [module, *arguments]),
    ):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = None
        except SystemExit as done:
            status = done.code
    assert not status, f"{command} ended with status {status}: {printed.getvalue()}"
    return printed.getvalue()


def run_block(block: Block, file: str, names: dict[str, Any]) -> str | None:
    """Run a block, and the commands of a shell block that are to be run; None: it is not."""
    if block.language == "python":
        return run_python(block.code, file, block.line, names)
    if block.language == "sh":
        if block.code.startswith("torchrun"):
            return None
        return "".join(run_command(c) for c in commands(block.code) if c.startswith(RUN))
    return ""


def run_section(section: Section, names: dict[str, Any]) -> None:
    """Run a section's blocks in order; a ``text`` block is what the one before it prints."""
    printed: str | None = ""
    for block in section.blocks:
        if block.language == "text" and printed is not None:
            assert printed == block.code, f"{section.file}:{block.line} is not what is printed"
        printed = run_block(block, section.file, names)


def fresh_names(given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"__name__": "page", **(given or {})}
