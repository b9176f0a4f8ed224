"""The processes that train one model, of which the first has the journal's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..replicas import Replicas
from .errors import JournalError
from .fingerprint import fingerprints

T = TypeVar("T")
_KINDS = (JournalError, FileExistsError, FileNotFoundError, PermissionError, OSError, ValueError)
"""Of errors that every process raises as the first one does; others become RuntimeError."""


class Ranks:
    """Work with the file is the first process's; what comes of it, results and errors, is all's.

    Args:
        replicas: the processes.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self.several = replicas.size > 1
        self.writes = replicas.rank == 0
        """Whether this process has the file."""

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, or raises there; all processes call this."""
        if not self.several:
            return work()
        result: Any = None
        failed: Exception | None = None
        if self.writes:
            try:
                result = work()
            except Exception as error:
                failed = error
        told = None if failed is None else (_kind(failed), str(failed))
        result, told = self._replicas.all_of((result, told))[0]
        if failed is not None:
            raise failed
        if told is not None:
            kind, message = told
            raise kind(f"{message} (in the first process, which writes the journal)")
        found: T = result
        return found

    def fingerprints(self, groups: Sequence[Sequence[Tensor]]) -> list[list[str]]:
        """Of the parameters of each group, in the first process; all processes call this."""
        return [fingerprints(params, self.writes) for params in groups]


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
