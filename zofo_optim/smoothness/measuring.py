"""Measuring the Hessian's norm, trace and largest eigenvalue without ever having it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import caller_level
from ..evaluation import Closure
from .blocks import blocks_of
from .eigenvalues import NotConverged, check_scipy, largest_eigenvalue
from .forward_only import measure_forward
from .products import HessianProducts, check_step
from .report import BlockSmoothness, Smoothness
from .sampled import bar, drawn, mean_and_error
from .vectors import dot, norm

_SHORTER = 0.25
_ALIKE = 1.25
"""A ratio of norms of products at lengths so different, from which on a warning tells."""
METHODS = ("finite_difference", "exact", "forward")


def measure_smoothness(
    target: Any,
    closure: Closure | Sequence[Closure],
    *,
    by: str = "mode",
    directions: int = 100,
    method: str = "finite_difference",
    step: float | None = None,
    largest: bool = True,
    model: nn.Module | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Smoothness:
    """The local smoothness of the loss in the base model and in the adapter, or in any parameters.

    For each block of parameters, with H the block of the Hessian on the diagonal (d x d), g the
    gradient, and v uniform on the sphere of radius sqrt(d) (Ma, Yu, Huang 2026, App. D.4 and
    Figure 1; for unit vectors as there, E ||H v||^2 = ||H||_F^2 / d):

    - ||H||_F^2 = E ||H v||^2, unbiased; its root is reported;
    - tr H = E v' H v (Hutchinson 1990);
    - the eigenvalue of largest magnitude, by Lanczos' method on the same products
      (``scipy.sparse.linalg.eigsh``, to 1 % of exact products): the Lipschitz constant of the
      gradient there, which the paper calls L_x and L_y.

    Products H v come from differences of gradients or from double backward, see
    :class:`HessianProducts`. With ``method="forward"`` there is no backward at all: second
    differences of the loss give v' H v for Gaussian v, whose mean is tr H and whose variance is
    2 ||H||_F^2. That takes many more directions for the same precision of ||H||_F, gives no
    eigenvalue, and rounding of a float32 loss sets a limit (a warning says where).

    Cost, for each block and closure: 2 + ``directions`` gradients, and some 10 to 40 more for the
    eigenvalue; "exact": one forward pass, and as many backward passes through a graph of twice the
    size; "forward": 1 + 2 ``directions`` forward passes, and some 10 to 25 that verify. Lanczos'
    method keeps 12 float32 vectors of d elements in host memory.

    It is a measurement at one point, of the loss on the batches given. Where closures draw random
    numbers (dropout), all evaluations draw the same ones. Weights, gradients, ``requires_grad``,
    buffers, optimizer and global generators are afterwards as before, to the bit, also if a closure
    raises. Of several processes, each measures its own.

    Args:
        target: a :class:`HybridZOFO` or other optimizer, parameter groups as optimizers take them,
            a module, or a mapping of names to tensors (or to lists or mappings of them), whose
            items are the blocks.
        closure: returns the loss, without arguments, or calls ``backward`` itself; or a sequence of
            these, such as one a batch: the loss is their mean.
        by: what a block is. "mode": "zo" and "fo", the zeroth-order and the first-order parameters,
            of a module those that require no gradient and those that do. "group": each group.
            "layer": a mode's parameters of one layer, by the numbers in their names. "tensor".
        directions: random vectors, at least 2.
        method: "finite_difference", "exact" or "forward".
        step: length of the displacement t v; None: 1e-4 of the norm of the block's parameters,
            whose root mean square counts as 0.01 at least ("forward": 1e-2 of it). Along
            eigenvectors it is a tenth.
        largest: whether to look for the eigenvalue; needs scipy. Where products are mostly
            rounding, or the loss has kinks (ReLU), a warning says that it was not found.
        model: whose buffers, such as batch norm's statistics, are put back, where ``target`` knows
            no model: a torch optimizer, plain groups, a mapping.
        seed: of the directions.
        progress: whether to show a bar; needs tqdm.

    Returns:
        :class:`Smoothness`, a mapping of the blocks' names to :class:`BlockSmoothness`.

    Raises:
        TypeError: ``target`` is of another kind, or holds sharded, quantised or integer weights;
            weights of 16 bits, or closures under autocast, where ``method="finite_difference"``; a
            closure's result is no loss with a graph.
        ValueError: an argument is out of range.
        FloatingPointError: a gradient or loss is not finite.
        ImportError: scipy or tqdm is missing.

    Example:
        >>> found = measure_smoothness(optimizer, lambda: model(**batch).loss)
        >>> print(found)
        >>> found["zo"].largest, found["fo"].effective_dimension
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    for name, value, least in (("directions", directions, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    check_step(step)
    closures = [closure] if callable(closure) else closure
    if not isinstance(closures, Sequence) or not closures or not all(map(callable, closures)):
        raise TypeError(
            "closure must be a function that returns the loss, such as "
            f"lambda: model(**batch).loss, or a sequence of them, got {closure!r:.80}"
        )
    blocks, buffers = blocks_of(target, by, model)
    every = list({id(p): p for block in blocks for p in block.parameters}.values())
    if method == "forward":
        return measure_forward(blocks, closures, buffers, directions, step, seed, progress)
    if largest:
        check_scipy()
    found, evaluations, loss = {}, 0, math.nan
    unreached: list[str] = []
    with bar(progress, len(blocks) * directions) as advance:
        for block in blocks:
            with HessianProducts(
                block.tensors,
                closures,
                method=method,
                step=step,
                buffers=buffers,
                others=every,
                may_miss=len(blocks) > 1,
            ) as products:
                unreached += [] if products.reached else [block.name]
                found[block.name] = of_products(
                    block.name, products, directions, largest, seed, advance
                )
                loss, evaluations = products.loss, evaluations + products.evaluations
    if unreached and len(unreached) < len(found):
        warnings.warn(
            f"the loss does not reach {', '.join(map(repr, unreached))}, which counts as flat",
            stacklevel=caller_level(),
        )
    elif unreached:
        raise TypeError(
            "closure must return the loss as a tensor with a graph to the parameters of a block, "
            f"got one without, of {', '.join(map(repr, found))}"
        )
    return Smoothness(loss, method, directions, evaluations, found)


def of_products(
    name: str,
    products: HessianProducts,
    directions: int,
    largest: bool,
    seed: int,
    advance: Callable[[], Any],
) -> BlockSmoothness:
    generator = torch.Generator().manual_seed(seed)
    size = sum(p.numel() for p in products.parameters)
    squares, forms = [], []
    for number in range(directions):
        v = drawn(products.parameters, generator)
        radius = math.sqrt(size) / norm(v)
        for x in v:
            x.mul_(radius)
        hv = products(v)
        squares.append(dot(hv, hv))
        forms.append(dot(v, hv))
        if not math.isfinite(squares[-1]):
            raise FloatingPointError(
                f"closure must give finite gradients around the weights, got others along {name!r}"
            )
        advance()
        if number == 0:
            _check_step(name, products, v, hv)
    square, square_error = mean_and_error(squares)
    trace, trace_error = mean_and_error(forms)
    frobenius = math.sqrt(square)
    return BlockSmoothness(
        parameters=size,
        gradient_norm=norm(products.gradient),
        frobenius=frobenius,
        frobenius_error=square_error / (2 * frobenius) if frobenius else 0.0,
        trace=trace,
        trace_error=trace_error,
        largest=_largest(products, name, seed) if largest else None,
    )


def _check_step(
    name: str, products: HessianProducts, v: Sequence[Tensor], hv: Sequence[Tensor]
) -> None:
    """Warn where a difference of gradients depends on its length: along one vector, by norm."""
    if not products.differs:
        return
    near, far = norm(products(v, step=_SHORTER * products.step)), norm(hv)
    if max(near, far) > _ALIKE * min(near, far):
        warnings.warn(
            f"differences of gradients along {name!r} depend on their length: |H v| is {far:.2g} "
            f"at {products.step:.1g} and {near:.2g} at {_SHORTER * products.step:.1g}. The loss "
            "has kinks (ReLU), or what is measured is rounding: take method='exact', or another "
            "step",
            stacklevel=caller_level(),
        )


def _largest(products: HessianProducts, name: str, seed: int) -> float | None:
    """None, with a warning, where it is not found: the rest was measured."""
    try:
        return largest_eigenvalue(products, seed=seed).value
    except NotConverged as error:
        warnings.warn(f"the largest eigenvalue of {name!r}: {error}", stacklevel=caller_level())
        return None
