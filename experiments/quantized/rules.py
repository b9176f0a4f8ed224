"""Ways to keep zeroth-order updates of a quantised weight; all but one displace it exactly.

Each is told of a step's direction and slope. Directions are U V^T / sqrt(r), by example or shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .grids import Grid


@dataclass(frozen=True)
class Way:
    """A way to update, in short.

    Attributes:
        kept: "exact" (a dense sum), "folded" (a sum of low rank), "rounded" (to the grid),
            "scales" (these learn instead) or "library" (side updates as the library has them).
        rank: of a direction.
        redraw: steps between draws of V; 0: it stays.
        cap: of the rank that is kept, where it is folded.
    """

    kept: str = "exact"
    rank: int = 1
    redraw: int = 1
    cap: int = 0
    per_example: bool = False


class Layer:
    """A linear layer of a quantised weight under one way of updating.

    Args:
        module: holds what the weight stands for, and its moves.
        grid: of the weight.
        way: of updating.
        generator: of directions and rounding.
    """

    def __init__(self, module: Any, grid: Grid, way: Way, generator: torch.Generator) -> None:
        self._module, self._grid, self._way, self._generator = module, grid, way, generator
        self._base = module.weight.data.clone()
        self._u = self._v = torch.empty(0)
        self._since_fold = 0

    def draw(self, step: int, examples: int) -> None:
        """Of a step: U (examples or 1, m, r), V (the same or 1, n, r)."""
        way, (m, n) = self._way, self._base.shape
        each = examples if way.per_example else 1
        if way.kept == "scales":
            self._u = self._normal(*self._grid.scales.shape)
            return
        self._u = self._normal(each, m, way.rank)
        if step == 0 or (way.redraw and step % way.redraw == 0):
            drawn_anew = way.redraw == 1
            self._v = self._normal(each if drawn_anew else 1, n, way.rank)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    @contextmanager
    def displaced(self, mu: float) -> Iterator[None]:
        """The layer computes with its weight + mu times the direction."""
        if not self._way.per_example:
            weight = self._module.weight.data
            self._module.weight.data = self._moved(weight, mu)
            try:
                yield
            finally:
                self._module.weight.data = weight
            return

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, each = args[0], self._u.shape[0]
            t = x.reshape(each, -1, x.shape[-1]) @ self._v
            moved = t @ self._u.transpose(1, 2)
            return output + (mu / math.sqrt(self._way.rank)) * moved.view(output.shape)

        handle = self._module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _moved(self, weight: Tensor, mu: float) -> Tensor:
        if self._way.kept == "scales":
            grid = self._grid
            return (grid.integers * (grid.scales + mu * self._unit() * self._u)).flatten(1)
        return weight + (mu / math.sqrt(self._way.rank)) * self._u[0] @ self._v[0].T

    def _unit(self) -> float:
        return 2.0 ** round(math.log2(float(self._grid.scales.square().mean().sqrt())))

    def update(self, slopes: Tensor, rate: float) -> None:
        """Move against the direction.

        Args:
            slopes: of each example, or one.
            rate: of learning.
        """
        way, weight = self._way, self._module.weight.data
        if way.kept == "scales":
            self._grid.scales -= rate * self._unit() * float(slopes.mean()) * self._u
            self._module.weight.data = self._grid.weight()
            return
        size = rate / math.sqrt(way.rank) / len(self._u)
        coefficients = slopes if way.per_example else slopes.mean().view(1)
        left = (coefficients.view(-1, 1, 1) * self._u).sum(0) if len(self._v) == 1 else None
        if left is not None:
            moved = left @ self._v[0].T
        else:
            moved = torch.einsum("b,bmr,bnr->mn", coefficients, self._u, self._v)
        weight -= size * moved
        if way.kept == "rounded":
            self._module.weight.data = self._grid.round(weight, self._generator)
        if way.kept == "folded":
            self._since_fold += len(self._u) * way.rank
            if self._since_fold + way.cap // 2 > way.cap:
                self._fold()

    def _fold(self) -> None:
        """To half the cap, so that there is room for more."""
        weight, half = self._module.weight.data, self._way.cap // 2
        u, s, vt = torch.linalg.svd(weight - self._base, full_matrices=False)
        self._module.weight.data = self._base + (u[:, :half] * s[:half]) @ vt[:half]
        self._since_fold = 0


@contextmanager
def all_displaced(layers: list[Layer], mu: float) -> Iterator[None]:
    """All layers at once."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.displaced(mu))
        yield
