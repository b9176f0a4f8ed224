"""Which learning rates to start with: what theory admits, and what measured curvature suggests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..optimizer import HybridZOFO
from ..smoothness import Smoothness
from ..smoothness.eigenvalues import check_scipy
from ..smoothness.measuring import METHODS
from ..smoothness.products import check_step
from ..theory import Constants, StepSizes, theorem_step_sizes
from . import constants as theorem
from . import first_order, perturbation_size, zeroth_order
from .first_order import FirstOrder
from .measured import (
    Closures,
    apply_rates,
    check_descent,
    check_quiet,
    closures_of,
    gradients_aside,
    relative_rates,
)
from .perturbation_size import PerturbationSize
from .rates import Rates, rates_of
from .zeroth_order import ZerothOrder


@dataclass(frozen=True)
class Suggestion:
    """See :func:`suggest_hyperparameters`."""

    practical: Rates
    """Rates to start with, with reasons and warnings."""
    zeroth_order: ZerothOrder | None
    """What was measured for ``lr_zo``; None without zeroth-order groups."""
    perturbation: PerturbationSize | None
    """What was measured for ``mu``."""
    first_order: FirstOrder | None
    """What was measured for ``lr_fo``; None without first-order groups."""
    evaluations: int
    """Of closures, for the practical rates; without those that verify."""
    theory: StepSizes | None = None
    """What the theorem admits; None where no ``epsilon`` was given."""
    constants: Constants | None = None
    """That it was given: local estimates."""
    smoothness: Smoothness | None = None
    """Which they come from."""
    doubts: tuple[str, ...] = ()
    """What makes the constants other than they should be."""

    def apply(self, optimizer: HybridZOFO) -> None:
        """Set the groups' rates and mu to the practical ones, before a scheduler is made.

        Where several first-order groups have rates, the largest becomes ``lr_fo``, and their ratios
        are kept. What is None is left as it is.

        Raises:
            TypeError: ``optimizer`` is no HybridZOFO.
            RuntimeError: a scheduler was made already.
        """
        rates = self.practical
        apply_rates(optimizer, {"zo": rates.lr_zo, "fo": rates.lr_fo}, rates.mu)

    def __str__(self) -> str:
        lines = [str(self.practical)]
        if self.theory is not None:
            lines += ["", "What the theorem admits, by constants as they are here:"]
            lines += [str(self.constants), str(self.theory)]
            lines += [f"! {doubt}" for doubt in self.doubts]
        return "\n".join(lines)


def suggest_hyperparameters(
    optimizer: HybridZOFO,
    closures: Closures,
    *,
    directions: int = 16,
    epsilon: float | None = None,
    delta: float = 0.1,
    components: int | None = None,
    epochs: int | None = None,
    floor: float = 0.0,
    proof: str = "corrected",
    method: str = "finite_difference",
    seed: int = 0,
    step: float | None = None,
    largest: bool = True,
    progress: bool = False,
) -> Suggestion:
    """Rates of both kinds of groups, and mu, from curvature measured at the weights as they are.

    The practical rates are a calibrated share of lr*, the rate at which one step lowers its batch's
    loss most in expectation. For zeroth-order groups it is E[g.u] / E[u'Hu] over the
    optimizer's own kind of estimates u: its distribution, structure, ``num_samples``, directions of
    examples and ``zo_rule``; by forward passes alone. For first-order groups it is where the loss
    stops falling along the update of ``fo_optimizer`` at unit rate, by gradients. They are to start
    with, by a schedule that decays: docs/learning-rates.md compares them with searched rates.

    With ``epsilon``, also what Theorem C.1 of Ma, Yu, Huang (2026) admits for an average squared
    gradient of epsilon^2; see :func:`zofo_optim.theory.theorem_step_sizes`. Its constants are
    measured here, so they are local estimates, not bounds over the sub-level set. Theory's rates
    are for a guarantee, and far below the practical ones.

    Takes, for zeroth order, (1 + 2 ``directions``) evaluations a batch (twice as many with
    several directions of signs in a step), 50 to 100 for mu and noise, and 10 to 25 that verify in
    each round; for first order some 10 gradients of each batch, at most 4;
    and for theory what :func:`zofo_optim.smoothness.measure_smoothness` takes, once a batch and
    once for all. Memory beside that of a step: a copy of the first-order weights in the host's
    memory, and of their gradients for at most 4 batches, update and state. No weight, gradient,
    buffer, generator and nothing of the optimizer is changed afterwards, also where it raises.

    Args:
        optimizer: as it will train. Its rates do not matter, except for their ratios between
            first-order groups, which are kept: the rate is that of the group with the largest one.
        closures: one, or several, as ``step`` takes them, each of a batch of its own that it keeps:
            it is evaluated many times. 4 are enough; with 1 nothing is known of batches' noise.
        directions: random ones, at least 2, a multiple of ``num_samples``.
        epsilon: of the theorem; None: practical rates alone.
        delta: its probability of failure, in (0, 1).
        components: its n, steps in an epoch; None: as many as closures.
        epochs: its T; None: as many as it needs.
        floor: its f*, a lower bound of the loss.
        proof: "corrected", or "paper" for the printed conditions, which guarantee nothing.
        method: of the theorem's curvatures. "finite_difference" and "exact" need gradients of all
            weights; "forward" does without, and takes Frobenius norms for largest curvatures,
            which are upper bounds of them.
        seed: of the directions.
        step, largest, progress: of ``measure_smoothness``, for the theorem's curvatures.

    Returns:
        :class:`Suggestion`; ``print`` it for the reasoning.

    Raises:
        TypeError: an argument's type; or a loss without a graph, with first-order groups.
        ValueError: an argument out of its range; weights are sharded; zeroth-order groups differ in
            ``mu`` or ``lr``, so that they have no common rate; ``active``, ``maximize`` or the
            antithetic estimator, which are not measured; a loss that a GradScaler scaled;
            ``fo_optimizer`` moves weights at rate 0, as Rprop does.
        ImportError: scipy is missing, with ``epsilon``.
        FloatingPointError: a loss is not finite.
        RuntimeError: called in a closure, between backward and step, or in one of several
            processes; or a closure's loss is another each time.

    Example:
        >>> from itertools import islice
        >>> groups = hybrid_param_groups(model, zo=dict(lr=1e-6), fo=dict(lr=1e-3))
        >>> optimizer = HybridZOFO(groups)
        >>> batches = list(islice(loader, 4))
        >>> found = suggest_hyperparameters(
        ...     optimizer, [lambda batch=batch: model(**batch).loss for batch in batches])
        >>> print(found)
    """
    check_quiet(optimizer, "suggest_hyperparameters")
    some = closures_of(closures)
    check_descent(optimizer, "suggest_hyperparameters")
    _check(optimizer, directions, seed)
    _check_theory(components, epochs, floor, proof, method, step)
    modes = {group["mode"] for group in optimizer.param_groups if group["params"]}
    if epsilon is not None and "zo" not in modes:
        raise ValueError("epsilon needs an optimizer with a group of mode='zo', got none")
    if epsilon is not None and not (0 < epsilon < math.inf and 0 < delta < 1):
        raise ValueError(
            f"epsilon must be above 0 and delta in (0, 1), got {epsilon!r} and {delta!r}"
        )
    if epsilon is not None and method != "forward" and largest:
        check_scipy()
    with gradients_aside(optimizer):
        zo = size = fo = None
        evaluations = 0
        if "zo" in modes:
            zo, along, far = zeroth_order.measure(optimizer, some, directions, seed)
            size = perturbation_size.measure(optimizer, some[0], along, far, seed)
            evaluations += zo.evaluations + size.evaluations
        if "fo" in modes:
            fo = first_order.measure(optimizer, some)
            evaluations += fo.evaluations
        practical = rates_of(zo, size, fo)
        if epsilon is None or zo is None:
            return Suggestion(practical, zo, size, fo, evaluations)
        measured = theorem.measure(
            optimizer,
            some,
            zo,
            components=components,
            floor=floor,
            method=method,
            directions=directions,
            seed=seed,
            step=step,
            largest=largest,
            progress=progress,
        )
        theory = theorem_step_sizes(
            measured.constants, epsilon=epsilon, delta=delta, epochs=epochs, proof=proof
        )
    return Suggestion(
        practical,
        zo,
        size,
        fo,
        evaluations,
        theory,
        measured.constants,
        measured.smoothness,
        measured.doubts,
    )


def _check_theory(
    components: Any, epochs: Any, floor: Any, proof: Any, method: Any, step: Any
) -> None:
    """What only ``epsilon`` has a use for, before anything is measured."""
    for name, value in (("components", components), ("epochs", epochs)):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ValueError(f"{name} must be an int >= 1 or None, got {value!r}")
    if not isinstance(floor, (int, float)) or not math.isfinite(floor):
        raise ValueError(f"floor must be a finite number, got {floor!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    check_step(step)
    any_ones = Constants(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1, 1)
    theorem_step_sizes(any_ones, epsilon=1.0, delta=0.5, proof=proof)


def _check(optimizer: HybridZOFO, directions: Any, seed: Any) -> None:
    for name, value, least in (("directions", directions, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    settings, groups = optimizer.settings, optimizer.zo_groups()
    if not groups:
        return
    samples = settings.num_samples
    if directions % samples or (samples > 1 and directions == samples):
        raise ValueError(
            f"directions must be 2 or more times num_samples={samples}, got {directions}"
        )
    if settings.active is not None:
        raise ValueError(
            f"active must be None for a rate to be measured, got {settings.active!r}: steps that "
            "move different weights have different curvatures"
        )
    if settings.estimator == "antithetic":
        raise ValueError(
            "estimator must be 'two_sided' or 'one_sided' for a rate to be measured, got "
            "'antithetic': take the two-sided one's"
        )
    relative, _ = relative_rates([group.options for group in groups])
    if len({group.mu for group in groups}) > 1 or not all(math.isclose(r, 1.0) for r in relative):
        raise ValueError(
            "optimizer must have one mu and one lr in all zeroth-order groups for a common rate to "
            "be measured; measure one at a time"
        )
