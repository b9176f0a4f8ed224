"""Options of a group: those that its mode has, given or left to defaults; all else is refused."""

import copy
import functools
import inspect
import warnings

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Rprop
from torch.optim import lr_scheduler as schedules
from toys import told

from zofo_optim import HybridZOFO, hybrid_param_groups


def weight():
    return Parameter(torch.ones(2, 2))


def built(mode, options, **more):
    """The group as the optimizer has it, with options of its own."""
    optimizer = HybridZOFO([{"params": [weight()], "mode": mode, **options}], **more)
    return optimizer.param_groups[0]


REFUSED = [
    ("zo", {"mue": 1e-2}, SGD),
    ("zo", {"eps": 1e-2}, SGD),
    ("zo", {"betas": (0.9, 0.9)}, AdamW),  # the other groups have it
    ("zo", {"momentum": 0.9}, SGD),
    ("zo", {"foreach": True}, SGD),
    ("zo", {"learning_rate": 1e-3}, SGD),
    ("fo", {"learning_rate": 1e-3}, SGD),
    ("fo", {"mu": 1e-2}, SGD),
    ("fo", {"seed": 3}, SGD),
    ("fo", {"momentum": 0.9}, AdamW),
    ("fo", {"nesterov": True}, AdamW),
    ("fo", {"betas": (0.9, 0.9)}, SGD),
    ("fo", {"weight_decay": 0.1}, Rprop),
]


@pytest.mark.parametrize(("mode", "options", "cls"), REFUSED, ids=repr)
def test_options_that_a_group_does_not_have(mode, options, cls):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=rf"{name}.* mode='{mode}'"):
        built(mode, {"lr": 1e-3, **options}, fo_optimizer=cls)
    first = weight()
    optimizer = HybridZOFO([first], lr=1e-3, fo_optimizer=cls)
    second = {"params": [weight()], "mode": mode, "lr": 1e-3, **options}
    with pytest.raises((TypeError, ValueError), match=name):
        optimizer.add_param_group(second)
    assert [group["params"] for group in optimizer.param_groups] == [[first]]


def test_the_error_names_what_there_is():
    with pytest.raises(
        TypeError, match=r"'eps' .*got 0\.01; there are lr, mu, unit, weight_decay, max"
    ):
        built("zo", {"lr": 1e-3, "eps": 0.01})
    match = "'momentum' .* mode='fo' and fo_optimizer=AdamW, got 0.9; there are lr, betas"
    with pytest.raises(TypeError, match=match):
        built("fo", {"momentum": 0.9}, fo_optimizer=AdamW)


def test_momentum_that_is_the_default_of_the_other_groups():
    with pytest.raises(ValueError, match=r"momentum must not be set in a group with mode='zo'"):
        built("zo", {"lr": 1e-3, "momentum": 0.9}, momentum=0.9)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_momentum_of_an_optimizer_without_first_order_groups_warns_once(options):
    x, y = weight(), weight()
    optimizer = HybridZOFO([x], lr=1e-3, mode="zo", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step(lambda: x.sum())
    (message,) = told(caught)
    assert all(name in message for name in options)
    optimizer = HybridZOFO([x], lr=1e-3, mode="zo", **options)
    optimizer.add_param_group({"params": [y], "mode": "fo"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x.requires_grad_(False)
        optimizer.step(lambda: (x * y).sum())


@pytest.mark.parametrize(
    ("mode", "options", "cls"),
    [
        ("zo", {"mu": 1e-2, "weight_decay": 0.1, "maximize": True, "seed": 3}, SGD),
        ("zo", {"momentum": 0, "nesterov": False}, SGD),
        ("zo", {"name": "base", "lr_scale": 0.5}, SGD),
        ("fo", {"momentum": 0.9, "foreach": False}, SGD),
        ("fo", {"momentum": 0, "weight_decay": 0.1, "betas": (0.8, 0.9)}, AdamW),
        ("fo", {"weight_decay": 0.0}, Rprop),
        ("fo", {"initial_lr": 0.5}, SGD),
    ],
    ids=repr,
)
def test_options_that_a_group_has(mode, options, cls):
    group = built(mode, {"lr": 1e-3, **options}, fo_optimizer=cls)
    assert {name: group[name] for name in options} == options


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_groups_of_an_optimizer_build_another(cls):
    """torch's idiom: ``type(optimizer)(optimizer.param_groups)``; also with a group more."""
    x, y = weight(), weight()
    groups = [{"params": [x], "mode": "zo", "lr": 1e-3}, {"params": [y]}]
    optimizer = HybridZOFO(groups, fo_optimizer=cls)
    schedules.OneCycleLR(optimizer, 1e-2, total_steps=10)  # puts further keys into groups
    copied = [dict(group) for group in optimizer.param_groups]
    assert HybridZOFO(copied, fo_optimizer=cls).param_groups == optimizer.param_groups
    for group in list(optimizer.param_groups):
        optimizer.add_param_group({**group, "params": [weight()]})
    optimizer.step(lambda: (x * y).sum())


# ---- the learning rate of zeroth-order groups ---------------------------------------------------


def test_zeroth_order_groups_are_given_a_rate():
    match = r"lr must be given for a group with mode='zo'"
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    for params, options in (
        ([weight()], {"mode": "zo"}),
        ([{"params": [weight()], "mode": "zo"}], {}),
        (hybrid_param_groups(frozen, zo={"mu": 1e-2}, verbose=False), {}),
        ([weight()], {"mode": "zo", "fo_optimizer": functools.partial(SGD, lr=0.1)}),
    ):
        with pytest.raises(ValueError, match=match):
            HybridZOFO(params, **options)
    optimizer = HybridZOFO([weight()])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [weight()], "mode": "zo"})
    assert len(optimizer.param_groups) == 1
    copied = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=match):
        copied.add_param_group({"params": [weight()], "mode": "zo"})


@pytest.mark.parametrize("rate", [1e-3, 0, torch.tensor(1e-3)])
def test_a_rate_for_all_groups_serves(rate):
    """Also one that equals the default of first-order groups."""
    assert HybridZOFO([weight()], lr=rate, mode="zo").param_groups[0]["lr"] == rate
    optimizer = HybridZOFO([{"params": [weight()], "mode": "zo"}], rate)
    assert optimizer.param_groups[0]["lr"] == rate
    optimizer.add_param_group({"params": [weight()], "mode": "zo"})


def test_first_order_groups_keep_the_default_rate():
    groups = [{"params": [weight()], "mode": "zo", "lr": 1e-6}, {"params": [weight()]}]
    optimizer = HybridZOFO(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-6, 1e-3]
    assert optimizer.defaults["lr"] == 1e-3


# ---- options that equal a default are given all the same ----------------------------------------


class Heavy(SGD):
    """Defaults that differ from ours in every option that we share."""

    def __init__(
        self,
        params,
        lr=0.5,
        momentum=0.95,
        dampening=0.0,
        weight_decay=0.25,
        nesterov=True,
        *,
        maximize=True,
    ):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)


BOUND = functools.partial(
    SGD, lr=0.5, momentum=0.95, weight_decay=0.25, nesterov=True, maximize=True
)
OURS = {
    "lr": 1e-3,
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "maximize": False,
}


@pytest.mark.parametrize("factory", [Heavy, BOUND], ids=["class", "partial"])
def test_options_that_equal_our_defaults_hold_where_they_are_given(factory):
    group = HybridZOFO([weight()], **OURS, fo_optimizer=factory).param_groups[0]
    assert {name: group[name] for name in OURS} == OURS
    for name in ("lr", "weight_decay", "maximize"):
        group = HybridZOFO([weight()], **{name: OURS[name]}, fo_optimizer=factory).param_groups[0]
        assert group[name] == OURS[name]
        assert group["momentum"] == 0.95


def test_options_that_are_not_given_are_the_class_s_or_the_partial_s_own():
    group = HybridZOFO([weight()], fo_optimizer=BOUND).param_groups[0]
    assert {name: group[name] for name in BOUND.keywords} == BOUND.keywords
    group = HybridZOFO([weight()], fo_optimizer=Heavy).param_groups[0]
    assert {name: group[name] for name in ("momentum", "nesterov")} == {
        "momentum": 0.95,
        "nesterov": True,
    }
    assert (group["lr"], group["weight_decay"], group["maximize"]) == (1e-3, 0, False)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_without_momentum_has_none():
    ours, theirs = weight(), weight()
    optimizer = HybridZOFO(
        [ours], lr=0.1, momentum=0, nesterov=False, fo_optimizer=torch.optim.Muon
    )
    twin = torch.optim.Muon([theirs], lr=0.1, momentum=0, nesterov=False, weight_decay=0)
    factors = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(lambda step=step: (ours * factors.roll(step)).sum())
        twin.zero_grad()
        (theirs * factors.roll(step)).sum().backward()
        twin.step()
    assert torch.equal(ours, theirs)
    assert HybridZOFO([weight()], fo_optimizer=torch.optim.Muon).param_groups[0]["momentum"] == 0.95


def test_capturable_that_is_given_holds():
    factory = functools.partial(Adam, capturable=True)
    for options, expected in (({}, True), ({"capturable": False}, False)):
        optimizer = HybridZOFO([weight()], fo_optimizer=factory, **options)
        assert optimizer.param_groups[0]["capturable"] is expected


def test_the_signature_shows_the_defaults():
    parameters = inspect.signature(HybridZOFO).parameters
    assert {name: str(parameters[name].default) for name in OURS} == {
        name: str(value) for name, value in OURS.items()
    }
