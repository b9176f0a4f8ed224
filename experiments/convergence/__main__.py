"""Whether the algorithm does what its theorem says, and whether the theorem is right.

    python -m experiments.convergence --out runs/convergence
    python -m experiments.convergence bound faults      some parts
    python -m experiments.convergence report            tables and figures of what is there

bound      Runs with the theorem's step sizes, of as many epochs as it asks for: do they keep what
           it promises, and how many epochs were needed?
real       The library's optimizer on the same problem, and simulated runs beside it.
faults     Estimates of the wrong sign or scale, and rates that are too high: these must fail.
exponents  How epochs grow with 1/epsilon and d_x, beside the bound.
failures   How often runs fail, against delta; with a problem where the paper's step sizes fail.
epoch      One epoch's inequality of the proof in docs/theory.md, exactly, on random quadratics; and
           with constants that are off.
sampling   Random orders against draws with replacement.
rates      One learning rate against two.
lemma      Lemma B.5: bias and variance of estimates, of every kind.

The problem has hybrid generalised smoothness and constants in closed form (problems.py). All but
`real`, `epoch` and `lemma` simulate Algorithm 1 in numba, without the library: many seeds, many
epochs. Each part writes OUT/PART.json; the report is OUT/table.md, and figures.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..commands import ended, parts_first, quiet_on_one_thread, run_parts
from ..files import DataError
from ..finetune import versions
from ..options import COUNT, INDEX, OUT, check_ranges, option, parse
from . import checks, epoch, exponents, failures, lemma, report, sampling

PARTS = (*report.TABLES, "report")
ABOUT = "Check the convergence theorem, and the algorithm by it."
RANGES = {
    **dict.fromkeys(("seeds", "real_seeds", "many", "estimates"), COUNT),
    "corrected_seeds": INDEX,
}


@dataclass
class ConvergenceOptions:
    """The command line of `convergence`."""

    do: list[str] = option(
        list(PARTS),
        f"some of {', '.join(PARTS)}; also as first words of the command line",
        choices=PARTS,
        metavar="PART",
    )
    seeds: int = option(10, "simulated runs of each setting")
    real_seeds: int = option(3, "runs of the library's optimizer")
    many: int = option(1000, "runs that failures are counted in, and quadratics")
    corrected_seeds: int = option(1, "those of 8 and 70 million epochs; a minute each")
    estimates: int = option(1000, "of each kind, for the lemma")
    out: Path = option(Path("runs/convergence"), OUT)

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)


class Command:
    """The parts of one command line."""

    def __init__(self, options: ConvergenceOptions, console: Console) -> None:
        self._options, self._console = options, console

    def _write(self, name: str, measure: Callable[[], Any]) -> None:
        self._track(name)
        result = measure()
        self._options.out.mkdir(parents=True, exist_ok=True)
        settings = {key: getattr(self._options, key) for key in RANGES}
        content = {"part": name, "result": result, "settings": settings, "versions": versions()}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        (self._options.out / f"{name}.json").write_text(text, encoding="utf-8")

    def _track(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def bound(self) -> None:
        self._write("bound", lambda: checks.bound(self._options.seeds))

    def real(self) -> None:
        self._write("real", lambda: checks.real(self._options.real_seeds))

    def faults(self) -> None:
        self._write("faults", lambda: checks.faults(self._options.seeds))

    def exponents(self) -> None:
        self._write("exponents", lambda: exponents.exponents(self._options.seeds, self._track))

    def failures(self) -> None:
        given = self._options
        self._write("failures", lambda: failures.failures(given.many, given.corrected_seeds))

    def epoch(self) -> None:
        self._write("epoch", lambda: epoch.power(self._options.many))

    def sampling(self) -> None:
        self._write("sampling", lambda: sampling.sampling(5 * self._options.seeds))

    def rates(self) -> None:
        self._write("rates", lambda: sampling.two_rates(self._options.seeds))

    def lemma(self) -> None:
        self._write("lemma", lambda: lemma.lemma(self._options.estimates, self._track))

    def report(self) -> None:
        """Tables and figures of all that is there."""
        out = self._options.out
        if not out.is_dir():
            raise DataError(f"--out must be a folder with results, got {str(out)!r}, which is none")
        report.render(out)


def main(argv: Sequence[str] | None = None) -> int:
    given = parts_first(argv, PARTS)
    options, parser = parse(ConvergenceOptions, "experiments.convergence", ABOUT, given, epilog="")
    console = Console()
    quiet_on_one_thread()

    def run() -> None:
        run_parts(Command(options, console), PARTS, options.do)

    return ended(parser, console, run, f"Results and tables: {options.out}")


if __name__ == "__main__":
    raise SystemExit(main())
