"""Any sequence of calls of HybridZOFO, against its restatement in ``simulation``.

In place, weights are within rounding of the simulation after every call, failed ones included;
streamed, they keep their bits in all calls but updates. First-order weights have the bits of SGD.
"""

import copy
import io
import itertools
import os

import pytest
import torch
from conftest import same_bits, weights
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation import Simulation

from zofo_kernels import DTYPES
from zofo_optim import CenteredRank, Clip, Cycle, Draw, HybridZOFO, Normalized, Sign, ZScore
from zofo_optim.rules import SGD, described

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = int(os.environ.get("ZOFO_FUZZ", "80"))
"""Sequences of calls, of each kind of perturbation."""

SHAPES = st.sampled_from([(3,), (), (0,), (2, 3), (130,), (4, 1, 2)])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided"])
PARAMETERS = st.tuples(SHAPES, st.sampled_from(DTYPES), LAYOUTS)
RATES = st.sampled_from([0.1, 0.01, 0.3, 0.0])
DECAYS, MUS = st.sampled_from([0.0, 0.5]), st.sampled_from([1e-3, 2.0**-7, 0.05])
ANY = dict(parameters=st.lists(PARAMETERS, min_size=1, max_size=2), lr=RATES)
ANY.update(weight_decay=DECAYS, maximize=st.booleans())
TENSORS = RATES.map(lambda lr: torch.tensor(lr, dtype=torch.float64))
ZO = dict(ANY, mode=st.just("zo"), lr=RATES | TENSORS, mu=MUS)
UNITS = st.sampled_from([1.0, 2.0**-5, 0.3])
FO = dict(ANY, mode=st.just("fo"), momentum=st.sampled_from([0.0, 0.9]))
GROUPS = st.one_of(
    st.fixed_dictionaries(ZO, optional=dict(seed=st.just(7), unit=UNITS)),
    st.fixed_dictionaries(dict(FO, momentum=st.just(0.9), nesterov=st.booleans())),
    st.fixed_dictionaries(ZO),
    st.fixed_dictionaries(FO),
)
RULES = [SGD(), SGD(), Normalized(), Clip(limit=1.5, beta=0.9), Clip(2, relative=False), Sign()]
SHAPING = [ZScore(), CenteredRank()]  # of several samples
EVEN = r"[02468]\.zo"  # the first zeroth-order parameter, and every other one
ACTIVE = [None, None, None, 0.4, Draw(0.5, by="layer"), EVEN, Cycle([EVEN, "."], every=2)]
SETTINGS = st.fixed_dictionaries(
    dict(
        estimator=st.sampled_from(["one_sided", "two_sided"]),
        num_samples=st.integers(1, 3),
        distribution=st.sampled_from(["gaussian", "rademacher"]),
        rounding=st.sampled_from(["stochastic", "nearest"]),
        nonfinite=st.sampled_from(["skip", "skip", "raise"]),
        backend=st.sampled_from(["auto", "reference"]),
        seed=st.sampled_from([0, 2**64 - 1]),
        zo_rule=st.sampled_from(RULES + SHAPING),
        active=st.sampled_from(ACTIVE),
        coupling=st.sampled_from([0.0, 0.0, 0.3]),
    )
).filter(lambda chosen: chosen["num_samples"] >= chosen["zo_rule"].min_samples)
BATCHES, LOSSES = st.integers(0, 3), st.sampled_from([torch.float32, torch.float64])
MANNERS = st.sampled_from(["returns", "backward", "zero_grad, backward", "no .grad, backward"])
STEPS = st.lists(st.integers(1, 3), min_size=1, max_size=3)
EVENTS = st.sampled_from([None, None, "nan", "load", "load afresh", "rewind", "copy"])
KINDS = st.sampled_from(["nan", "inf", "raise", "ctrl-c", "step"])
FAULTS = st.none() | st.tuples(KINDS, st.integers(0, 12), st.booleans())
ERRORS = {"raise": ArithmeticError, "ctrl-c": KeyboardInterrupt, "step": RuntimeError}


def parameter(shape, dtype, layout, seed, requires_grad):
    value = weights(shape, dtype, seed)
    if layout == "transposed":
        order = tuple(reversed(range(value.ndim)))
        value = value.permute(order).contiguous().permute(order)
    elif layout == "strided":
        value = torch.stack([value] * 3, dim=-1)[..., 1]
    return torch.nn.Parameter(value, requires_grad)


def couple(twins, weight, gradients):
    for twin, gradient in zip(twins, gradients, strict=True):
        if twin.grad is None:
            twin.grad = gradient * weight
        else:
            twin.grad.add_(gradient, alpha=weight)


class Closure:
    """A loss of all parameters; looks at where it is evaluated, and fails where it is told to.

    ``fault`` is a kind, the evaluation it befalls and, of exceptions, whether they come last.
    """

    def __init__(self, machine, batch, manner, fault):
        self.machine, self.batch, self.manner = machine, batch, manner
        self.kind, at, self.last = fault or (None, 0, False)
        points = machine.simulation.points()
        self.bad = points[at % len(points)] if self.kind in ("nan", "inf") else None
        self.plan = machine.simulation.plan(self.bad)
        self.at = at % len(self.plan)
        refused = self.kind == "step" and not self.last  # and the closure carries on
        self.error = None if refused else ERRORS.get(self.kind)
        self.calls, self.losses, self.draws = 0, [], set()
        self.first = self.state = None

    def __call__(self):
        machine, simulation = self.machine, self.machine.simulation
        assert self.calls < len(self.plan), "an evaluation too many"
        point, here = self.plan[self.calls], self.calls == self.at
        self.calls += 1
        expected = simulation.see(point)
        if here and self.error and not self.last:
            raise self.error("must not step")
        assert torch.is_grad_enabled() == (point.weight > 0)
        draw = torch.rand(())
        self.draws.add(float(draw))
        values = [p.double() for p in machine.parameters]
        seen = [v for v, p in zip(values, machine.parameters, strict=True) if not p.requires_grad]
        for v, (value, error) in zip(seen, expected, strict=True):
            assert ((v - value).abs() <= error).all(), f"displaced wrongly at {point}"
        machine.check_storage(point)
        if self.manner == "zero_grad, backward":
            machine.optimizer.zero_grad()
            if self.calls == 1:
                simulation.zero_grad()
        if self.manner == "no .grad, backward":
            for p in machine.fo_parameters + (simulation.twins if self.calls == 1 else []):
                p.grad = None
        x = draw + self.batch
        total = sum(torch.sin((1 + i % 3) * v + x).sum() for i, v in enumerate(values))
        loss = (total + torch.sin(2 * total)).to(machine.loss_dtype)
        if point == self.bad:
            loss = loss + float(self.kind)  # gradients stay finite
        if torch.is_grad_enabled():
            gradients = torch.autograd.grad(loss, machine.fo_parameters, retain_graph=True)
            with torch._C.DisableTorchFunction():  # our own backward is not the closure's
                if point.sign == 0:
                    torch.autograd.backward(simulation.twins, gradients)
                elif point != self.bad and not (here and self.error):
                    couple(simulation.twins, point.weight, gradients)
        if self.manner != "returns" or (here and self.error):
            loss.backward()
        if here and self.kind == "step":
            with pytest.raises(RuntimeError, match="must not step"):
                machine.optimizer.step(lambda: loss)
        if here and self.error:
            raise self.error("must not step")
        if point.verifies:
            if self.calls == len(self.plan) or not self.plan[self.calls].verifies:
                simulation.verified |= {id(w) for w in simulation.to_verify}
        else:
            self.losses.append(loss.item())
        if self.calls == 1:
            self.first, self.state = loss, torch.get_rng_state()
        return loss


class Machine(RuleBasedStateMachine):
    perturbation = None

    @initialize(chosen=SETTINGS, groups=st.lists(GROUPS, min_size=1, max_size=3), loss_dtype=LOSSES)
    def construct(self, chosen, groups, loss_dtype):
        torch.manual_seed(0)
        self.chosen = dict(chosen, perturbation=self.perturbation)
        self.loss_dtype, self.seeds, self.specs = loss_dtype, itertools.count(), []
        self.names = dict(zo=itertools.count(), fo=itertools.count())
        self.saved, self.updated = None, False
        known = {k: v for k, v in self.chosen.items() if k != "seed"}
        self.simulation = Simulation(**known, unit=torch.finfo(loss_dtype).eps / 2)
        self.optimizer = HybridZOFO([self.described(g) for g in groups], **self.chosen)
        self.kept = self.copies()

    def described(self, spec):
        """A new group: given to the simulation, remembered, and returned for the optimizer."""
        spec, fo = copy.deepcopy(spec), spec["mode"] == "fo"
        tensors = [parameter(*each, next(self.seeds), fo) for each in spec.pop("parameters")]
        options = {"seed": self.chosen["seed"], **spec, "lr": float(spec["lr"])}
        mode = spec["mode"]
        spec["param_names"] = [f"{next(self.names[mode])}.{mode}" for _ in tensors]
        self.simulation.add(options, tensors, spec["param_names"])
        self.specs.append(spec)
        return dict(copy.deepcopy(spec), params=tensors)

    @property
    def parameters(self):
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    @property
    def zo_parameters(self):
        return [p for p in self.parameters if not p.requires_grad]

    @property
    def fo_parameters(self):
        return [p for p in self.parameters if p.requires_grad]

    def copies(self):
        return [p.detach().clone() for p in self.zo_parameters]

    def check_storage(self, point):
        """Streamed: what is evaluated are copies. (To verify, some weights are written.)"""
        if self.perturbation == "streamed" and not point.verifies:
            with torch._C.DisableTorchFunction():
                for p, kept in zip(self.zo_parameters, self.kept, strict=True):
                    assert same_bits(p.detach(), kept)

    # ---- rules --------------------------------------------------------------------------------

    def estimate(self, method, batch, manner, fault):
        simulation = self.simulation
        closure, error = Closure(self, batch, manner, fault), None
        if closure.error:
            with pytest.raises(closure.error, match="must not step"):
                method(closure)
            assert closure.calls == closure.at + 1
        else:
            try:
                returned = method(closure)
                assert returned is closure.first or not simulation.has_clean
            except (FloatingPointError, ValueError) as caught:
                error = caught
            assert closure.calls == len(closure.plan)
            expected = simulation.estimate(closure.losses)
            assert type(error) is (expected or type(None)), error
            if simulation.zo and not error:
                wanted = torch.tensor(simulation.projected, dtype=torch.float64)
                found = self.optimizer.projected_grads.double()
                assert ((found - wanted).abs() <= 4 * simulation.unit * wanted.abs()).all()
                simulation.adopt_slopes(self.optimizer.projected_grads)
        if closure.state is not None:  # as after one evaluation
            assert len(closure.draws) == 1
            assert torch.equal(torch.get_rng_state(), closure.state)
        return closure.error is None and error is None

    @rule(batch=BATCHES, manner=MANNERS, fault=FAULTS)
    def step(self, batch, manner, fault):
        if self.estimate(self.optimizer.step, batch, manner, fault):
            self.simulation.apply()
            self.updated = True

    @rule(batch=BATCHES, manner=MANNERS, fault=FAULTS)
    def backward(self, batch, manner, fault):
        self.estimate(self.optimizer.backward, batch, manner, fault)

    @rule()
    def step_by_what_is_pending(self):
        if self.simulation.pending is None:
            with pytest.raises(RuntimeError, match="needs a closure"):
                self.optimizer.step()
        else:
            assert self.optimizer.step() is None
            self.simulation.apply()
            self.updated = True

    @rule(steps=STEPS, event=EVENTS)
    def train(self, steps, event):
        """Steps of so many micro-batches each; perhaps an event between the last and the update."""
        for batches in steps:
            self.zero_grad(True)
            if event == "rewind":
                self.save()
            for batch in range(batches):
                self.backward(batch, "returns", ("nan", 0, False) if event == "nan" else None)
                self.as_simulated()
            if event == "copy":
                self.copy_all(batches == 1)
                self.as_simulated()  # strides may have changed
            elif event in ("load", "load afresh", "rewind"):
                self.load(event == "load afresh", now=event != "rewind")
            self.step_by_what_is_pending()
            self.as_simulated()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.optimizer.zero_grad(set_to_none)
        self.simulation.zero_grad(set_to_none)

    @precondition(lambda self: len(self.simulation.groups) < 5)
    @rule(group=GROUPS)
    def add_group(self, group):
        self.optimizer.add_param_group(self.described(group))
        self.kept = self.copies()

    @rule(alias=st.booleans())
    def add_group_that_cannot_be(self, alias):
        filled = [p for p in self.zo_parameters if p.numel()]
        bad = filled[0].detach() if alias and filled else torch.zeros(3, dtype=torch.int64)
        with pytest.raises((TypeError, ValueError)):
            self.optimizer.add_param_group(dict(params=[bad], mode="zo"))

    @rule(which=st.integers(0, 4), lr=RATES, weight_decay=DECAYS, mu=MUS)
    def change_options(self, which, lr, weight_decay, mu):
        which %= len(self.simulation.groups)
        zo = self.simulation.groups[which].options["mode"] == "zo"
        changes = dict(dict(mu=mu) if zo else dict(momentum=0.5), lr=lr, weight_decay=weight_decay)
        self.optimizer.param_groups[which].update(changes)
        self.simulation.groups[which].options.update(changes)

    @rule()
    def schedule(self):
        torch.optim.lr_scheduler.MultiplicativeLR(self.optimizer, lambda _: 0.5).step()
        for group in self.simulation.groups:
            group.options["lr"] *= 0.5

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.optimizer.state_dict()), self.simulation.saved()

    @rule(afresh=st.booleans(), now=st.booleans())
    def load(self, afresh, now):
        """Into this optimizer or one constructed alike: the state of now, or of the last save."""
        if now or self.saved is None:
            self.save()
        state, simulated = copy.deepcopy(self.saved)  # torch's load_state_dict shares tensors
        if len(simulated[0]) != len(self.simulation.groups):
            with pytest.raises(ValueError, match="number of parameter groups"):
                self.optimizer.load_state_dict(state)
            return
        if afresh:
            specs = copy.deepcopy(self.specs)
            for spec, group in zip(specs, self.optimizer.param_groups, strict=True):
                spec["params"] = group["params"]
            self.optimizer = HybridZOFO(specs, **self.chosen)
            self.simulation.renew()
        self.optimizer.load_state_dict(state)
        self.simulation.load(simulated)

    @rule(pickled=st.booleans())
    def copy_all(self, pickled):
        """Copies of parameters have no gradients: users save them aside."""
        gradients, both = [p.grad for p in self.parameters], (self.parameters, self.optimizer)
        if pickled:
            torch.save(both, file := io.BytesIO())
            file.seek(0)
            both = torch.load(file, weights_only=False)
        else:
            both = copy.deepcopy(both)
        self.optimizer = both[1]
        for ours, theirs, grad in zip(both[0], self.parameters, gradients, strict=True):
            assert ours is theirs
            ours.grad = grad
        self.simulation.verified = set()

    @rule()
    def move_storage(self):
        for p in self.parameters:
            p.data = p.data.clone()

    # ---- what must hold -----------------------------------------------------------------------

    @invariant()
    def as_simulated(self):
        simulation, found = self.simulation, self.zo_parameters
        for p, weight in zip(found, simulation.weights, strict=True):
            assert p.grad is None
            assert ((p.double() - weight.value).abs() <= weight.error).all()
        if self.perturbation == "streamed" and not self.updated:
            assert all(map(same_bits, found, self.kept))
        for p, twin in zip(self.fo_parameters, simulation.twins, strict=True):
            assert same_bits(p.detach(), twin.detach())
            assert (p.grad is None) == (twin.grad is None)
            assert p.grad is None or same_bits(p.grad, twin.grad)
        simulation.adopt(found, self.fo_parameters)
        self.kept, self.updated = self.copies(), False
        assert self.optimizer.skipped_steps == simulation.skipped
        self.check_rule_states()
        for real, group in zip(self.optimizer.param_groups, simulation.groups, strict=True):
            for name, value in group.options.items():
                if not (group.options["mode"] == "fo" and name == "zo_step"):
                    assert float(real[name]) == value if name == "lr" else real[name] == value

    def check_rule_states(self):
        groups = self.optimizer.state_dict()["param_groups"]
        states = [group.get("zo_rule_state", {}) for group in groups if group["mode"] == "zo"]
        for found, wanted in zip(states, self.simulation.rule_states(), strict=True):
            name = described(self.chosen["zo_rule"])
            assert found.pop("rule", "sgd") == name
            assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


InPlace = type("InPlace", (Machine,), dict(perturbation="in_place"))
Streamed = type("Streamed", (Machine,), dict(perturbation="streamed"))
TestInPlace, TestStreamed = InPlace.TestCase, Streamed.TestCase  # type: ignore[attr-defined]
TestInPlace.settings = TestStreamed.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=25
)


@pytest.mark.parametrize("zo_rule", [*RULES[1:], *SHAPING], ids=repr)
@pytest.mark.parametrize("kind", [InPlace, Streamed])
def test_every_rule(kind, zo_rule):
    """Examples may leave one out; here each takes steps, is saved, loaded and copied."""
    machine, dtype = kind(), torch.float32
    any_group = dict(lr=0.01, weight_decay=0.5, maximize=False)
    shapes = [
        ((130,), dtype, "contiguous"),
        ((3,), dtype, "contiguous"),
        ((2, 3), dtype, "strided"),
    ]
    groups = [dict(any_group, parameters=[each]) for each in shapes]
    groups[0].update(mode="zo", mu=2.0**-7)
    groups[1].update(mode="fo", momentum=0.9)
    groups[2].update(mode="zo", mu=0.05, maximize=True)
    chosen = dict(estimator="two_sided", num_samples=3, distribution="rademacher", seed=0)
    chosen.update(rounding="stochastic", nonfinite="skip", backend="reference", zo_rule=zo_rule)
    machine.construct(chosen=chosen, groups=groups, loss_dtype=torch.float32)
    machine.train(steps=[1, 2], event=None)
    machine.train(steps=[1], event="nan")
    machine.step(batch=1, manner="returns", fault=("nan", 2, False))  # one direction is lost
    machine.as_simulated()
    for event in ("load", "load afresh", "rewind", "copy"):
        machine.train(steps=[1, 2], event=event)
    if type(zo_rule).__name__ == "Normalized" or getattr(zo_rule, "relative", False):
        assert len(machine.simulation.zo[0].history) == 9  # a step that is rewound has none
