"""Up to which learning rate a step is stable, by the curvature of a batch's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_SURE = 4.0
"""Standard errors of rounding."""


def first_order_limit(
    group: Mapping[str, Any], largest: float, *, coupling: float = 0.0
) -> float | None:
    """Of the learning rate of ``torch.optim.SGD``, along the eigenvector of ``largest``.

    On a quadratic of curvature h, weight decay included, a step is stable up to 2 / h for plain
    SGD, 2 (1 + beta) / ((1 - dampening) h) with momentum beta (Polyak 1964), and
    2 (1 + beta) / ((1 + 2 beta) h) with Nesterov's.

    Args:
        group: options of SGD.
        largest: the largest eigenvalue of the Hessian's block.
        coupling: the optimizer's: the loss is back-propagated 1 + coupling times.

    Returns:
        None where the loss does not curve upwards, or is maximised: no rate is too large then.
    """
    curvature = (1 + coupling) * largest + float(group["weight_decay"])
    if curvature <= 0 or group["maximize"]:
        return None
    beta = float(group["momentum"])
    if group["nesterov"]:
        return 2 * (1 + beta) / ((1 + 2 * beta) * curvature)
    return 2 * (1 + beta) / ((1 - float(group["dampening"]) if beta else 1.0) * curvature)


def zeroth_order_limit(
    slopes: Tensor,
    curvatures: Tensor,
    largest: float | None,
    *,
    together: int,
    samples: int,
    rounding: float = 0.0,
) -> float | None:
    """2 E[grad f . g] / E[g' H g] of the zeroth-order estimate g of a step along N directions.

    Up to this rate a step does not raise the batch's loss in expectation. With slopes s and
    curvatures c along single directions, E[grad f . g] = E[s^2], and E[g' H g] =
    E[s^2 c] / N + (1 - 1/N) grad' H grad, where ``largest`` ||grad f||^2 stands for the last:
    the limit is rather too low. With one Gaussian direction this is
    2 / (tr H + 2 grad' H grad / ||grad f||^2). Weight decay is left out, as it is far below H.

    Args:
        slopes: along directions as steps take them, shape (directions,); or of B examples' losses,
            (directions, B).
        curvatures: likewise.
        largest: the largest eigenvalue of the block of H, or a bound of it; None: unknown, which
            will do for N = 1.
        together: examples that share a direction.
        samples: directions of a step, ``num_samples``; with losses of examples, those of each.
        rounding: standard deviation of a curvature, of whole batches, by rounding of the loss.

    Returns:
        None where the loss does not curve upwards along steps, where all slopes are 0 or not
        finite, or N > 1 and ``largest`` is not known; and where E[g' H g] is not known: it is less
        than its standard error over directions, or than 4 times that of rounding.
    """
    count = samples
    if slopes.dim() == 2:
        count *= slopes.shape[1] // together
        parts = slopes.view(len(slopes), -1, together).mean(2).square().mean(1)
        slopes, curvatures = slopes.mean(1), curvatures.mean(1)
    else:
        parts = slopes.square()
    square = slopes.square().mean().item()
    bent = parts * curvatures
    noise = bent.mean().item()
    if count > 1 and largest is None:
        return None
    along = noise / count + (1 - 1 / count) * max(largest or 0.0, 0.0) * square
    if not (along > 0 and square > 0):
        return None
    off = bent - noise / square * slopes.square()  # of the ratio of both means
    error = max(off.norm().item(), _SURE * rounding * parts.norm().item()) / len(slopes) / count
    return 2 * square / along if along > error else None
