"""What a benchmark is, and the registry of all of them."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zofo_kernels import unavailable_reason


class WrongResult(Exception):
    """A variant does not compute what it should: it must not be timed."""


class Unavailable(Exception):
    """The benchmark cannot run here; the message says why."""


@dataclass(frozen=True)
class Comparison:
    """How one variant compares with another, round by round of the interleaved timing.

    The value is ``times`` seconds(top) / seconds(bottom) + ``plus``, shown beside ``shown_at``;
    ``of`` takes the seconds until the call returns, or the peak memory, in place of seconds. A
    comparison of what was not measured is left out.
    """

    name: str
    top: str
    bottom: str
    shown_at: str
    times: float = 1.0
    plus: float = 0.0
    percent: bool = False
    at_least: float | None = None
    at_most: float | None = None
    of: str = "seconds"  # or "host_seconds", "peak_bytes"

    def meets_target(self, value: float) -> bool | None:
        """None where there is no target."""
        if self.at_least is not None:
            return value >= self.at_least
        if self.at_most is not None:
            return value <= self.at_most
        return None


@dataclass
class Case:
    """Several ways to do the same work.

    ``variants`` are timed in turn; each call does the whole work once. ``check`` runs first and
    raises :class:`WrongResult`. ``elements`` and ``bytes`` are what one call of a variant must
    touch (each weight read once and written once); they give rates, and are left out where a
    rate would say little. ``host`` asks also for the time until a call returns. ``peaks`` runs
    after the check and gives the peak memory of the variants, and of whatever they are compared
    with, in bytes; None where it is not known.
    """

    name: str
    sizes: dict[str, Any]
    variants: Mapping[str, Callable[[], object]]
    check: Callable[[], None]
    comparisons: Sequence[Comparison] = ()
    elements: int | None = None
    bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    host: bool = False
    peaks: Callable[[], dict[str, int | None]] | None = None


@dataclass(frozen=True)
class Context:
    """What a benchmark is asked for: where to run, and whether on tiny sizes."""

    device: torch.device
    quick: bool


Cases = Callable[[Context], Iterator[Case]]
Plot = Callable[[dict[str, Any], Path], None]


@dataclass(frozen=True)
class Benchmark:
    """An entry of the registry; ``cases`` makes one case at a time, so that memory is freed.

    With ``counts`` the cases are made a second time, to count what their variants start.
    """

    name: str
    summary: str
    cases: Cases
    plot: Plot
    devices: tuple[str, ...]
    counts: bool


REGISTRY: dict[str, Benchmark] = {}


def benchmark(
    name: str,
    *,
    plot: Plot,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    counts: bool = False,
) -> Callable[[Cases], Cases]:
    """Enter a generator of cases in the registry; its docstring's first line is the summary."""

    def enter(cases: Cases) -> Cases:
        if name in REGISTRY:
            raise ValueError(f"name must be unique, got {name!r} twice")
        summary = (cases.__doc__ or "").strip().splitlines()[0]
        REGISTRY[name] = Benchmark(name, summary, cases, plot, devices, counts)
        return cases

    return enter


def select(pattern: str | None) -> list[Benchmark]:
    """Benchmarks whose name contains ``pattern`` or matches it as a shell pattern.

    Raises:
        ValueError: none does.
    """
    chosen = [
        entry
        for name, entry in REGISTRY.items()
        if pattern is None or pattern in name or fnmatch.fnmatchcase(name, pattern)
    ]
    if not chosen:
        known = ", ".join(REGISTRY)
        raise ValueError(f"--only must match a benchmark ({known}), got {pattern!r}")
    return chosen


def require(package: str) -> Any:
    """The package.

    Raises:
        Unavailable: it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{package} cannot be imported ({error})") from error


def missing_device(kind: str) -> str | None:
    """Why nothing can be measured on devices of this kind; None if it can."""
    backend = {"cuda": "triton"}.get(kind)
    return unavailable_reason(backend) if backend is not None else None
