"""The step sizes of the convergence theorem, as numbers (Ma, Yu, Huang 2026, Theorem C.1).

Pure arithmetic: what the constants are is measured elsewhere. docs/theory.md derives every line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real

Conditions = dict[str, dict[str, float]]
"""By quantity, the conditions on it: the formula, and its value."""

_POSITIVE = ("L_x", "L_y", "L_x_max", "L_y_max", "gap")
_MOST = 2**1000
"""Of a count: beyond it there is no float."""


@dataclass(frozen=True)
class Constants:
    """What the theorem knows of f(x, y) = (1/n) sum_i f(x, y; i), where f - f* <= ``level``.

    x are the zeroth-order weights, y the first-order ones. The units are those of the loss and of
    the weights: L has loss / weight^2, sigma and G have loss / weight, gap has loss.

    A bound of curvature is one of the whole Hessian, as in Definition 2.1: H <= diag(L_x I, L_y I)
    and H >= -diag(L_x I, L_y I). Where x and y do not interact it is the largest magnitude of an
    eigenvalue of each block. Where they do, twice as much is enough if f is convex, and for
    ``L_x_max`` and ``L_y_max`` if every single component is.

    Args:
        L_x: bound of the curvature of f in x, above 0.
        L_y: the same in y.
        L_x_max: bound that holds for every single component f(.; i); at least ``L_x``.
        L_y_max: the same in y; at least ``L_y``.
        sigma: root of the variance bound, (1/n) sum_i |grad f(.; i) - grad f|^2 <= sigma^2
            (Assumption 3.3); at least 0.
        G: bound of the norm of the gradient of f; at least 0.
        gap: f at the start less its infimum f*, above 0.
        d_x: number of zeroth-order weights, at least 1.
        n: components, which is steps in an epoch, at least 1.

    Raises:
        TypeError: a value is no real number, or ``d_x`` or ``n`` no integer.
        ValueError: a value is out of its range.
    """

    L_x: float
    L_y: float
    L_x_max: float
    L_y_max: float
    sigma: float
    G: float
    gap: float
    d_x: int
    n: int

    def __post_init__(self) -> None:
        for one in fields(self):
            name, value = one.name, getattr(self, one.name)
            count = name in ("d_x", "n")
            plain = _count(name, value) if count else _number(name, value, name in _POSITIVE)
            object.__setattr__(self, name, plain)  # NumPy's numbers do not raise on overflow
        for name in ("L_x", "L_y"):
            whole, single = getattr(self, name), getattr(self, name + "_max")
            if single < whole:
                raise ValueError(f"{name}_max must be at least {name} = {whole}, got {single}")


@dataclass(frozen=True)
class StepSizes:
    """Step sizes that the theorem admits, the largest ones, and what limits each of them."""

    lr_zo: float
    """Learning rate of x."""
    lr_fo: float
    """Learning rate of y."""
    mu: float
    """Perturbation step size."""
    epochs: int
    """T: those given, or else the fewest that fulfil their own condition."""
    level: float
    """The constants must hold where f - f* is at most this."""
    binding: Mapping[str, str]
    """For "lr_zo", "lr_fo", "mu" and "epochs", the condition that binds."""
    conditions: Mapping[str, Mapping[str, float]]
    """All conditions: upper bounds of the step sizes, lower bounds of ``epochs``, by formula."""
    proof: str
    """Whose conditions they are, "corrected" or "paper"."""

    @property
    def enough(self) -> bool:
        """Whether ``epochs`` fulfil their own condition."""
        return self.epochs >= self.conditions["epochs"][self.binding["epochs"]]

    @property
    def guaranteed(self) -> bool:
        """Whether a proof that holds promises what was asked for; never with ``proof="paper"``."""
        return self.proof == "corrected" and self.enough

    def __str__(self) -> str:
        width = max(len(name) for some in self.conditions.values() for name in some)
        lines = []
        for quantity, some in self.conditions.items():
            value = getattr(self, quantity)
            shown = f"{value:,}" if quantity == "epochs" else f"{value:.3e}"
            lines.append(f"{quantity} = {shown}")
            sign = ">=" if quantity == "epochs" else "<="
            for name, bound in some.items():
                mark = "  binds" if name == self.binding[quantity] else ""
                lines.append(f"  {sign} {name:{width}} {bound:.3e}{mark}")
        lines.append(f"constants hold where f - f* <= {self.level:.3e}")
        if not self.enough:
            lines.append("nothing is promised: too few epochs")
        if self.proof == "paper":
            lines.append("nothing is promised: the printed proof leaves out the data's noise")
        return "\n".join(lines)


def theorem_step_sizes(
    constants: Constants,
    *,
    epsilon: float,
    delta: float,
    epochs: int | None = None,
    proof: str = "corrected",
) -> StepSizes:
    """Largest step sizes for an average squared gradient of at most epsilon^2.

    That is (1/T) sum_t |grad f(x_t, y_t)|^2 over the starts of T epochs, with random reshuffling
    and a Gaussian or ±1 direction a step, with probability at least 1 - delta.

    Args:
        constants: see :class:`Constants`.
        epsilon: above 0, in the units of ``constants.G``.
        delta: probability of failure, in (0, 1).
        epochs: T. None: the fewest that are enough with the rates that belong to them. Given
            fewer than that, the rates are those of the formulas, and ``guaranteed`` is False.
        proof: "corrected" has the conditions of the proof in docs/theory.md, for full directions;
            they are in consistent units. "paper" has those that Theorem C.1 prints, with the one
            on ``mu`` derived anew. Its proof leaves out the data's noise, and there are problems
            where they fail: ``guaranteed`` is False.

    Raises:
        TypeError: an argument is no real number, or ``epochs`` no integer.
        ValueError: an argument is out of its range, or so extreme that step sizes, epochs or
            ``level`` are beyond floats.

    Example:
        >>> constants = Constants(
        ...     L_x=10, L_y=1, L_x_max=20, L_y_max=2, sigma=1, G=2, gap=0.5, d_x=1000, n=100)
        >>> sizes = theorem_step_sizes(constants, epsilon=0.1, delta=0.1)
        >>> print(sizes.lr_zo, sizes.binding["lr_zo"])
    """
    if not isinstance(constants, Constants):
        raise TypeError(f"constants must be a Constants, got {type(constants).__name__}")
    epsilon = _number("epsilon", epsilon, positive=True)
    delta = _number("delta", delta, positive=True)
    if delta >= 1:
        raise ValueError(f"delta must be below 1, got {delta}")
    if epochs is not None:
        epochs = _count("epochs", epochs)
    if proof not in _PROOFS:
        raise ValueError(f"proof must be one of {', '.join(map(repr, _PROOFS))}, got {proof!r}")
    try:
        return _step_sizes(constants, epsilon, delta, epochs, proof)
    except (OverflowError, ZeroDivisionError):
        given = {**vars(constants), "epsilon": epsilon, "delta": delta, "epochs": epochs or 1}
        raise ValueError(_too_extreme(given)) from None


def _step_sizes(
    constants: Constants, epsilon: float, delta: float, epochs: int | None, proof: str
) -> StepSizes:
    of_epochs, level_of = _PROOFS[proof]

    def conditions(count: int) -> Conditions:
        return of_epochs(constants, epsilon, delta, count)

    if epochs is None:
        epochs = _fewest(lambda count: count >= max(conditions(count)["epochs"].values()))
    found = conditions(epochs)
    limits = {name: max if name == "epochs" else min for name in found}
    binding = {name: limits[name](some, key=some.__getitem__) for name, some in found.items()}
    values = {name: found[name][binding[name]] for name in ("lr_zo", "lr_fo", "mu")}
    level = level_of(constants, delta, values["lr_zo"], values["lr_fo"])
    needed = found["epochs"][binding["epochs"]]
    if not all(0 < value < math.inf for value in (*values.values(), needed, level)):
        raise OverflowError
    return StepSizes(
        **values, epochs=epochs, level=level, binding=binding, conditions=found, proof=proof
    )


def _too_extreme(given: Mapping[str, float]) -> str:
    """Of the argument that is farthest from 1, by its logarithm."""
    name = max(given, key=lambda one: abs(math.log(given[one])) if given[one] else 0.0)
    rule = "larger" if given[name] < 1 else "smaller"
    return f"{name} must be {rule} for step sizes and epochs to be floats, got {given[name]:.3g}"


def _paper(c: Constants, epsilon: float, delta: float, count: int) -> Conditions:
    """Eq. (3) and the line on T; the two on mu are from E1 and E2 of Lemma B.6's proof."""
    T, x, y = float(count), c.L_x_max * c.n, c.L_y_max * c.n
    lr_zo = {
        "1/(2 L_x_max n)": 1 / (2 * x),
        "1/(384 L_x n d_x)": 1 / (384 * c.L_x * c.n * c.d_x),
        "sqrt(2/T)/(sigma n L_x_max)": _over(math.sqrt(2 / T), c.sigma * x),
        "sqrt(1/T)/(sqrt(2) L_x_max n)": 1 / (math.sqrt(2 * T) * x),
    }
    lr_fo = {
        "1/(2 L_y_max n)": 1 / (2 * y),
        "sqrt(2/T)/(sigma n L_y_max)": _over(math.sqrt(2 / T), c.sigma * y),
        "sqrt(1/T)/(sqrt(2) L_y_max n)": 1 / (math.sqrt(2 * T) * y),
    }
    mu = {
        "1/(n T L_x_max G (d_x + 3)^(3/2))": _over(1 / T, x * c.G * (c.d_x + 3) ** 1.5),
        "4/(3 L_x_max d_x^(3/2) sqrt(n T))": 4 / (3 * c.L_x_max * c.d_x**1.5 * math.sqrt(c.n * T)),
    }
    zo, fo = min(lr_zo.values()), min(lr_fo.values())
    first, rest = 2 / delta + c.G**2 / 8, (c.gap + 2 * zo + fo) / c.n
    text = "(2/delta + G^2/8 + (gap + 2 lr_zo + lr_fo)/(n {}))/epsilon^2"
    T_line = {
        text.format("lr_zo/4"): (first + rest / (zo / 4)) / epsilon**2,
        text.format("lr_fo/3"): (first + rest / (fo / 3)) / epsilon**2,
    }
    return {"lr_zo": lr_zo, "lr_fo": lr_fo, "mu": mu, "epochs": T_line}


def _corrected(c: Constants, epsilon: float, delta: float, count: int) -> Conditions:
    """The theorem of docs/theory.md."""
    T, x, y, d = float(count), c.L_x_max * c.n, c.L_y_max * c.n, c.d_x
    noise = c.sigma**2 * T
    lr_zo = {
        "1/(72 L_x_max n (d_x + 2))": 1 / (72 * x * (d + 2)),
        "sqrt(gap/(72 L_x_max n (d_x + 2) sigma^2 T))": math.sqrt(
            _over(c.gap, 72 * x * (d + 2) * noise)
        ),
    }
    lr_fo = {
        "1/(2 L_y_max n)": 1 / (2 * y),
        "sqrt(4 gap/(5 L_y_max n sigma^2 T))": math.sqrt(_over(4 * c.gap, 5 * y * noise)),
    }
    zo, fo = min(lr_zo.values()), min(lr_fo.values())
    visits = c.n + (d + 4) / 2
    mu = {
        "gap/(4 T lr_zo n G L_x_max d_x)": _over(c.gap, 4 * T * zo * x * c.G * d),
        "(2/L_x_max) sqrt(gap/(T lr_zo d_x (n + (d_x + 4)/2)))": (
            2 / c.L_x_max * math.sqrt(c.gap / (T * zo * d * visits))
        ),
    }
    text = "16 gap/(delta epsilon^2 n {})"
    needed = 16 * c.gap / (delta * epsilon**2 * c.n)
    T_line = {text.format("lr_zo"): needed / zo, text.format("lr_fo"): needed / fo}
    return {"lr_zo": lr_zo, "lr_fo": lr_fo, "mu": mu, "epochs": T_line}


_PROOFS: dict[
    str,
    tuple[
        Callable[[Constants, float, float, int], Conditions],
        Callable[[Constants, float, float, float], float],
    ],
] = {
    "corrected": (_corrected, lambda c, delta, zo, fo: 4 * c.gap / delta),
    "paper": (_paper, lambda c, delta, zo, fo: 8 * (c.gap + 2 * zo + fo) / delta),
}


def _fewest(enough: Callable[[int], bool]) -> int:
    """The smallest count that is enough; more than enough is enough.

    The condition on T grows like its square root, so that there is one.
    """
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST:
            raise OverflowError
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _over(value: float, divisor: float) -> float:
    """The quotient, infinite where a condition is empty: sigma = 0 or G = 0."""
    return value / divisor if divisor else math.inf


def _number(name: str, value: object, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    rule = "above 0" if positive else "at least 0"
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite and {rule}, got more than a float holds") from None
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be finite and {rule}, got {value}")
    return number


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    count = int(value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if count > _MOST:
        raise ValueError(f"{name} must be at most 2^1000, got an int of {count.bit_length()} bits")
    return count
