"""What HybridZOFO must do, restated in float64: points of evaluation, coefficients, updates.

Knows the noise (from the reference backend) and nothing else of the library. For every element of
the zeroth-order weights it holds a value and a bound on how far rounding may take the real weight
from it. Losses are those that the real closure returned, and the weights that this closure saw
are compared with the points named here: coefficients are then exact to the arithmetic on a few
numbers, however badly a difference of losses is conditioned.
"""

import copy
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from rule_references import reference, state_of

from zofo_kernels import Direction, noise
from zofo_optim import Draw
from zofo_optim.active import active_of

NOISE_ERROR = 5e-6
"""Of Gaussian noise on any backend but the reference; see test_noise."""
EXACT = {torch.float64: torch.float64}  # the arithmetic of other dtypes is float32
NARROW = (torch.bfloat16, torch.float16)


def ulp(x, dtype):
    """Spacing of ``dtype`` at |x|, away from zero; x in float64."""
    info = torch.finfo(dtype)
    size = x.abs().clamp_min(info.smallest_normal)
    return info.eps * torch.exp2(torch.frexp(size).exponent.double() - 1)


def room(x, dtype):
    """How near to x a number must be to round to it: half the spacing on its narrower side."""
    power_of_two = torch.frexp(x).mantissa.abs() == 0.5
    return ulp(x, dtype) * torch.where(power_of_two, 0.25, 0.5)


@lru_cache(4096)
def direction_values(shape, direction, index):
    return noise(shape, direction, index=index, backend="reference").double()


class Point(NamedTuple):
    """One evaluation, at w + sign mu z of this sample; sign 0 is the clean one."""

    sample: int
    sign: int
    verifies: bool = False
    weight: float = 0.0  # of its gradients


@dataclass
class Weight:
    """One zeroth-order parameter: |real - value| <= error for each element, when at rest."""

    value: torch.Tensor
    error: torch.Tensor
    dtype: torch.dtype
    size: int  # bytes

    @property
    def compute(self):
        return EXACT.get(self.dtype, torch.float32)

    @property
    def unit(self):
        """Half an ulp of 1 in the arithmetic; one more bit where ours is no better."""
        return torch.finfo(self.compute).eps / (1 if self.compute == torch.float64 else 2)

    def half_ulp(self, x):
        """One rounding of x to the dtype; narrow ones by way of the arithmetic."""
        spacing = ulp(x, self.dtype) / (1 if self.dtype == torch.float64 else 2)
        return spacing + (self.unit * x.abs() if self.dtype in NARROW else 0)

    def move(self, z, scale, noise_error, in_place, finest):
        """There, and in place back again: displaced value and its error.

        Narrow weights spaced wider than ``finest`` times the scale may end on either neighbour.

        The same scale z is added and taken off, so that its own error cancels: a round trip costs
        one rounding at w + scale z and one at w. It costs nothing where the first rounding is
        smaller than what the second one repairs.
        """
        step = torch.tensor(scale, dtype=self.compute).double() * z
        there = self.value + step
        blur = noise_error * abs(scale) + 2.0**-50 * (self.value.abs() + step.abs())
        if noise_error or (z.abs() != 1).any():
            blur = blur + 2 * self.unit * step.abs()
        first = self.half_ulp(there.abs() + self.error + blur)
        coarse = torch.zeros_like(there, dtype=torch.bool)
        if self.dtype in NARROW:
            reach = self.value.abs() + step.abs() + self.error + blur  # there or back
            reach = reach + self.half_ulp(reach)  # it may round up to a power of two
            coarse = ulp(reach, self.dtype) > finest * abs(scale)
        first = torch.where(coarse, 2 * first, first)
        seen = self.error + first + blur
        if in_place:
            second = self.half_ulp(self.value.abs() + self.error + first)
            second = torch.where(coarse, 2 * second, second)
            lost = (there.to(self.dtype).double() - there).abs() + 4 * blur
            if self.dtype in NARROW:
                lost = lost + 2 * self.unit * (self.value.abs() + step.abs())
            returns = (self.error == 0) & (lost < room(self.value, self.dtype)) & ~coarse
            if self.dtype == torch.float64:  # ours cannot tell
                returns = torch.zeros_like(returns)
            self.error = torch.where(returns, self.error, self.error + first + second)
        return there, seen

    def update(self, zs, coefficients, errors, lr, decay, noise_error, stochastic):
        """w - lr (sum c z + decay w); ``errors`` are those of the coefficients."""
        if lr == 0:
            return
        delta, size, blur = lr * decay * self.value, 0.0, 0.0
        for z, c, error in zip(zs, coefficients, errors, strict=True):
            delta = delta + lr * c * z
            size = size + lr * abs(c) * z.abs()
            blur = blur + lr * (abs(c) * noise_error + error * (z.abs() + noise_error))
        size = size + lr * decay * self.value.abs()
        self.value = self.value - delta
        # conversions of lr and c, their product, that with z, and the sums
        self.error = self.error * (1 + lr * decay) + blur + 1.01 * self.unit * (5 + len(zs)) * size
        reach = self.value.abs() + self.error
        last = ulp(reach, self.dtype) if stochastic and self.dtype in NARROW else 0
        if self.dtype in NARROW:
            last = last + self.unit * reach
        self.error = self.error + (self.half_ulp(reach) if not stochastic else 0) + last
        if stochastic and self.dtype not in NARROW:
            self.error = self.error + self.half_ulp(reach)


@dataclass
class Pending:
    """Of each group and sample: the sum of coefficients, of their sizes; and what was finite."""

    coefficients: Any = None
    sizes: Any = None
    found: Any = None
    """The optimizer's own coefficients, in its arithmetic, once they are known to be right."""
    count: int = 0
    usable: bool = False
    clean: bool = True


@dataclass
class Group:
    options: dict
    weights: list = field(default_factory=list)
    twins: list = field(default_factory=list)
    history: list = field(default_factory=list)
    """What a rule remembers."""
    names: list = field(default_factory=list)


class Simulation:
    """Groups in order; first-order ones are twins stepped by ``torch.optim.SGD``."""

    def __init__(
        self,
        estimator,
        num_samples,
        distribution,
        perturbation,
        rounding,
        nonfinite,
        backend,
        zo_rule,
        unit,
        active=None,
        coupling=0.0,
    ):
        self.coupling = coupling
        self.rule, self.activity = zo_rule, active_of(active)
        self.one_sided = estimator == "one_sided"
        self.samples, self.distribution = num_samples, distribution
        self.in_place = perturbation == "in_place"
        self.stochastic = rounding == "stochastic"
        self.raises = nonfinite == "raise"
        approximate = distribution == "gaussian" and backend != "reference"
        self.noise_error = NOISE_ERROR if approximate else 0.0
        self.finest = {"gaussian": 1.0, "rademacher": 0.5}[distribution]
        self.unit = unit  # of the losses
        self.groups, self.pending, self.sgd = [], None, None
        self.renew()

    def renew(self):
        """What belongs to the optimizer object, and to no state dict."""
        self.skipped, self.verified = 0, set()

    # ---- groups -------------------------------------------------------------------------------

    @property
    def zo(self):
        return [g for g in self.groups if g.options["mode"] == "zo"]

    @property
    def weights(self):
        return [w for g in self.zo for w in g.weights]

    @property
    def twins(self):
        return [t for g in self.groups for t in g.twins]

    def moving(self, position, group):
        """Positions of a group's weights that the present step moves, and what scales slopes."""
        count = len(group.weights)
        if self.activity is None:
            return range(count), 1.0
        names, seed, step = group.names, group.options["seed"], group.options["zo_step"]
        found = self.activity.choose(names, seed, step, position)
        assert len(set(found.positions)) == len(found.positions)
        if isinstance(self.activity, Draw):
            assert found.scale == (count / len(found.positions) if count else 1)
        return found.positions, found.scale

    @property
    def moving_weights(self):
        zo = enumerate(self.zo)
        return [group.weights[i] for at, group in zo for i in self.moving(at, group)[0]]

    @property
    def verifies_all(self):
        """Whether streaming verifies all that ever move, not only what moves in this step."""
        return not self.in_place and self.activity is not None and self.activity.changes

    def verified_of(self, group):
        """Positions of a group's weights that are displaced while all are verified."""
        return self.activity.ever(group.names)

    @property
    def to_verify(self):
        if not self.verifies_all:
            return self.moving_weights
        return [group.weights[i] for group in self.zo for i in self.verified_of(group)]

    def add(self, options, tensors, names=()):
        group = Group(dict(options), names=list(names))
        if options["mode"] == "zo":
            group.options["zo_step"] = self.zo[0].options["zo_step"] if self.zo else 0
            for t in tensors:
                value = t.detach().double().clone()
                size = t.numel() * t.element_size()
                group.weights.append(Weight(value, torch.zeros_like(value), t.dtype, size))
        else:
            group.options["zo_step"] = 0
            group.twins = [t.detach().clone().requires_grad_() for t in tensors]
            others = ("mode", "seed")
            given = {k: v for k, v in options.items() if k not in others} | {"params": group.twins}
            if self.sgd is None:
                self.sgd = torch.optim.SGD([given])
            else:
                self.sgd.add_param_group(given)
        self.groups.append(group)

    def adopt(self, zeroth, first):
        """Take over the real weights, once they are found within the bounds.

        What each call may do is then bounded on its own: sharper than bounds that add up. Twins
        get strides too, since torch rounds bf16 differently where memory is not contiguous.
        """
        for weight, t in zip(self.weights, zeroth, strict=True):
            weight.value = t.detach().double().clone()
            weight.error = torch.zeros_like(weight.value)
        for twin, t in zip(self.twins, first, strict=True):
            memory = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            twin.data = memory.copy_(t.detach())

    def saved(self):
        """What a state dict holds: accumulation is in the first zeroth-order group, if any."""
        sgd = None if self.sgd is None else self.sgd.state_dict()
        groups = [(g.options, g.history) for g in self.groups]
        return copy.deepcopy((groups, self.pending, sgd))

    def load(self, saved):
        groups, self.pending, sgd = saved
        for group, loaded in zip(self.groups, groups, strict=True):
            group.options, group.history = loaded
        if sgd is not None:
            self.sgd.load_state_dict(sgd)

    # ---- a step -------------------------------------------------------------------------------

    @property
    def has_clean(self):
        return self.one_sided or bool(self.twins) or not self.zo

    def points(self):
        """Where one estimate needs the loss, in order."""
        signs = (1,) if self.one_sided else (1, -1)
        weight = self.coupling / (self.samples * len(signs)) if self.twins else 0.0
        displaced = [Point(s, sign, weight=weight) for s in range(self.samples) for sign in signs]
        clean = Point(0, 0, weight=float(bool(self.twins)))
        return [clean] * self.has_clean + displaced * bool(self.zo)

    def plan(self, bad=None):
        """The same with the evaluations that verify, at the first displaced point whose loss is
        finite: not at ``bad``. One repeats it, and streaming is verified in parts."""
        points = self.points()
        good = [point for point in points if point.sign and point != bad]
        moving = self.moving_weights
        if good and not {id(w) for w in moving} <= self.verified:
            parts, used = int(self.verifies_all), math.inf  # one to go there
            sizes = [w.size for w in self.to_verify]
            for size in sizes:  # one evaluation a run of weights no larger than the largest
                parts, used = (parts, used) if used + size <= max(sizes) else (parts + 1, 0)
                used += size
            place = points.index(good[0]) + 1
            repeats = 1 if self.in_place else 1 + parts
            repeats += good[0].weight > 0 and not self.verifies_all  # without gradients, to compare
            points[place:place] = [good[0]._replace(verifies=True, weight=0.0)] * repeats
        return points

    def see(self, point):
        """Go there: the zeroth-order weights that a closure must see, and by how much not."""
        if point.verifies and self.in_place:  # they are there
            return self.seen
        found, index = [], 0
        for position, group in enumerate(self.zo):
            moving = self.moving(position, group)[0]
            if point.verifies and self.verifies_all:
                moving = self.verified_of(group)
            for i, weight in enumerate(group.weights):
                if point.sign == 0 or i not in moving:
                    found.append((weight.value, weight.error))
                else:
                    z = self._noise(group, weight, point.sample, index)
                    scale = point.sign * group.options["mu"] * group.options.get("unit", 1.0)
                    found.append(
                        weight.move(z, scale, self.noise_error, self.in_place, self.finest)
                    )
                index += 1
        self.seen = found
        return found

    def _noise(self, group, weight, sample, index):
        options = group.options
        direction = Direction(options["seed"], options["zo_step"], sample, self.distribution)
        return direction_values(tuple(weight.value.shape), direction, index)

    def zero_grad(self, set_to_none=True):
        self.pending = None
        if self.sgd is not None:
            self.sgd.zero_grad(set_to_none)

    def estimate(self, losses):
        """Add what these losses say to what is pending; the exception that must come, or None."""
        if not self.zo:
            self.pending = self.pending or Pending()
            return None
        losses = list(losses)
        clean = losses.pop(0) if self.has_clean else 0.0
        if self.one_sided:
            slopes = [loss - clean for loss in losses]
        else:
            slopes = [(a - b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
        finite = [math.isfinite(s) and math.isfinite(clean) for s in slopes]
        if self.raises and not all(finite):
            return FloatingPointError
        projected = [
            [s / g.options["mu"] if ok else 0.0 for s, ok in zip(slopes, finite, strict=True)]
            for g in self.zo
        ]
        scales = [self.moving(*each)[1] for each in enumerate(self.zo)]
        new = torch.tensor(projected, dtype=torch.float64) / self.samples
        new = new * torch.tensor(scales, dtype=torch.float64).view(-1, 1)
        pending = self.pending or Pending()
        if pending.coefficients is None:
            pending.coefficients, pending.sizes = torch.zeros_like(new), torch.zeros_like(new)
        if pending.coefficients.shape != new.shape:
            return ValueError
        self.skipped, self.projected = self.skipped + (not all(finite)), projected
        pending.coefficients = pending.coefficients + new
        pending.sizes = pending.sizes + new.abs()
        pending.count += 1
        pending.usable |= any(finite)
        pending.clean &= math.isfinite(clean)
        self.pending = pending
        return None

    def adopt_slopes(self, found):
        """Take over the optimizer's slopes of this estimate, once they are within the bounds.

        Rules need not be continuous: with the bounds alone, a sign or a rank may be either.
        """
        scales = [self.moving(*each)[1] for each in enumerate(self.zo)]
        coefficients = found / self.samples
        coefficients = coefficients * coefficients.new_tensor(scales).view(-1, 1)
        before = self.pending.found
        self.pending.found = coefficients if before is None else before + coefficients

    def rule_states(self):
        """What a state dict holds of the rule, one a zeroth-order group."""
        return [state_of(self.rule, group.history) for group in self.zo]

    def _ruled(self, position, group, errors):
        """One group's coefficients after the rule, and their errors."""
        found = self.pending.found[position]
        coefficients = reference(self.rule, found.double().tolist(), group.history)
        if type(self.rule).__name__ == "SGD":
            return self.pending.coefficients[position].tolist(), errors.tolist()
        unit = torch.finfo(found.dtype).eps
        return coefficients, [1e-10 + unit * abs(c) for c in coefficients]

    def apply(self):
        """Update all groups by what is pending, and forget it."""
        pending, index = self.pending, 0
        if self.sgd is not None and pending.clean:
            fo = [g for g in self.groups if g.options["mode"] == "fo"]
            for group, theirs in zip(fo, self.sgd.param_groups, strict=True):
                theirs.update({k: group.options[k] for k in ("lr", "momentum", "weight_decay")})
            self.sgd.step()
        if pending.coefficients is None:  # then no group has any
            pending.coefficients = pending.sizes = torch.zeros(0, 0)
        # a difference, two quotients, their constants, a scale, and the sums
        errors = (7 + pending.count) * self.unit * pending.sizes
        for position, group in enumerate(self.zo):
            options = group.options
            if position < len(pending.coefficients):
                sign = (-1 if options["maximize"] else 1) * options.get("unit", 1.0)
                coefficients, blurs = self._ruled(position, group, errors[position])
                coefficients = [sign * c for c in coefficients]
                blurs = [
                    abs(sign) * (blur + self.unit * abs(c))
                    for blur, c in zip(blurs, coefficients, strict=True)
                ]
                lr = float(options["lr"]) if pending.usable else 0.0
                moving, scale = self.moving(position, group)
                for i, weight in enumerate(group.weights):
                    if i not in moving:
                        continue
                    zs = [self._noise(group, weight, s, index + i) for s in range(self.samples)]
                    weight.update(
                        zs,
                        coefficients,
                        blurs,
                        lr,
                        options["weight_decay"] * scale,
                        self.noise_error,
                        self.stochastic,
                    )
            index += len(group.weights)
            options["zo_step"] += 1
        self.pending = None
