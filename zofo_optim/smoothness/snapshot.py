"""One measurement along a run: a row of numbers, and each group's rate with its limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..rules import SGD
from .blocks import Block
from .eigenvalues import SHARP
from .forward import NOISY, Along, Displacement, along_directions, displacement
from .forward_only import of_differences
from .lanczos import spectrum_ends
from .limits import first_order_limit, zeroth_order_limit
from .measuring import METHODS, of_products
from .products import HessianProducts
from .report import BlockSmoothness
from .together import NARROW, Together
from .vectors import Parts

__all__ = ["METHODS", "Rate", "Snapshots"]

_NAMES = tuple(field.name for field in fields(BlockSmoothness))


_STALE = 3.0
"""How far noise may grow above NOISY, its share of curvature when a displacement is found."""


class Rate(NamedTuple):
    """Of a group with parameters."""

    group: int
    rate: float
    limit: float | None


class Measured(NamedTuple):
    """Of a mode."""

    block: BlockSmoothness
    lambda_max: float | None = None
    """The largest eigenvalue with its sign, for limits; None: not known."""
    lambda_min: float | None = None


class Snapshots:
    """Measures an optimizer's modes; see :class:`SmoothnessRecorder`, whose arguments they are."""

    def __init__(
        self, optimizer: GroupsAndState, directions: int, products: int, method: str
    ) -> None:
        self._optimizer = optimizer
        self._directions, self._products, self._method = directions, products, method
        self._is_sgd = optimizer._fo.makes(torch.optim.SGD)
        self._vectors: dict[str, Tensor] = {}  # where Lanczos's method ended, on the host, by mode
        self._moved: Displacement | None = None  # along directions, as long as it will do
        self._rounding = 0.0  # of a curvature along a direction
        self._is_narrow = False
        self._again = 0  # backward passes through a graph that is there already
        self.rates: list[Rate] = []
        """Of the last measurement."""

    def take(self, closure: Closure | Sequence[Closure], seed: int) -> dict[str, Any]:
        """All of a row but the step. What is not known, or not finite, is None."""
        optimizer = self._optimizer
        together = Together(closure, of_examples=optimizer.settings.directions == "per_example")
        if optimizer.evaluating:
            raise RuntimeError("SmoothnessRecorder must not be called inside a closure")
        if (processes := optimizer.replicas.size) > 1:
            raise RuntimeError(
                "SmoothnessRecorder must be used in one process, as it runs closures in one alone, "
                f"got {processes} that train together; measure a checkpoint"
            )
        found: dict[str, Measured | None] = {}
        loss, along, self._again = math.nan, None, 0
        with optimizer.buffers.as_before():
            for block in self._blocks():
                forward = block.name == "zo" and self._method == "forward"
                narrow = self._narrow(together)
                if forward or (block.name == "zo" and self._has_zo_limit() and not narrow):
                    along = self._along(together, seed)
                try:
                    if forward and along is not None:
                        measured = self._by_losses(block, along, self._narrow(together))
                        loss = float(along.loss.mean())
                    else:
                        measured, loss = self._by_gradients(block, together, seed)
                    found[block.name] = measured
                except FloatingPointError:  # a run that has diverged goes on being recorded
                    found[block.name] = None
                    self._vectors.pop(block.name, None)
        if self._narrow(together):
            along = None  # second differences of such losses are rounding
        self.rates = list(self._limits(found, along))
        row: dict[str, Any] = {"loss": loss}
        row.update(evaluations=together.evaluations, gradients=together.gradients + self._again)
        for mode, known in found.items():
            row.update({f"{name}_{mode}": v for name, v in self._values(mode, known).items()})
        return {name: _finite(value) for name, value in row.items()}

    def _along(self, together: Together, seed: int) -> Along:
        """At a displacement found by the first measurement, and again when it will not do."""
        optimizer, number = self._optimizer, self._directions
        if self._narrow(together):  # there are slopes alone
            return along_directions(optimizer, together, directions=number, seed=seed)
        moved = self._moved
        if moved is None or moved.mu < max(group.mu for group in optimizer.zo_groups()):
            moved = displacement(optimizer, together, seed)
        along = along_directions(optimizer, together, directions=number, seed=seed, mu=moved.mu)
        curvatures = along.curvatures.reshape(number, -1).mean(1)
        size = curvatures.square().mean().sqrt().item()
        self._rounding = moved.curvature_noise
        self._moved = moved if self._rounding <= _STALE * NOISY * size < math.inf else None
        return along

    def _values(self, mode: str, measured: Measured | None) -> dict[str, Any]:
        """Of a mode, by name."""
        groups = self._optimizer.param_groups
        rates = [r for r in self.rates if groups[r.group]["mode"] == mode]
        limits = [r.limit for r in rates if r.limit is not None]
        values: dict[str, Any] = dict.fromkeys((*_NAMES, "smoothness", "lambda_max", "lambda_min"))
        if measured is not None:
            values.update(asdict(measured.block), smoothness=measured.block.smoothness)
            values.update(lambda_max=measured.lambda_max, lambda_min=measured.lambda_min)
        del values["parameters"]
        return {
            **values,
            "lr": max(r.rate for r in rates),
            "stable_lr": min(limits, default=None),
        }

    def _blocks(self) -> Iterator[Block]:
        for mode in ("zo", "fo"):
            groups = [g for g in self._optimizer.param_groups if g["mode"] == mode]
            every = dict.fromkeys(p for group in groups for p in group["params"])
            if every:
                yield Block(mode, {f"{mode} {number}": p for number, p in enumerate(every)})

    def _by_losses(self, block: Block, along: Along, narrow: bool) -> Measured:
        """The zeroth-order block without gradients."""
        slopes, curvatures = (
            values if values.dim() == 1 else values.mean(1)
            for values in (along.slopes, along.curvatures)
        )
        found = of_differences(block, slopes, curvatures)
        settings = self._optimizer.settings
        if settings.distribution != "gaussian" or settings.structure != "full":
            # the variance of v' H v is another than 2 ||H||_F^2
            found = replace(found, frobenius=math.nan, frobenius_error=math.nan)
        if narrow:
            nan = math.nan
            found = replace(found, frobenius=nan, frobenius_error=nan, trace=nan, trace_error=nan)
        return Measured(found)

    def _by_gradients(self, block: Block, together: Together, seed: int) -> tuple[Measured, float]:
        """And the loss. Lanczos's method goes on from the last measurement's vector."""
        parts = Parts(block.parameters)
        start = self._vectors.get(block.name)
        if start is None or not parts.fit(start):
            start = parts.random(seed)
        count = len(together.closures)  # products are of the mean over closures; all is linear in f
        with HessianProducts(
            block.tensors,
            together.closures,
            method=self._method_of(together),
            buffers=self._optimizer.buffers,
            others=[p for group in self._optimizer.param_groups for p in group["params"]],
        ) as products:

            def product(v: Tensor) -> Tensor:
                self._again += 0 if products.differs else count
                return parts.flat(products(parts.split(v), step=SHARP * products.step))

            found = of_products(block.name, products, self._directions, False, seed, lambda: None)
            self._again += 0 if products.differs else count * self._directions
            ends = spectrum_ends(product, parts.placed(start), self._products)
        self._vectors[block.name] = ends.vector.cpu()
        found = replace(found, largest=ends.extreme)
        scaled = {
            name: value if name == "parameters" else count * value
            for name, value in asdict(found).items()
        }
        measured = Measured(BlockSmoothness(**scaled), count * ends.largest, count * ends.smallest)
        return measured, count * products.loss

    def _method_of(self, together: Together) -> str:
        """How gradients are taken; in 16 bits they have no differences."""
        if self._method != "forward":
            return self._method
        return "exact" if self._narrow(together) else "finite_difference"

    def _narrow(self, together: Together) -> bool:
        """Whether losses are computed in 16 bits, of all that is known by now."""
        every = (p for group in self._optimizer.param_groups for p in group["params"])
        self._is_narrow |= together.narrow or any(p.dtype in NARROW for p in every)
        return self._is_narrow

    # ---- limits ---------------------------------------------------------------------------------

    def _has_zo_limit(self) -> bool:
        """Whether steps are what :func:`zeroth_order_limit` speaks of."""
        settings = self._optimizer.settings
        groups = self._optimizer.zo_groups()
        one_mu = len({group.mu for group in groups}) == 1
        ascends = any(group.options["maximize"] for group in groups)
        plain = isinstance(settings.rule, SGD) and settings.activity is None
        return one_mu and plain and not ascends

    def _limits(self, found: dict[str, Measured | None], along: Along | None) -> Iterator[Rate]:
        settings, of_zo = self._optimizer.settings, None
        base = found.get("zo")
        if along is not None and base is not None and self._has_zo_limit():
            of_zo = zeroth_order_limit(
                along.slopes,
                along.curvatures,
                _finite(base.block.frobenius if base.lambda_max is None else base.lambda_max),
                together=settings.examples_of_a_direction,
                samples=settings.num_samples,
                rounding=self._rounding,
            )
        coupling = settings.coupling if "zo" in found else 0.0
        for place, group in enumerate(self._optimizer.param_groups):
            measured = found.get(group["mode"])
            limit = of_zo if group["mode"] == "zo" else None
            if (
                group["mode"] == "fo"
                and self._is_sgd
                and measured
                and measured.lambda_max is not None
            ):
                limit = first_order_limit(group, measured.lambda_max, coupling=coupling)
            if group["params"]:
                yield Rate(place, float(group["lr"]), limit)


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None
