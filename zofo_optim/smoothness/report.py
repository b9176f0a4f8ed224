"""What was measured: numbers of a block of the Hessian, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..whole import write_json

FORMAT = "zofo-optim smoothness"
VERSION = 1
_HEAD = (
    "block",
    "parameters",
    "|gradient|",
    "|H| Frobenius",
    "trace H",
    "largest",
    "effective dim.",
    "GD below",
    "ZO below",
)


@dataclass(frozen=True)
class BlockSmoothness:
    """The Hessian's diagonal block of some parameters, at one point.

    Errors are standard errors over the random directions; ``largest`` has none.
    """

    parameters: int
    """How many there are: d."""
    gradient_norm: float
    """||grad f|| with regard to these; estimated where ``method`` is "forward"."""
    frobenius: float
    """||H||_F, the root of an unbiased estimate of its square."""
    frobenius_error: float
    trace: float
    """tr H."""
    trace_error: float
    largest: float | None
    """The eigenvalue of largest magnitude, signed; None where it was not asked for."""

    @property
    def smoothness(self) -> float:
        """The local Lipschitz constant of the gradient, ||H||: |largest|, or its bound ||H||_F."""
        return self.frobenius if self.largest is None else abs(self.largest)

    @property
    def effective_dimension(self) -> float | None:
        """tr H / ||H||, which in place of d decides how slow zeroth order is (Malladi et al. 2023).

        None where ``largest`` is None or 0.
        """
        return self.trace / abs(self.largest) if self.largest else None

    @property
    def stable_lr(self) -> float | None:
        """2 / largest: up to which rate plain gradient descent is stable on this batch.

        None where ``largest`` is None or not above 0: a negative curvature bounds no rate.
        """
        return 2 / self.largest if self.largest is not None and self.largest > 0 else None

    @property
    def stable_lr_zo(self) -> float | None:
        """2 / (tr H + 2 |largest|): likewise for plain steps along one direction, at least.

        Of the mean square; with q directions a step nearly q times that. None where the trace is
        not above two standard errors.
        """
        if not self.trace > 2 * self.trace_error:
            return None
        return 2 / (self.trace + 2 * abs(self.largest or 0.0))

    @property
    def participation_ratio(self) -> float | None:
        """(tr H)^2 / ||H||_F^2: how many equal eigenvalues have these two; None where H is 0."""
        return self.trace**2 / self.frobenius**2 if self.frobenius else None


@dataclass(frozen=True)
class Smoothness(Mapping[str, BlockSmoothness]):
    """What :func:`measure_smoothness` found, by the names of the blocks; printed as a table.

    "GD below" and "ZO below" are :attr:`BlockSmoothness.stable_lr` and ``stable_lr_zo``.
    """

    loss: float
    """The mean over the closures, at the weights."""
    method: str
    directions: int
    evaluations: int
    """Evaluations of a closure; where ``method`` is not "forward", each with a backward."""
    blocks: dict[str, BlockSmoothness] = field(repr=False)

    def __getitem__(self, name: str) -> BlockSmoothness:
        if name not in self.blocks:
            raise KeyError(f"no block {name!r}, there are {', '.join(map(repr, self.blocks))}")
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        lines = [_HEAD, *(_line(name, block) for name, block in self.blocks.items())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
        shown = [
            "  ".join(
                text.rjust(width) if column else text.ljust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, shown))
        end = (
            f"loss {self.loss:.4f}, method {self.method!r}, {self.directions} directions, "
            f"{self.evaluations} evaluations"
        )
        return "\n".join([shown[0], rule, *shown[1:], rule, end])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        write_json(Path(path), {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Smoothness:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it holds something else.
        """
        data = Path(path).read_bytes()
        try:
            content: dict[str, Any] = json.loads(data.decode())
            if content.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            if (version := content.pop("version", None)) != VERSION:
                raise ValueError(f"its version is {version!r}, not {VERSION}")
            blocks = {name: BlockSmoothness(**b) for name, b in content.pop("blocks").items()}
            return cls(blocks=blocks, **content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path must be of a saved Smoothness, got {str(path)!r}: {error}"
            ) from None


def _line(name: str, block: BlockSmoothness) -> tuple[str, ...]:
    dimension = block.effective_dimension
    error = block.trace_error / abs(block.largest) if block.largest else 0.0
    return (
        name,
        f"{block.parameters:,}",
        f"{block.gradient_norm:.3g}",
        _with_error(block.frobenius, block.frobenius_error),
        _with_error(block.trace, block.trace_error),
        "" if block.largest is None else f"{block.largest:.3g}",
        "" if dimension is None else _with_error(dimension, error),
        _rate(block.stable_lr),
        _rate(block.stable_lr_zo),
    )


def _with_error(value: float, error: float) -> str:
    """Both to the error's first digit."""
    if not (0 < error < math.inf) or not 1e-3 <= error < 1e6:
        return f"{value:.3g} ± {error:.1g}"
    place = math.floor(math.log10(error))
    digits = max(0, -place)
    return f"{round(value, -place):,.{digits}f} ± {round(error, -place):,.{digits}f}"


def _rate(limit: float | None) -> str:
    return "" if limit is None else f"{limit:.1e}"
