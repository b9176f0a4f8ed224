"""What rules remember: saved, resumed, copied, captured; steps that do not come leave it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import same_bits
from resumable import Run
from torch.nn import Parameter

from zofo_optim import CenteredRank, Clip, HybridZOFO, Normalized, Sign, ZScore, rule_states
from zofo_optim.rule_states import keep, shaped

RULES = [Normalized(), Clip(limit=1.2), Clip(1, relative=False), Sign(), ZScore(), CenteredRank()]
REMEMBERING = RULES[:2]
every = pytest.mark.parametrize("rule", RULES, ids=repr)
remembering = pytest.mark.parametrize("rule", REMEMBERING, ids=repr)


def job(rule, **options):
    """Two zeroth-order groups and a first-order one, under a loss that changes with the step."""
    a, b = (Parameter(torch.linspace(-1, 1, n), False) for n in (5, 3))
    y = Parameter(torch.ones(2))
    zo = dict(mode="zo", lr=1e-2)
    groups = [dict(zo, params=[a]), dict(params=[y], lr=1e-2), dict(zo, params=[b], mu=1e-2)]
    given = dict(num_samples=2, perturbation="streamed")
    optimizer = HybridZOFO(groups, zo_rule=rule, **{**given, **options})
    return optimizer


def loss(optimizer, step, factor=1.0):
    a, y, b = (p for group in optimizer.param_groups for p in group["params"])
    return factor * ((a - step).square().sum() * y.sum() + (1 + step) * b.sin().sum())


def train(optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        optimizer.step(lambda step=step: loss(optimizer, step))


def weights(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def states(optimizer):
    return [
        group["zo_rule_state"]
        for group in optimizer.state_dict()["param_groups"]
        if group["mode"] == "zo"
    ]


def assert_same(a, b):
    assert all(map(same_bits, weights(a), weights(b)))
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]


# ---- state dicts ------------------------------------------------------------------------------


@every
def test_resumes_to_the_bit_from_a_file(rule, tmp_path):
    """While it accumulates, in place, 16-bit weights."""
    options = dict(num_samples=2, zo_rule=rule, distribution="rademacher")
    whole, resumed = Run(**options), Run(**options)
    whole.halves(0, 5)
    whole.save(tmp_path / "cut.pt")
    whole.halves(5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load(tmp_path / "cut.pt")
    resumed.halves(5, 8)
    assert all(map(same_bits, whole.weights(), resumed.weights()))
    ours, theirs = (run.optimizer.state_dict()["param_groups"] for run in (whole, resumed))
    assert ours == theirs


@remembering
def test_state_dicts_hold_plain_numbers(rule):
    optimizer = job(rule)
    start = {"rule": repr(rule), "mean_square": 0.0, "weight": 0.0}
    assert states(optimizer) == [start, start]
    train(optimizer, 0, 3)
    first, second = states(optimizer)
    assert first["mean_square"] != second["mean_square"]  # a scalar a group
    for state in (first, second):
        assert [type(value) for value in state.values()] == [str, float, float]
        assert state["weight"] == pytest.approx(1 - 0.99**3)
    assert "zo_rule_state" not in optimizer.state_dict()["param_groups"][1]


@remembering
def test_loading_its_own_state_at_once(rule):
    """As accelerate does; also before the first step, and into the state of an earlier one."""
    plain, loads = job(rule), job(rule)
    early = copy.deepcopy(loads.state_dict())
    for step in range(3):
        train(plain, step, step + 1)
        loads.load_state_dict(loads.state_dict())
        train(loads, step, step + 1)
        assert_same(plain, loads)
    loads.load_state_dict(early)
    assert [state["weight"] for state in states(loads)] == [0.0, 0.0]


@remembering
@pytest.mark.parametrize("outside", [True, False])
def test_loading_in_inference_mode(rule, outside):
    plain, loads = job(rule), job(rule)
    train(plain, 0, 2)
    if outside:
        train(loads, 0, 1)
    with torch.inference_mode():
        loads.load_state_dict(plain.state_dict())
    for ours, theirs in zip(weights(plain), loads.param_groups, strict=True):
        theirs["params"][0].data.copy_(ours)
    train(plain, 2, 4)
    train(loads, 2, 4)
    assert_same(plain, loads)


@pytest.mark.parametrize(
    ("saved", "ours", "said"),
    [
        ("sgd", "normalized", r"zo_rule='sgd' \(here Normalized\(beta=0.99, eps=1e-08\)\).*anew"),
        ("normalized", "sgd", r"zo_rule=Normalized\(beta=0.99, eps=1e-08\) \(here 'sgd'\).*Hybrid"),
        ("normalized", "clip", r"zo_rule=Normalized\(.*here Clip\(.*begins its own anew"),
        ("clip", "sign", r"zo_rule=Clip\(.*here Sign\(\)\)"),
        ("sign", "sgd", r"zo_rule=Sign\(\) \(here 'sgd'\)"),
    ],
)
def test_the_state_of_another_rule(saved, ours, said):
    other, optimizer = job(saved), job(ours)
    train(other, 0, 2)
    with pytest.warns(UserWarning, match=said) as caught:
        optimizer.load_state_dict(other.state_dict())
    assert ("anew" in str(caught[0].message)) == (ours in ("normalized", "clip"))
    if ours in ("normalized", "clip"):
        assert [state["weight"] for state in states(optimizer)] == [0.0, 0.0]
    train(optimizer, 2, 3)


def test_other_options_of_the_same_rule_keep_its_state():
    other, optimizer = job(Normalized(beta=0.9)), job("normalized")
    train(other, 0, 2)
    with pytest.warns(UserWarning, match=r"zo_rule=Normalized\(beta=0.9, .*beta=0.99") as caught:
        optimizer.load_state_dict(other.state_dict())
    assert "anew" not in str(caught[0].message)
    ours, theirs = states(optimizer), states(other)
    assert [state.pop("rule") for state in ours] == [repr(Normalized())] * 2
    assert [state.pop("rule") for state in theirs] == [repr(Normalized(beta=0.9))] * 2
    assert ours == theirs


def without(state, *names):
    """As an earlier version saved it."""
    for group in state["param_groups"]:
        group.pop("zo_rule_state", None)
        for name in names:
            group.get("zo_settings", {}).pop(name, None)
    return state


def test_a_state_without_a_rule_is_of_sgd():
    old = job("sgd")
    train(old, 0, 2)
    state = without(copy.deepcopy(old.state_dict()), "zo_rule")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job("sgd").load_state_dict(copy.deepcopy(state))
    with pytest.warns(UserWarning, match=r"zo_rule='sgd' \(here Normalized.*begins its own anew"):
        job("normalized").load_state_dict(copy.deepcopy(state))
    for group in state["param_groups"]:
        group.pop("zo_settings", None)
    with pytest.warns(UserWarning, match=r"zo_rule='sgd' \(here Normalized.*begins its own anew"):
        job("normalized").load_state_dict(state)


def test_a_state_that_lacks_what_the_rule_remembers():
    optimizer = job("normalized")
    train(optimizer, 0, 2)
    state = without(copy.deepcopy(optimizer.state_dict()))
    with pytest.warns(UserWarning, match="state_dict is not complete: zo_rule found no running"):
        optimizer.load_state_dict(state)
    assert [state["weight"] for state in states(optimizer)] == [0.0, 0.0]


# ---- copies, groups ---------------------------------------------------------------------------


def saved_whole(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), saved_whole]


@every
@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("capturable", [False, True])
def test_copies_step_on_the_same_path(rule, copied, capturable):
    optimizer = job(rule, capturable=capturable)
    train(optimizer, 0, 2)
    optimizer.zero_grad()
    optimizer.backward(lambda: loss(optimizer, 2))
    twin = copied(optimizer)
    y, y_twin = (each.param_groups[1]["params"][0] for each in (optimizer, twin))
    y_twin.grad = y.grad.clone()  # copies of parameters have none
    for each in (optimizer, twin):
        each.step()
        train(each, 3, 5)
    assert_same(optimizer, twin)


@remembering
def test_a_new_group_begins_its_own(rule):
    optimizer = job(rule)
    train(optimizer, 0, 2)
    before = states(optimizer)
    w = Parameter(torch.ones(2), False)
    optimizer.add_param_group(dict(params=[w], mode="zo", lr=1e-2))
    assert [state["weight"] for state in states(optimizer)][2] == 0.0
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="no option"):
        optimizer.add_param_group(dict(params=[Parameter(torch.ones(1), False)], mode="zo", eps=1))
    assert states(optimizer)[:2] == before
    for step in (2, 3):
        optimizer.step(lambda step=step: loss_of_all(optimizer, step))
    assert [round(s["weight"] / 0.01) for s in states(optimizer)] == [4, 4, 2]
    left = optimizer.param_groups.pop()
    optimizer.add_param_group(dict(params=[w], mode="zo", lr=1e-2))
    assert states(optimizer)[2]["weight"] == 0.0
    optimizer.param_groups.pop()
    optimizer.add_param_group(left)  # a group goes with what it has
    assert round(states(optimizer)[2]["weight"] / 0.01) == 2


def loss_of_all(optimizer, step):
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return sum((p - step).square().sum() for p in parameters)


@remembering
def test_a_group_that_came_while_accumulating_waits(rule):
    optimizer = job(rule)
    optimizer.backward(lambda: loss(optimizer, 0))
    w = Parameter(torch.ones(2), False)
    optimizer.add_param_group(dict(params=[w], mode="zo", lr=1e-2))
    optimizer.step()
    assert [state["weight"] > 0 for state in states(optimizer)] == [True, True, False]
    assert torch.equal(w, torch.ones(2))


# ---- steps that do not come -------------------------------------------------------------------


@remembering
def test_an_estimate_leaves_it_and_the_update_changes_it(rule):
    optimizer = job(rule)
    train(optimizer, 0, 2)
    before = states(optimizer)
    for _ in range(2):
        optimizer.backward(lambda: loss(optimizer, 2))
    assert states(optimizer) == before
    optimizer.zero_grad()  # as where a GradScaler skips the step
    assert states(optimizer) == before
    optimizer.step(lambda: loss(optimizer, 2))
    assert all(a != b for a, b in zip(states(optimizer), before, strict=True))


@remembering
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_step_without_a_finite_slope_leaves_it(rule, bad):
    optimizer = job(rule)
    train(optimizer, 0, 2)
    before, kept = states(optimizer), weights(optimizer)
    optimizer.zero_grad()
    optimizer.step(lambda: loss(optimizer, 2, float(bad)))
    assert states(optimizer) == before
    assert all(map(same_bits, weights(optimizer), kept))
    assert optimizer.param_groups[0]["zo_step"] == 3


@remembering
@pytest.mark.parametrize("where", ["closure", "first order", "update", "nonfinite"])
def test_a_step_that_raises_leaves_it(rule, where, monkeypatch):
    nonfinite = "raise" if where == "nonfinite" else "skip"
    plain, optimizer = job(rule, nonfinite=nonfinite), job(rule, nonfinite=nonfinite)
    for each in (plain, optimizer):
        train(each, 0, 2)
    before = states(optimizer)

    def fail(*args, **options):
        raise MemoryError("injected")

    def closure():
        if where == "closure" and not torch.is_grad_enabled():
            fail()
        return loss(optimizer, 2, float("nan") if where == "nonfinite" else 1.0)

    optimizer.zero_grad()
    with monkeypatch.context() as patched:
        if where == "first order":
            patched.setattr(torch.optim.SGD, "step", fail)
        if where == "update":
            patched.setattr("zofo_optim.perturbation.base.update_", fail)
        with pytest.raises(FloatingPointError if where == "nonfinite" else MemoryError):
            optimizer.step(closure)
    assert states(optimizer) == before
    if where != "update":  # the first-order step was done by then
        optimizer.zero_grad()
        train(plain, 2, 4)
        train(optimizer, 2, 4)
        assert_same(plain, optimizer)


@pytest.mark.parametrize("rule", [ZScore(), CenteredRank()], ids=repr)
def test_too_few_samples_change_nothing(rule):
    """Where later steps have fewer of them than the settings say."""
    optimizer = job(rule)
    optimizer.backward(lambda: loss(optimizer, 0))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        if "zo_pending" in group:
            group["zo_pending"]["coefficients"] = [[1.0], [2.0]]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    frozen = [p for g in optimizer.param_groups if g["mode"] == "zo" for p in g["params"]]
    kept = [p.clone() for p in frozen]
    with pytest.warns(UserWarning, match="compares the samples of a step"):
        optimizer.step()
    assert all(map(same_bits, frozen, kept))


# ---- steps that a graph replays ---------------------------------------------------------------


@every
def test_capturable_takes_the_same_path(rule):
    plain, counted = job(rule), job(rule, capturable=True)
    train(plain, 0, 4)
    train(counted, 0, 4)
    assert all(map(same_bits, weights(plain), weights(counted)))


@remembering
def test_tensors_stay_the_same(rule):
    """A captured graph reads and writes these: in steps, and where a state dict is loaded."""
    optimizer = job(rule, capturable=True)
    train(optimizer, 0, 1)
    made = list_of_tensors(optimizer)
    assert len(made) == 4
    assert all(t.shape == () and t.dtype == torch.float64 for t in made)
    state = copy.deepcopy(optimizer.state_dict())
    train(optimizer, 1, 3)
    assert states(optimizer) != [g.get("zo_rule_state") for g in state["param_groups"][::2]]
    optimizer.load_state_dict(state)
    assert states(optimizer) == [g["zo_rule_state"] for g in state["param_groups"][::2]]
    assert all(a is b for a, b in zip(made, list_of_tensors(optimizer), strict=True))


def list_of_tensors(optimizer):
    groups = (group.get("zo_rule_state", {}) for group in optimizer.param_groups)
    return [t for state in groups for t in state.values() if isinstance(t, torch.Tensor)]


@remembering
def test_a_capture_needs_them_made(rule, monkeypatch):
    optimizer = job(rule, capturable=True)
    optimizer.backward(lambda: loss(optimizer, 0))
    monkeypatch.setattr(rule_states, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"run a few steps before capturing.*state of zo_rule"):
        optimizer.step()


@every
def test_a_step_reads_no_number(rule):
    """Neither of a rule nor of its state: on a GPU this would wait."""
    groups, rows = job(rule).zo_groups()[:1], [torch.tensor([1.0, -2.0, 0.0])]
    keep(groups, shaped(rule, groups, rows)[1])  # made in the first step

    class Refusing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            assert name not in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero")
            return func(*args, **(kwargs or {}))

    with Refusing():
        keep(groups, shaped(rule, groups, rows)[1])


@pytest.mark.gpu
@every
def test_replayed_steps_equal_eager_ones(rule):
    def gpu_job(**options):
        w = Parameter(torch.linspace(-1, 1, 5, device="cuda"), False)
        optimizer = HybridZOFO([w], mode="zo", lr=1e-2, num_samples=3, zo_rule=rule, **options)
        return optimizer, lambda: optimizer.step(lambda: (w**3).sum())

    (plain, eager), (captured, step) = gpu_job(), gpu_job(capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):
        graph.replay()
    for _ in range(3):
        eager()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            eager()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(weights(plain), weights(captured), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
