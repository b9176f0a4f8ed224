"""Rules: from the coefficients of a step to those of its update, and on to the weights."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_references import reference, root_mean_square
from torch.nn import Parameter

import zofo_optim
from zofo_kernels import Weights, noise
from zofo_optim import CenteredRank, Clip, HybridZOFO, Listener, Normalized, Rule, Sign, ZScore
from zofo_optim.rule_states import keep, saved, shaped
from zofo_optim.rules import RULES, SGD, described, rule_of
from zofo_optim.zo_groups import ZOGroup

EVERY = [
    *(SGD(), Normalized(), Normalized(beta=0.5, eps=1e-3), Normalized(beta=0)),
    *(Clip(), Clip(limit=1.5, beta=0.9), Clip(limit=2, relative=False)),
    *(Sign(), ZScore(), ZScore(eps=0.1), CenteredRank()),
]
few = settings(max_examples=25)  # of every rule
every = pytest.mark.parametrize("rule", EVERY, ids=repr)
sizes = st.floats(1e-4, 1e6)
numbers = st.just(0.0) | sizes | sizes.map(lambda x: -x) | st.sampled_from([1.0, -1.0, 2.5, 2.5])
STEPS = st.lists(st.lists(numbers, min_size=2, max_size=6), min_size=1, max_size=6)


def run(rule, steps, dtype=torch.float64):
    """The coefficients of each step after the rule, one group."""
    group, found = ZOGroup(Weights([torch.ones(1)]), {}), []
    for coefficients in steps:
        (row,), state = shaped(rule, [group], [torch.tensor(coefficients, dtype=dtype)])
        keep([group], state)
        found.append(row)
    return found, saved(group.options.get("zo_rule_state", {}))


@every
@few
@given(STEPS)
def test_references(rule, steps):
    """Steps of any number of samples, with slopes that were not finite."""
    found, _ = run(rule, steps)
    history = []
    for coefficients, row in zip(steps, found, strict=True):
        assert row.tolist() == pytest.approx(
            reference(rule, coefficients, history), rel=1e-9, abs=1e-12
        )


@every
@few
@given(STEPS)
def test_float32(rule, steps):
    """Coefficients have the loss's dtype, and the arithmetic is wider."""
    narrow = [np.float32(each).tolist() for each in steps]
    wide, state = run(rule, narrow)
    found, same = run(rule, narrow, torch.float32)
    assert same == state
    for a, b in zip(found, wide, strict=True):
        assert same_bits(a, b.float())


@every
@few
@given(STEPS)
def test_not_one_direction_before_another(rule, steps):
    """A rule is odd, so that ``maximize`` may come after it; and the order of samples is free."""
    found, state = run(rule, steps)
    negative, same = run(rule, [[-c for c in each] for each in steps])
    assert same == state
    turned, _ = run(rule, [each[::-1] for each in steps])
    for row, minus, back in zip(found, negative, turned, strict=True):
        torch.testing.assert_close(minus, -row, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(back, row.flip(0), rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unknown_slopes(rule, dtype):
    """They stay 0, and nothing of them is remembered, nor of those whose square is infinite."""
    huge = 1e30 if dtype == torch.float32 else 1e200
    bad = [0.0, math.inf, -math.inf, math.nan] + [huge * 1e20] * (dtype == torch.float64)
    first, last = [3.0, 1.0, -2.0], [0.25, 4.0]
    (_, *found, row), state = run(rule, [first, [0.0, 0.0], bad, last], dtype)
    (_, wanted), same = run(rule, [first, last], dtype)
    assert state == same
    assert same_bits(row, wanted)
    if rule != SGD():  # which is not to change what was
        assert all((row == 0).all() for row in found)
    (mixed,), state = run(rule, [[3.0, 0.0, -2.0]], dtype)
    assert mixed[1] == 0
    assert mixed.isfinite().all()


@every
def test_one_sample_or_none(rule):
    if rule.min_samples == 1:
        ((row,),) = run(rule, [[-2.0]])[:1]
        assert row.isfinite().all()
        assert row < 0
        return
    with pytest.warns(UserWarning, match=r"compares the samples .* needs 2, and this one has 1"):
        assert not run(rule, [[2.0]])[0][0].any()
    assert not run(rule, [[2.0, 0.0]])[0][0].any()  # one alone is known
    assert not run(rule, [[0.1, 0.1, 0.1]])[0][0].any()


def test_the_number_of_samples_leaves_no_trace():
    """As many slopes of the same sizes: the same running mean, and the same moves on average."""
    for rule in (Normalized(), Clip()):
        few, many = run(rule, [[1.0, -1.0]] * 3), run(rule, [[0.25, -0.25] * 4] * 3)
        assert few[1].pop("rule") == many[1].pop("rule") == repr(rule)
        assert few[1] == pytest.approx(many[1])
        assert few[0][-1].abs().sum() == pytest.approx(many[0][-1].abs().sum())


def test_normalized_frees_the_rate_of_the_scale():
    steps = [[0.5], [-2.0], [1.0], [0.1]]
    found, _ = run(Normalized(), steps)
    scaled, _ = run(Normalized(), [[1e4 * c for c in each] for each in steps])
    for a, b in zip(found, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert abs(found[0].item()) == pytest.approx(1.0)  # as Adam's first step
    drawn = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.cat(run(Normalized(), [[7.0 * x] for x in drawn.tolist()])[0])
    assert sizes.square().mean().sqrt() == pytest.approx(1.0, abs=0.05)


def test_clip_by_the_slopes_before():
    """An outlier is cut to the limit, and raises that of the next step no more than by itself."""
    ordinary = [[1.0], [-1.0]] * 10
    found, _ = run(Clip(limit=3), [*ordinary, [1000.0], [1000.0], [2.5]])
    assert torch.cat(found[:20]).abs().tolist() == [1.0] * 20
    assert found[20].item() == pytest.approx(3.0)
    assert 3.0 < found[21].item() < 4.0
    assert found[22].item() == 2.5  # its bits
    assert [c.item() for c in run(Clip(), [[1e3], [1e3]])[0]] == [1e3, 1e3]
    assert run(Clip(2, relative=False), [[5.0, -0.5, 0.0]])[0][0].tolist() == [2 / 3, -0.5, 0.0]
    history = [1.0] * 20
    assert root_mean_square(0.99, history) == pytest.approx(1.0)


def test_clip_grows_with_its_slopes():
    """No scale is too small to leave."""
    found, _ = run(Clip(), [[1e-3], *[[1.0]] * 40])
    assert found[1].item() < 4e-3
    assert found[-1].item() == 1.0


# ---- how they are chosen ----------------------------------------------------------------------


def test_their_names():
    names = ["sgd", "normalized", "clip", "sign", "zscore", "centered_rank"]
    assert list(RULES) == names
    assert [rule_of(name) for name in names] == [
        SGD(), Normalized(), Clip(), Sign(), ZScore(), CenteredRank(),
    ]  # fmt: skip
    w = Parameter(torch.ones(2), False)
    for name in names:
        assert HybridZOFO([w], mode="zo", lr=1e-3, num_samples=2, zo_rule=name).settings.rule
    public = {rule.__name__ for rule in RULES.values()} - {"SGD"}
    assert public | {"Rule"} <= set(zofo_optim.__all__)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ("adam", ValueError, r"zo_rule must be one of \('sgd', 'normalized',.*Rule, got 'adam'"),
        (None, TypeError, "zo_rule must be a name or a Rule, got None"),
        (["sgd"], TypeError, r"zo_rule must be a name or a Rule, got \['sgd'\]"),
        (Normalized, TypeError, r"got the class Normalized; pass Normalized\(\)"),
        ("zscore", ValueError, "num_samples must be >= 2 where zo_rule='zscore'.*got 1"),
        (CenteredRank(), ValueError, r"num_samples must be >= 2 where zo_rule=CenteredRank\(\)"),
    ],
)
def test_what_is_no_rule(chosen, error, message):
    w = Parameter(torch.ones(2), False)
    with pytest.raises(error, match=message):
        HybridZOFO([w], mode="zo", lr=1e-3, zo_rule=chosen)


class Nameless(Rule):
    """No dataclass: its repr is an address."""

    def update(self, coefficients, state):
        return coefficients, state


def test_a_rule_must_say_its_options():
    w = Parameter(torch.ones(2), False)
    for rule in (Nameless(), Returns(lambda: 0)):
        with pytest.raises(TypeError, match="zo_rule must be a frozen dataclass, or have a repr"):
            HybridZOFO([w], mode="zo", lr=1e-3, zo_rule=rule)


@dataclass(frozen=True)
class Returns(Rule):
    """What a rule must not."""

    what: str

    def update(self, coefficients, state):
        return {
            "alone": coefficients,
            "list": (coefficients.tolist(), state),
            "no state": (coefficients, None),
            "three": (coefficients, state, 0),
        }[self.what]


@pytest.mark.parametrize("what", ["alone", "list", "no state", "three"])
def test_a_rule_must_return_a_pair(what):
    w = Parameter(torch.ones(2), False)
    optimizer = HybridZOFO([w], mode="zo", lr=1e-3, zo_rule=Returns(what))
    with pytest.raises(
        TypeError, match=r"zo_rule Returns.* must return coefficients, a tensor, and"
    ):
        optimizer.step(lambda: w.sum())
    assert torch.allclose(w, torch.ones(2))


def test_a_rule_is_of_the_whole_optimizer():
    w = Parameter(torch.ones(2), False)
    with pytest.raises(ValueError, match="zo_rule must be given to HybridZOFO, for all groups"):
        HybridZOFO([dict(params=[w], mode="zo", lr=1e-3, zo_rule="sign")])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Normalized, dict(beta=1.0), r"beta of Normalized must be a number in \[0, 1\), got 1.0"),
        (Normalized, dict(beta=-0.1), "beta of Normalized must be .* got -0.1"),
        (Normalized, dict(beta=math.nan), "beta of Normalized must be .* got nan"),
        (Normalized, dict(beta="0.9"), "beta of Normalized must be .* got '0.9'"),
        (Normalized, dict(eps=0), "eps of Normalized must be a finite number > 0, got 0"),
        (Normalized, dict(eps=True), "eps of Normalized must be .* got True"),
        (Clip, dict(limit=0.0), "limit of Clip must be a finite number > 0, got 0.0"),
        (Clip, dict(limit=math.inf), "limit of Clip must be .* got inf"),
        (Clip, dict(limit=None), "limit of Clip must be .* got None"),
        (Clip, dict(relative=1), "relative of Clip must be True or False, got 1"),
        (Clip, dict(beta=2), "beta of Clip must be .* got 2"),
        (ZScore, dict(eps=-1e-8), "eps of ZScore must be .* got -1e-08"),
    ],
)
def test_options_are_checked(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@every
def test_they_are_values(rule):
    assert copy.deepcopy(rule) == rule == pickle.loads(pickle.dumps(rule))
    assert hash(rule) == hash(copy.copy(rule))
    assert described(rule) == ("sgd" if rule == SGD() else repr(rule))
    with pytest.raises(FrozenInstanceError):
        rule.beta = 0.5
    assert repr(Clip(np.float32(2), np.bool_(True))) == "Clip(limit=2.0, relative=True, beta=0.99)"


# ---- what becomes of them ---------------------------------------------------------------------


class Keeps(Listener):
    def __init__(self):
        self.told, self.estimates = [], []

    def estimated(self, estimated):
        self.estimates.append(estimated.slopes)

    def updated(self, updates):
        self.told.append(updates)


@every
@pytest.mark.parametrize("maximize", [False, True])
def test_an_update_is_what_is_done(rule, maximize):
    """w - lr (sum_s c_s v_s + weight_decay w), with c_s of the reference, over several steps."""
    a = Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64), False)
    b = Parameter(torch.linspace(0.5, 1, 4, dtype=torch.float64), False)
    options = dict(lr=0.01, mu=1e-2, weight_decay=0.5, maximize=maximize, mode="zo")
    groups = [dict(options, params=[a]), dict(options, params=[b], mu=1e-3)]
    optimizer = HybridZOFO(groups, num_samples=3, zo_rule=rule)
    keeps = optimizer.add_listener(Keeps())
    histories = [], []
    for step in range(4):
        before = [a.detach().clone(), b.detach().clone()]
        keeps.estimates.clear()
        optimizer.zero_grad()
        for batch in range(2):
            optimizer.backward(lambda step=step, batch=batch: (a**3).sum() * step - (b**2).sum())
        optimizer.step()
        slopes = sum(keeps.estimates)
        for place, (update, w) in enumerate(zip(keeps.told[-1], (a, b), strict=True)):
            wanted = reference(rule, (slopes[place] / 3).tolist(), histories[place])
            found = -update.coefficients if maximize else update.coefficients
            assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
            assert [v.sample for v in update.directions] == [0, 1, 2]
            along = zip(update.coefficients, update.directions, strict=True)
            moved = sum(c * noise(w.shape, v, index=place, dtype=w.dtype) for c, v in along)
            start = before[place]
            after = start - update.lr * (moved + update.weight_decay * start)
            torch.testing.assert_close(w.detach(), after, rtol=1e-12, atol=1e-12)


def test_sgd_by_name_and_by_object_is_the_default():
    def trained(**options):
        w = Parameter(torch.linspace(-1, 2, 6), False)
        optimizer = HybridZOFO([w], mode="zo", lr=1e-2, num_samples=3, **options)
        for _ in range(3):
            optimizer.step(lambda: (w**3).sum())
        return w.detach(), optimizer.state_dict()["param_groups"]

    (default, state), *others = trained(), trained(zo_rule="sgd"), trained(zo_rule=SGD())
    for w, same in others:
        assert same_bits(w, default)
        assert same == state
    assert state[0]["zo_settings"]["zo_rule"] == "sgd"
    assert "zo_rule_state" not in state[0]


def test_a_rule_of_ones_own():
    @dataclass(frozen=True)
    class Counted(Rule):
        """Nothing in the first step."""

        def init(self):
            return {"steps": 0.0}

        def update(self, coefficients, state):
            steps = state["steps"]
            return coefficients * (steps > 0), {"steps": steps + 1}

    w = Parameter(torch.ones(3), False)
    optimizer = HybridZOFO([w], mode="zo", lr=1e-2, perturbation="streamed", zo_rule=Counted())
    optimizer.step(lambda: w.sum())
    assert torch.equal(w, torch.ones(3))
    optimizer.step(lambda: w.sum())
    assert not torch.equal(w, torch.ones(3))
    assert optimizer.state_dict()["param_groups"][0]["zo_rule_state"] == {
        "rule": repr(Counted()),
        "steps": 2.0,
    }


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda c, s: (c.sum(), s), r"must keep the coefficients' shape and dtype, got \(\)"),
        (lambda c, s: (c.double(), s), "shape and dtype, got .* torch.float64 for .*float32"),
        (lambda c, s: (c, {}), r"0-dim tensors of the names of its init\(\), \['n'\], got \[\]"),
        (lambda c, s: (c, {**s, "m": s["n"]}), r"\['n'\], got \['n', 'm'\]"),
        (lambda c, s: (c, {"n": c}), "must return 0-dim tensors"),
    ],
)
def test_a_wrong_rule_changes_nothing(made, message):
    @dataclass(frozen=True)
    class Wrong(Rule):
        def init(self):
            return {"n": 0.0}

        def update(self, coefficients, state):
            return made(coefficients, state)

    w = Parameter(torch.ones(3), False)
    optimizer = HybridZOFO([w], mode="zo", lr=1, perturbation="streamed", zo_rule=Wrong())
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: w.sum())
    assert torch.equal(w, torch.ones(3))


@every
def test_with_directions_per_example(rule):
    """As many samples as a step has examples, over its micro-batches; a ragged one among them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).requires_grad_(False)
    groups = [dict(params=list(model.parameters()), mode="zo", lr=1e-2)]
    options = dict(structure="low_rank", perturbation="streamed", directions="per_example")
    optimizer = HybridZOFO(groups, zo_rule=rule, **options)
    keeps, history = optimizer.add_listener(Keeps()), []
    for sizes in ([4, 3], [2, 2], [5]):
        parts = len(sizes)
        for size in sizes:
            x = torch.randn(size, 3)
            optimizer.backward(lambda x=x, n=parts: model(x).square().mean(1) / n)
        coefficients = optimizer.accumulated[0].tolist()
        assert len(coefficients) == sum(sizes)
        optimizer.step()
        ((update,),) = keeps.told[-1:]
        wanted = reference(rule, coefficients, history)
        assert update.coefficients.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        assert [v.sample for v in update.directions] == list(range(sum(sizes)))
