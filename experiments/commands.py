"""How commands of several parts run and end."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from .files import DataError
from .models import ModelError
from .training import RunError

MAKES_THE_REST = "Interrupted; the same command makes what is not there."
RESUMES = "Interrupted; the same command goes on from the last checkpoint."


def quiet_on_one_thread() -> None:
    """For commands that time what they run, without the Trainer's lines."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def run_parts(
    command: object,
    parts: Sequence[str],
    wanted: Collection[str],
) -> None:
    """Call the command's methods of these names, those that are wanted, in order."""
    for part in parts:
        if part in wanted:
            getattr(command, part)()


def data_folder(given: str | None) -> str:
    """Of the tasks' data: ``--data``, or what ZOFO_DATA names.

    Raises:
        DataError: neither is there.
    """
    data = given or os.environ.get("ZOFO_DATA")
    if not data:
        raise DataError("--data must be given, or ZOFO_DATA be set, got neither")
    return data


def check_runs(out: Path) -> None:
    """
    Raises:
        DataError: a report is asked of a folder that is not there.
    """
    if not out.is_dir():
        raise DataError(f"--out must be a folder with runs, got {str(out)!r}, which is none")


class Deadline:
    """After so many minutes nothing begins; never, where there is no number."""

    def __init__(self, minutes: float | None, console: Console) -> None:
        self._minutes, self._console = minutes, console
        self._began = time.monotonic()

    def is_over(self, next: str) -> bool:
        """Says so, and what would have begun."""
        if self._minutes is None or time.monotonic() - self._began <= 60 * self._minutes:
            return False
        self._console.print(f"{self._minutes:g} minutes are over: {next} and what follows")
        return True


def parts_first(argv: Sequence[str] | None, parts: Collection[str]) -> list[str]:
    """Arguments in which the first ones may name parts, without ``--do``."""
    given = list(sys.argv[1:] if argv is None else argv)
    return ["--do", *given] if given and given[0] in parts else given


class Ending:
    """A block whose errors of data, model and run end the command, and whose Ctrl-C is told.

    Args:
        parser: ends the command with a message.
        console: to print to.
        interrupted: what is said of a Ctrl-C.
    """

    def __init__(
        self, parser: argparse.ArgumentParser, console: Console, interrupted: str = MAKES_THE_REST
    ) -> None:
        self._parser, self._console, self._interrupted = parser, console, interrupted
        self.code = 0
        """130 after a Ctrl-C."""

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, (DataError, ModelError, RunError)):
            self._parser.error(str(error))
        if isinstance(error, KeyboardInterrupt):
            self._console.print(self._interrupted)
            self.code = 130
        return self.code == 130


def run_study(
    command: Callable[[Any, Console], object],
    options: Any,
    parser: argparse.ArgumentParser,
    parts: Sequence[str],
) -> int:
    """Run the parts of a study that are asked for, one thread a process, and say where they are.

    Args:
        command: made of the options and a console; its methods are the parts.
        options: with ``do`` and ``out``.
        parser: that read them.
        parts: all there are, in order.

    Returns:
        The exit status.
    """
    console = Console()
    quiet_on_one_thread()

    def run() -> None:
        run_parts(command(options, console), parts, options.do)

    return ended(parser, console, run, f"Runs and tables: {options.out}")


def ended(
    parser: argparse.ArgumentParser,
    console: Console,
    run: Callable[[], object],
    said: str,
    interrupted: str = MAKES_THE_REST,
) -> int:
    """Run a command to its end, and say a line.

    Args:
        parser, console, interrupted: of :class:`Ending`.
        run: does all of it.
        said: where what it made is, at the end.

    Returns:
        The exit status.
    """
    with Ending(parser, console, interrupted) as ending:
        run()
    if not ending.code:
        console.print(said, highlight=False)
    return ending.code
