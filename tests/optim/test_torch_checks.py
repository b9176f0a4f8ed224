"""The checks that torch runs on each of its optimizers, on every arrangement of ours.

Written after ``TestOptimRenewed`` in torch's test suite; a check has the name that it has there.
Frozen parameters in first-order groups must stay as they are, as those without gradients do.
"""

import copy
import io
import pickle
import warnings
from typing import NamedTuple

import pytest
import torch
from conftest import each_of
from least_squares import SGD_FLAGS, SGD_INPUTS
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from zofo_optim import HybridZOFO

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    # what an arrangement leaves unused is said, here as elsewhere
    pytest.mark.filterwarnings("ignore:.*zeroth-order groups keep no state:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have requires_grad=True:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*first-order parameters have requires_grad=False:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:closure returned a loss without a graph:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning"),
]


class Arrangement(NamedTuple):
    """How parameters are trained."""

    first: str  # the mode of the first half of the parameters
    second: str
    perturbation: str = "in_place"
    frozen: bool = True  # the zeroth-order ones; the first-order ones where there are no others

    @property
    def learns(self):
        return "zo" in (self.first, self.second) or not self.frozen

    def params(self, params):
        """The same parameters, frozen as they should be."""
        params = list(params)
        half = (len(params) + 1) // 2
        for i, p in enumerate(params):
            mode = self.first if i < half else self.second
            p.requires_grad_(not self.frozen or (mode == "fo" and self.first == "zo"))
        return params

    def make(self, params, named=False, **options):
        """An optimizer: all options are for all groups, as for an optimizer of torch."""
        params = self.params(params)
        given = [(f"name{i}", p) for i, p in enumerate(params)] if named else params
        options = {"lr": 1e-3, "perturbation": self.perturbation, **options}
        if self.first == self.second:
            return HybridZOFO(given, mode=self.first, **options)
        half = (len(params) + 1) // 2
        groups = [
            {"params": given[:half], "mode": self.first},
            {"params": given[half:], "mode": self.second},
        ]
        return HybridZOFO(groups if half < len(params) else groups[:1], **options)


ARRANGEMENTS = {
    "first-order": Arrangement("fo", "fo", frozen=False),
    "first-order, frozen": Arrangement("fo", "fo"),
    "in place": Arrangement("zo", "zo", frozen=False),
    "in place, frozen": Arrangement("zo", "zo"),
    "streamed": Arrangement("zo", "zo", "streamed", frozen=False),
    "streamed, frozen": Arrangement("zo", "zo", "streamed"),
    "hybrid": Arrangement("zo", "fo", "streamed"),
}
name = each_of(ARRANGEMENTS)


@pytest.fixture
def arrangement(name):
    return ARRANGEMENTS[name]


def inputs():
    """Some options, one for all ways to loop; fresh, since schedulers write to tensor rates."""
    chosen = [{**SGD_INPUTS["tensor lr"], **SGD_FLAGS["foreach"]}]
    chosen.append({**SGD_INPUTS["nesterov"], **SGD_FLAGS["fused"]})
    chosen.append({**SGD_INPUTS["maximize"], **SGD_FLAGS["forloop"]})
    return copy.deepcopy(chosen)


def weight_and_bias(contiguous=True, shape=(3, 4)):
    """Few enough elements that zeroth order is stable at all rates below."""
    if contiguous:
        return [Parameter(torch.randn(shape)), Parameter(torch.randn(shape[0]))]
    both = Parameter(torch.randn(*shape, 2)[..., 0]), Parameter(torch.randn(shape[0], 2)[..., 0])
    assert not any(p.is_contiguous() for p in both)
    return list(both)


def closure_of(optimizer, loss):
    """In the style that torch documents."""

    def closure():
        optimizer.zero_grad()
        found = loss()
        if found.requires_grad:
            found.backward()
        return found

    return closure


def least_squares(optimizer, weight, bias, x):
    return closure_of(optimizer, lambda: (weight.mv(x) + bias).square().sum())


def conv_and_norm(arrangement):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
    x = torch.rand(1, 4, 6, 6)
    return model, lambda optimizer: closure_of(optimizer, lambda: model(x).square().sum())


def assert_equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# ---- construction -----------------------------------------------------------------------------


ERRORS = [
    (lambda a, b: a, {}, TypeError, "should be an iterable of Tensors or dicts"),
    (lambda a, b: [a, a], {}, UserWarning, "a parameter group with duplicate parameters"),
    (
        lambda a, b: [{"params": a}, {"params": a}],
        {},
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    (
        lambda a, b: None,
        {"lr": torch.tensor([0.001, 0.001])},
        ValueError,
        "Tensor lr must be 1-element",
    ),
    (lambda a, b: [("weight", a), b], {}, ValueError, "Some param names are missing"),
    (
        lambda a, b: [{"params": [a], "lr": 1e-2}, {"params": [("weight", b)]}],
        {},
        ValueError,
        "cannot add param group with names to the optimizer",
    ),
    (lambda a, b: None, {"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5"),
]


def test_errors(arrangement):
    for params, options, error, message in ERRORS:
        a, b = arrangement.params(Parameter(torch.randn(1, 1)) for _ in range(2))
        options = {"mode": arrangement.first, "perturbation": arrangement.perturbation, **options}
        expected = pytest.warns if issubclass(error, Warning) else pytest.raises
        with expected(error, match=message):
            HybridZOFO(params(a, b), **{"lr": 1e-3, **options})


def test_optimizer_can_be_printed(arrangement):
    for options in inputs():
        assert "lr" in repr(arrangement.make(weight_and_bias(), **options))


# ---- steps ------------------------------------------------------------------------------------


SCHEDULERS = {
    "none": [],
    "one": [lambda o: schedules.LinearLR(o, 0.4, 0.8, total_iters=4)],
    "two": [
        lambda o: schedules.StepLR(o, gamma=0.9, step_size=10),
        lambda o: schedules.ReduceLROnPlateau(o),
    ],
}


@pytest.mark.parametrize(
    ("contiguous", "schedule"), [(True, "none"), (False, "two")], ids=["contiguous", "strided"]
)
def test_forloop_goes_right_direction(arrangement, contiguous, schedule):
    for options in copy.deepcopy([*SGD_INPUTS.values()]):
        params, x = weight_and_bias(contiguous), torch.randn(4)
        optimizer = arrangement.make(params, foreach=False, **options)
        schedulers = [make(optimizer) for make in SCHEDULERS[schedule]]
        closure = least_squares(optimizer, *params, x)
        start = closure().item()
        for _ in range(6):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                plateau = isinstance(scheduler, schedules.ReduceLROnPlateau)
                scheduler.step(*[loss] * plateau)
        sign = -1 if options.get("maximize") else 1
        moved = sign * (start - closure().item())
        assert moved > 0 if arrangement.learns else moved == 0


@pytest.mark.parametrize("schedule", ["one", "two"])
def test_param_group_with_lrscheduler_goes_right_direction(arrangement, schedule):
    (weight, bias), x = arrangement.params(weight_and_bias()), torch.randn(4)
    groups = [
        {"params": [weight], "mode": arrangement.first},
        {"params": [bias], "mode": arrangement.second, "lr": 0.01},
    ]
    optimizer = HybridZOFO(groups, lr=1e-3, perturbation=arrangement.perturbation)
    schedulers = [make(optimizer) for make in SCHEDULERS[schedule]]
    closure = least_squares(optimizer, weight, bias, x)
    start = closure().item()
    for _ in range(6):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, schedules.ReduceLROnPlateau)
            scheduler.step(*[loss] * plateau)
    assert (closure().item() < start) == arrangement.learns


def test_tensor_lr(arrangement):
    for options in inputs():
        options.pop("lr", None)
        first, x = weight_and_bias(), torch.randn(4)
        second = copy.deepcopy(first)
        by_number = arrangement.make(first, lr=1e-3, **options)
        by_tensor = arrangement.make(second, lr=torch.tensor(1e-3), **options)
        for _ in range(3):
            by_number.step(least_squares(by_number, *first, x))
            by_tensor.step(least_squares(by_tensor, *second, x))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_complex(arrangement):
    a = Parameter(torch.randn(3, dtype=torch.complex64))
    (a,) = arrangement.params([a])
    if arrangement.first == "zo":
        with pytest.raises(TypeError, match="complex64"):
            arrangement.make([a])
        return
    optimizer = arrangement.make([a], lr=0.1)
    before = a.detach().clone()
    optimizer.step(closure_of(optimizer, lambda: a.abs().square().sum()))
    expected = before * 0.8 if arrangement.learns else before
    torch.testing.assert_close(a.detach(), expected)


def test_mixed_device_dtype(arrangement):
    params = [Parameter(torch.ones(4, dtype=d)) for d in (torch.float64, torch.bfloat16)]
    params += [Parameter(torch.ones(4)), Parameter(torch.ones(4, dtype=torch.float16))]
    optimizer = arrangement.make(params, lr=1e-2, mu=1e-2)
    loss = closure_of(optimizer, lambda: sum(p.double().square().sum() for p in params))
    before = [p.dtype for p in params]
    start = loss().item()
    for _ in range(10):
        optimizer.step(loss)
    assert (loss().item() < start) == arrangement.learns
    assert [p.dtype for p in params] == before


def test_empty_parameters(arrangement):
    params = [Parameter(torch.empty(0, 3)), *weight_and_bias(), Parameter(torch.empty(0))]
    optimizer = arrangement.make(params)
    x, before = torch.randn(4), copy.deepcopy(params)
    for _ in range(3):
        optimizer.step(least_squares(optimizer, *params[1:3], x))
    assert torch.equal(params[1], before[1]) != arrangement.learns
    assert [p.shape for p in params] == [p.shape for p in before]


def test_freezing_between_steps(arrangement):
    """A layer is frozen and freed again: the zeroth-order ones do not mind."""
    params, x = weight_and_bias(), torch.randn(4)
    optimizer = arrangement.make(params, momentum=0.9)
    closure = least_squares(optimizer, *params, x)
    for step in range(6):
        before = copy.deepcopy(params)
        if step == 2:
            params[1].requires_grad_(False)
        if step == 4:
            arrangement.params(params)
        optimizer.step(closure)
        moves = [mode == "zo" for mode in (arrangement.first, arrangement.second)]
        moves = [a or p.requires_grad for a, p in zip(moves, params, strict=True)]
        assert [not torch.equal(p, b) for p, b in zip(params, before, strict=True)] == moves


def test_set_default_dtype_works_with_foreach(arrangement):
    before = torch.get_default_dtype()
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            params = [Parameter(torch.randn(6, dtype=torch.float32)) for _ in range(2)]
            optimizer = arrangement.make(params, foreach=True, momentum=0.9)
            start = sum(p.square().sum() for p in params).item()
            for _ in range(3):
                closure = closure_of(optimizer, lambda p=params: sum(q.square().sum() for q in p))
                optimizer.step(closure)
            assert (sum(p.square().sum() for p in params) < start) == arrangement.learns
            assert [p.dtype for p in params] == [torch.float32] * 2
        finally:
            torch.set_default_dtype(before)


def test_step_is_noop_when_params_have_no_grad(arrangement):
    for options in inputs():
        if options.get("weight_decay") and arrangement.first == "zo":
            continue  # decays without a gradient
        params = [torch.ones(3, 2), torch.ones(4)]
        optimizer = arrangement.make(params, **options)
        for p in params:
            p.requires_grad_(False)
        optimizer.step(lambda: torch.tensor([1.0]))
        torch.testing.assert_close(params, [torch.ones(3, 2), torch.ones(4)], rtol=0, atol=5e-7)


@pytest.mark.parametrize("empty", [False, True])
def test_step_is_noop_for_zero_grads(arrangement, empty):
    for options in inputs():
        if options.get("weight_decay"):
            continue
        param = torch.randn((0, 5) if empty else (5, 1)).requires_grad_()
        before = param.detach().clone()
        optimizer = arrangement.make([param], **options)
        param.grad = torch.zeros_like(param)
        optimizer.step(lambda: torch.tensor([1.0]))
        torch.testing.assert_close(param.detach(), before, rtol=0, atol=5e-7)


def test_param_groups_lr(arrangement):
    """A rate of a group is for the group alone."""
    params, x = weight_and_bias(), torch.randn(4)
    arrangement.params(params)
    groups = [
        {"params": params[:1], "mode": arrangement.first, "lr": 0.0},
        {"params": params[1:], "mode": arrangement.second},
    ]
    optimizer = HybridZOFO(groups, lr=1e-2, perturbation=arrangement.perturbation)
    before = copy.deepcopy(params)
    for _ in range(3):
        optimizer.step(least_squares(optimizer, *params, x))
    torch.testing.assert_close(params[0], before[0], rtol=0, atol=2e-6)  # moves round
    assert torch.equal(params[1], before[1]) != arrangement.learns


def test_param_groups_weight_decay(arrangement):
    params, x = weight_and_bias(), torch.zeros(4)
    arrangement.params(params)
    groups = [
        {"params": params[:1], "mode": arrangement.first, "weight_decay": 0.1},
        {"params": params[1:], "mode": arrangement.second},
    ]
    optimizer = HybridZOFO(groups, lr=1e-2, perturbation=arrangement.perturbation)
    weight = params[0].detach().clone()
    optimizer.step(least_squares(optimizer, params[0], torch.zeros(3), x))
    decayed = weight * (1 - 1e-2 * 0.1) if arrangement.learns else weight
    torch.testing.assert_close(params[0].detach(), decayed, rtol=0, atol=1e-6)


def test_returns_consistent_types(arrangement):
    params = [torch.randn(10, 5), torch.randn(10)]
    optimizer = arrangement.make(params)
    returned = [optimizer.step(lambda: torch.tensor([10.0])) for _ in range(2)]
    assert [type(loss) for loss in returned] == [torch.Tensor] * 2
    assert [loss.item() for loss in returned] == [10.0, 10.0]


# ---- state dicts ------------------------------------------------------------------------------


def without_names(state):
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


@pytest.mark.parametrize("named", [(0, 0), (0, 1), (1, 0)], ids=str)
def test_state_dict_deterministic(arrangement, named):
    for options in inputs():
        params, x = weight_and_bias(), torch.randn(4)
        optimizer = arrangement.make(params, named[0], **options)
        for _ in range(3):
            optimizer.step(least_squares(optimizer, *params, x))
        twins = copy.deepcopy(params)
        resumed = arrangement.make(twins, named[1], **copy.deepcopy(options))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(3):
            optimizer.step(least_squares(optimizer, *params, x))
            resumed.step(least_squares(resumed, *twins, x))
            assert_equal(params, twins)
        ours, theirs = (without_names(o.state_dict()) for o in (optimizer, resumed))
        assert_equal(ours["state"], theirs["state"])
        assert ours["param_groups"] == theirs["param_groups"]
        resumed.param_groups.extend(resumed.param_groups)
        repeated = without_names(resumed.state_dict())["param_groups"]
        assert repeated[-1] == ours["param_groups"][-1]


def test_can_load_older_state_dict(arrangement):
    newer = ("foreach", "differentiable", "fused", "maximize", "capturable")
    for options in inputs():
        model, closure = conv_and_norm(arrangement)
        optimizer = arrangement.make(model.parameters(), **options)
        for _ in range(2):
            optimizer.step(closure(optimizer))
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            for flag in newer:
                group.pop(flag, None)
        optimizer.load_state_dict(older)
        before = copy.deepcopy(list(model.parameters()))
        optimizer.step(closure(optimizer))
        moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
        assert any(moved) == arrangement.learns


@pytest.mark.parametrize("named", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_can_load_from_to_named_state_dict(arrangement, named):
    model, closure = conv_and_norm(arrangement)
    params = list(model.parameters())
    optimizer = arrangement.make(params, named[0])
    for _ in range(2):
        optimizer.step(closure(optimizer))
    second = arrangement.make(params, named[1])
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.step(closure(second))
    names = [n for g in second.state_dict()["param_groups"] for n in g["param_names"]]
    assert names == ["name0", "name1", "name2", "name3"]


@pytest.mark.parametrize("named", [False, True])
def test_save_load_equality_with_weights_only(arrangement, named):
    for options in inputs():
        params, x = weight_and_bias(), torch.randn(4)
        optimizer = arrangement.make(params, named, **options)
        for _ in range(3):
            optimizer.step(least_squares(optimizer, *params, x))
        saved = optimizer.state_dict()
        for weights_only in (False, True):
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=weights_only)
            assert_equal(loaded["state"], saved["state"])
            assert loaded["param_groups"] == saved["param_groups"]


def test_load_nontensor_step(arrangement):
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    optimizer = arrangement.make(params, fo_optimizer=torch.optim.Adam)
    closure = closure_of(optimizer, lambda: sum(p.square().sum() for p in params))
    for _ in range(3):
        optimizer.step(closure)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
    optimizer.load_state_dict(state)
    optimizer.step(closure)
    assert all(entry["step"] == 4 for entry in optimizer.state.values())
    assert bool(optimizer.state) == any(p.requires_grad for p in params if p.grad is not None)


def test_non_empty_state(arrangement):
    """State that is not of a parameter, and state under other names, is kept."""
    model = nn.Linear(5, 5)
    optimizer = arrangement.make(model.parameters())
    optimizer.state["test"] = 1
    optimizer.state[model.weight]["note"] = torch.ones(5, 5)
    twin = nn.Linear(5, 5)
    resumed = arrangement.make(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state["test"] == 1
    assert_equal(resumed.state[twin.weight]["note"], torch.ones(5, 5))


# ---- hooks ------------------------------------------------------------------------------------


def _before_saving(optimizer):
    optimizer.state["test"] = 1


def _after_saving(optimizer, state):
    state["ran_before"] = state["state"].pop("test", None) == 1
    return state


def _set_in_place(optimizer, state):
    state["param_groups"][0]["lr"] = 0.002


def _set_in_a_copy(optimizer, state):
    state = copy.deepcopy(state)
    state["param_groups"][0]["lr"] = 0.003
    return state


def _after_loading(optimizer):
    optimizer.state["seen"] = optimizer.param_groups[0]["lr"]


def test_state_dict_hooks(arrangement):
    for options in inputs():
        optimizer = arrangement.make(weight_and_bias(), **options)
        optimizer.register_state_dict_post_hook(_after_saving)
        assert not optimizer.state_dict()["ran_before"]
        optimizer.register_state_dict_pre_hook(_before_saving)
        state = optimizer.state_dict()
        assert state["ran_before"]
        assert "test" not in state["state"]


def test_load_state_dict_hooks(arrangement):
    for options in inputs():
        optimizer = arrangement.make(weight_and_bias(), **options)
        optimizer.register_load_state_dict_post_hook(_after_loading)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["seen"] == optimizer.param_groups[0]["lr"]
        optimizer.register_load_state_dict_pre_hook(_set_in_place)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["seen"] == optimizer.param_groups[0]["lr"] == 0.002
        first = optimizer.register_load_state_dict_pre_hook(_set_in_a_copy, prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["seen"] == 0.002
        first.remove()
        optimizer.register_load_state_dict_pre_hook(_set_in_a_copy)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["seen"] == 0.003


def test_step_all_hooks(arrangement):
    for options in inputs():
        params, calls = [torch.tensor([1.0, 1.0])], []
        ours, theirs = arrangement.make(params, **options), torch.optim.SGD(params)

        def note(number, calls=calls):
            return lambda optimizer, args, kwargs: calls.append(number)

        handles = [
            register_optimizer_step_pre_hook(note(0)),
            register_optimizer_step_post_hook(note(5)),
        ]
        try:
            for optimizer in (ours, theirs):
                handles.append(optimizer.register_step_pre_hook(note(1)))
                handles.append(optimizer.register_step_post_hook(note(2)))
            for optimizer in (ours, theirs, ours):
                optimizer.step(lambda: 1)
            assert calls == [0, 1, 2, 5] * 3
        finally:
            for handle in handles:
                handle.remove()
        ours.step(lambda: 1)
        assert len(calls) == 12


# ---- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_deepcopy_copies_all_public_attrs(arrangement, copied):
    def public(thing):
        return {k for k in vars(thing) if not k.startswith("_")}

    for options in inputs():
        params, x = weight_and_bias(), torch.randn(4)
        optimizer = arrangement.make(params, **options)
        for _ in range(2):
            optimizer.step(least_squares(optimizer, *params, x))
        twins, twin = copied((params, optimizer))
        assert public(twin) == public(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(least_squares(optimizer, *params, x))
            twin.step(least_squares(twin, *twins, x))
        assert_equal(params, twins)
        assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
