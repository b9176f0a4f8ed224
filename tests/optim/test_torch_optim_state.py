"""Saving, loading and copying, as torch tests them, in every mode."""

import copy
import functools
import io
import math
import pickle
import warnings

import pytest
import torch
from conftest import each_of
from frozen_base import MODES, Model, equal, make, train
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules

from zofo_optim import HybridZOFO

mode = each_of(MODES)


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "tensor lr": {"lr": torch.tensor(1e-3)},
    "one-sided": {"estimator": "one_sided", "num_samples": 2, "distribution": "rademacher"},
    "Adam": {"fo_optimizer": torch.optim.Adam, "betas": (0.8, 0.9)},
    "Adagrad": {"fo_optimizer": torch.optim.Adagrad, "initial_accumulator_value": 0.5},
    "partial": {"fo_optimizer": functools.partial(torch.optim.RMSprop, alpha=0.5)},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request):
    return copy.deepcopy(request.param)


def assert_same(left, right):
    """Exact equality of nested state."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def through_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


# ---- state_dict -------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [(False, False), (True, True), (True, False), (False, True)])
def test_state_dict_is_deterministic_and_continues(mode, options, named):
    model, twin = Model(), Model()
    optimizer = make(model, mode, named[0], **options)
    train(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    resumed = make(twin, mode, named[1], **copy.deepcopy(options))
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    resumed.load_state_dict(given)
    assert_same(given, saved)  # loading changes nothing in what it was given
    for _ in range(3):
        assert equal(train(model, optimizer, 1), train(twin, resumed, 1))
    ours, theirs = packed(optimizer), packed(resumed)
    assert [bool(names) for names, _ in (ours, theirs)] == [named[0], any(named)]
    assert_same(ours[1], theirs[1])
    # repeated parameters have the same representation
    resumed.param_groups.extend(resumed.param_groups)
    assert_same(packed(resumed)[1]["param_groups"][-1], ours[1]["param_groups"][-1])


def packed(optimizer):
    """The names in a state dict, and the state dict without them."""
    state = optimizer.state_dict()
    names = [group.pop("param_names") for group in state["param_groups"] if "param_names" in group]
    return names, state


def test_without_the_state_dict_the_path_is_another_one(mode):
    """So that the tests above can fail."""
    model, twin = Model(), Model()
    optimizer = make(model, mode, momentum=0.9)
    train(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    fresh = make(twin, mode, momentum=0.9)
    assert not equal(train(model, optimizer, 2), train(twin, fresh, 2))


def test_state_dict_holds_plain_values_only(mode, options):
    """Seed and step are Python ints in the groups: tensors in the state would be cast."""
    model = Model()
    optimizer = make(model, mode, seed=(1 << 64) - 1, **options)
    train(model, optimizer, 2)
    state = through_file(optimizer.state_dict(), weights_only=True)
    assert_same(state, optimizer.state_dict())
    for group in state["param_groups"]:
        assert type(group["seed"]) is int
        assert group["seed"] == (1 << 64) - 1
        assert group["mode"] in ("zo", "fo")
        assert group["zo_step"] == (2 if group["mode"] == "zo" else 0)


def test_zo_groups_have_no_state():
    model = Model()
    optimizer = make(model, "zo", momentum=0.9)
    train(model, optimizer, 3)
    assert optimizer.state_dict()["state"] == {}
    hybrid = make(Model(), "hybrid", momentum=0.9)
    hybrid.step(lambda: sum(p.sum() for g in hybrid.param_groups for p in g["params"]))
    assert list(hybrid.state_dict()["state"]) == [2]


def test_weights_only_checkpoint_resumes_bit_for_bit(mode, options):
    model = Model()
    optimizer = make(model, mode, **options)
    scheduler = schedules.StepLR(optimizer, 2, gamma=0.5)

    def run(model, optimizer, scheduler):
        for _ in range(3):
            train(model, optimizer, 1)
            scheduler.step()
        return [p.detach().clone() for p in model.parameters()]

    run(model, optimizer, scheduler)
    parts = (model, optimizer, scheduler)
    saved = through_file([part.state_dict() for part in parts], weights_only=True)
    expected = run(*parts)
    model = Model()
    optimizer = make(model, mode, **{**copy.deepcopy(options), "seed": 99})
    scheduler = schedules.StepLR(optimizer, 2, gamma=0.5)
    parts = (model, optimizer, scheduler)
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    assert equal(run(*parts), expected)


def test_loading_casts_state_but_not_the_path(mode):
    """Into a model of another dtype: buffers are cast, directions stay the same."""
    model = Model()
    optimizer = make(model, mode, momentum=0.9, seed=(1 << 60) + 1)
    train(model, optimizer, 3)
    for dtype in (torch.float64, torch.bfloat16):
        other = Model(dtype)
        other.load_state_dict(model.state_dict())
        resumed = make(other, mode, momentum=0.9)
        resumed.load_state_dict(optimizer.state_dict())
        for group in resumed.param_groups:
            assert group["seed"] == (1 << 60) + 1
            assert group["zo_step"] == (3 if group["mode"] == "zo" else 0)
        for parameter, state in resumed.state.items():
            assert state["momentum_buffer"].dtype == parameter.dtype == dtype
        if dtype == torch.float64:
            twin, same = copy.deepcopy((model, optimizer))
            expected, got = train(twin, same, 1), train(other, resumed, 1)
            got = [p.float() for p in got]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "missing", ["maximize", "foreach", "differentiable", "fused", "nesterov", "mu", "weight_decay"]
)
def test_older_state_dicts_load(mode, missing):
    model = Model()
    optimizer = make(model, mode)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group[missing]
    optimizer.load_state_dict(state)
    assert all(missing in group for group in optimizer.param_groups)
    before = [p.detach().clone() for p in model.parameters()]
    assert not equal(train(model, optimizer, 1), before)


def test_steps_that_are_no_tensors_load(mode):
    model, twin = Model(), Model()
    options = {"fo_optimizer": torch.optim.Adam}
    optimizer = make(model, mode, **options)
    train(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
    assert bool(state["state"]) == (mode != "zo")
    resumed = make(twin, mode, **options)
    resumed.load_state_dict(state)
    assert equal(train(model, optimizer, 2), train(twin, resumed, 2))


def test_load_names_into_unnamed_and_back(mode):
    named, unnamed = (make(Model(), mode, named=n) for n in (True, False))
    names = [g["param_names"] for g in named.state_dict()["param_groups"]]
    assert [n for group in names for n in group] == ["base", "scale", "adapter"]
    unnamed.load_state_dict(named.state_dict())
    assert [g["param_names"] for g in unnamed.param_groups] == names
    plain = make(Model(), mode).state_dict()
    assert all("param_names" not in group for group in plain["param_groups"])
    named.load_state_dict(plain)
    assert [g["param_names"] for g in named.param_groups] == names
    other = copy.deepcopy(plain)
    for group in other["param_groups"]:
        group["param_names"] = [f"other.{i}" for i in group["params"]]
    named.load_state_dict(other)
    assert named.param_groups[0]["param_names"][0] == "other.0"


def test_state_dicts_that_do_not_fit_change_nothing(mode):
    model = Model()
    optimizer = make(model, mode, lr=0.125)
    train(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    state["param_groups"][0]["params"] = [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(state)
    state["param_groups"] *= 3
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
    state = copy.deepcopy(before)
    for group in state["param_groups"]:
        group["mode"] = "fo" if group["mode"] == "zo" else "zo"
        group["lr"] = 99.0
    with pytest.raises(ValueError, match=r"must have the same modes, got mode='\w\w' for param"):
        optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict(), before)
    train(model, optimizer, 1)


def test_a_state_dict_of_sgd_loads_into_first_order():
    model, twin, sgd_options = Model(), Model(), {"lr": 0.02, "momentum": 0.9}
    sgd = torch.optim.SGD(twin.requires_grad_(True).parameters(), **sgd_options)
    for _ in range(3):
        sgd.zero_grad()
        twin().backward()
        sgd.step()
    model.load_state_dict(twin.state_dict())
    optimizer = make(model, "fo")
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))  # torch shares the tensors
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["mode"]) == (0.02, 0.9, "fo")
    for _ in range(3):
        train(model, optimizer, 1)
        sgd.zero_grad()
        twin().backward()
        sgd.step()
    assert equal(model.parameters(), twin.parameters())
    # and back
    again = torch.optim.SGD(twin.parameters(), **sgd_options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)
    again.zero_grad()
    twin().backward()
    again.step()
    assert equal(model.parameters(), twin.parameters())


def test_a_state_dict_of_sgd_does_not_load_into_zeroth_order():
    sgd = torch.optim.SGD(Model().parameters())
    for mode, match in (("zo", "mode='fo' for parameter group 0"), ("hybrid", "different number")):
        with pytest.raises(ValueError, match=match):
            make(Model(), mode).load_state_dict(sgd.state_dict())


def test_a_state_dict_of_sgd_leaves_first_order_groups_first_order():
    """Also where the default of the optimizer is mode="zo"."""
    model, twin = Model(), Model()
    model.requires_grad_(True)
    optimizer = HybridZOFO([{"params": list(model.parameters()), "mode": "fo"}], mode="zo")
    optimizer.load_state_dict(torch.optim.SGD(twin.parameters(), lr=1e-2).state_dict())
    assert optimizer.param_groups[0]["mode"] == "fo"
    sgd = torch.optim.SGD(twin.requires_grad_(True).parameters(), lr=1e-2)
    twin().backward()
    sgd.step()
    assert equal(train(model, optimizer, 1), twin.parameters())


def test_load_state_dict_keeps_what_is_not_in_it(mode):
    """Buffers that the new parameters do not have, lr tensors, further keys."""
    model = Model()
    optimizer = make(model, mode, lr=torch.tensor(0.25))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["note"] = "kept"
    state["param_groups"][0]["lr"] = torch.tensor(0.5)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["note"] == "kept"
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["lr"].fill_(1e-3)
    assert state["param_groups"][0]["lr"] == 0.5


def test_loading_its_own_state_at_once_changes_nothing(mode, options):
    """Some launchers do this when they wrap an optimizer."""
    model, twin = Model(), Model()
    optimizer, plain = make(model, mode, **options), make(twin, mode, **copy.deepcopy(options))
    optimizer.load_state_dict(optimizer.state_dict())
    assert equal(train(model, optimizer, 3), train(twin, plain, 3))


# ---- copies -----------------------------------------------------------------------------------


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: through_file(pair, weights_only=False),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_continue_on_the_same_path(mode, options, how):
    model = Model()
    optimizer = make(model, mode, seed=5, **options)
    train(model, optimizer, 3)
    twin, copied = COPIES[how]((model, optimizer))
    assert copied is not optimizer
    assert copied.param_groups[0]["params"][0] is twin.base
    assert_same(copied.state_dict(), optimizer.state_dict())
    assert equal(train(model, optimizer, 3), train(twin, copied, 3))
    assert_same(copied.state_dict(), optimizer.state_dict())
    copied.add_param_group({"params": [Parameter(torch.ones(2))], "mode": "zo", "lr": 1e-3})
    train(twin, copied, 1)


@pytest.mark.parametrize("how", COPIES)
def test_copies_between_backward_and_step(mode, how):
    model = Model()
    optimizer = make(model, mode, num_samples=2)
    optimizer.backward(model)
    twin, copied = COPIES[how]((model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.grad is not None and q.grad is None:
            q.grad = p.grad.clone()  # pickling a parameter leaves its gradient behind
    before = [p.detach().clone() for p in twin.parameters()]
    optimizer.step()
    copied.step()
    assert equal(model.parameters(), twin.parameters())
    assert not equal(twin.parameters(), before)


def test_deepcopy_copies_all_public_attributes(mode, options):
    model = Model()
    optimizer = make(model, mode, **options)
    train(model, optimizer, 2)
    copied = copy.deepcopy(optimizer)
    public = {k for k in vars(optimizer) if not k.startswith("_")}
    assert public == {k for k in vars(copied) if not k.startswith("_")}
    assert public >= {"defaults", "state", "param_groups"}
    assert_same(dict(copied.defaults), dict(optimizer.defaults))
    assert copied.skipped_steps == optimizer.skipped_steps
    assert type(copied) is HybridZOFO


def test_a_copy_is_independent(mode):
    model = Model()
    optimizer = make(model, mode, momentum=0.9)
    train(model, optimizer, 2)
    before, state = [p.detach().clone() for p in model.parameters()], optimizer.state_dict()
    state = copy.deepcopy(state)
    twin, copied = copy.deepcopy((model, optimizer))
    copied.param_groups[0]["lr"] = 0.5
    train(twin, copied, 3)
    assert equal(model.parameters(), before)
    assert_same(optimizer.state_dict(), state)


def test_a_copy_goes_on_counting_and_warns_no_second_time():
    p = Parameter(torch.ones(2))
    optimizer = HybridZOFO([p], mode="zo", lr=1e-3)
    for _ in range(2):
        optimizer.step(lambda: p.sum() * math.nan)
    copied = copy.deepcopy(optimizer)
    copied.step(lambda: math.inf)
    assert (optimizer.skipped_steps, copied.skipped_steps) == (2, 3)
    for _ in range(4):
        optimizer.step(lambda: 1.0)
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        with pytest.warns(UserWarning, match="bit-identical"):
            one.step(lambda: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(optimizer).step(lambda: 1.0)


def test_non_empty_state():
    """State that the caller puts in is saved and restored, whatever its mode."""
    for mode in MODES:
        model = Model()
        optimizer = make(model, mode)
        optimizer.state[model.base]["note"] = torch.ones(3, 4)
        state = through_file(optimizer.state_dict(), weights_only=True)
        fresh = Model()
        resumed = make(fresh, mode)
        resumed.load_state_dict(state)
        assert torch.equal(resumed.state[fresh.base]["note"], torch.ones(3, 4))
