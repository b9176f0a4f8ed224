"""What torch tests of construction, in every mode: options, groups, errors."""

import copy
import warnings

import pytest
import torch
from conftest import each_of
from least_squares import MODES, Problem, make
from torch.nn import Parameter

from zofo_optim import HybridZOFO

pytestmark = pytest.mark.usefixtures("seeded")
mode = each_of(MODES)


def named_and_unnamed_groups(a, b):
    return [{"params": [a], "lr": 1e-2}, {"params": [("weight", b)]}]


CONSTRUCTION_ERRORS = {
    "no iterable": (
        lambda a, b: (a, {}),
        TypeError,
        "params argument given to the optimizer should be an iterable of Tensors or dicts",
    ),
    "empty": (lambda a, b: ([], {}), ValueError, "optimizer got an empty parameter list"),
    "not a tensor": (lambda a, b: ([1.0], {}), TypeError, "optimizer can only optimize Tensors"),
    "a set": (
        lambda a, b: ([{"params": {a}}], {}),
        TypeError,
        "optimizer parameters need to be organized in ordered collections",
    ),
    "no leaf": (lambda a, b: ([a * 2], {}), ValueError, "can't optimize a non-leaf Tensor"),
    "in two groups": (
        lambda a, b: ([{"params": a}, {"params": a}], {}),
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    "tensor lr": (
        lambda a, b: (None, {"lr": torch.tensor([0.001, 0.001])}),
        ValueError,
        "Tensor lr must be 1-element",
    ),
    "some names missing": (
        lambda a, b: ([("weight", a), b], {}),
        ValueError,
        "all optimizer params should be with/without names. Some param names are missing",
    ),
    "some groups named": (
        lambda a, b: (named_and_unnamed_groups(a, b), {}),
        ValueError,
        "all optimizer param groups should be with/without names. "
        "cannot add param group with names to the optimizer",
    ),
    "momentum": (
        lambda a, b: (None, {"lr": 1e-2, "momentum": -0.5}),
        ValueError,
        "Invalid momentum value: -0.5",
    ),
    "lr": (lambda a, b: (None, {"lr": -0.1}), ValueError, "Invalid learning rate: -0.1"),
    "weight_decay": (
        lambda a, b: (None, {"weight_decay": -0.1}),
        ValueError,
        "Invalid weight_decay value: -0.1",
    ),
    "nesterov": (
        lambda a, b: (None, {"nesterov": True}),
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
    ),
}


@pytest.mark.parametrize("mode", ["fo", "zo"])
@pytest.mark.parametrize("case", CONSTRUCTION_ERRORS)
def test_construction_errors_are_those_of_torch(case, mode):
    make_input, error, message = CONSTRUCTION_ERRORS[case]
    params, options = make_input(Parameter(torch.randn(1, 1)), Parameter(torch.randn(1, 1)))
    with pytest.raises(error, match=message):
        torch.optim.SGD(params, **options)
    with pytest.raises(error, match=message):
        HybridZOFO(params, **{"lr": 1e-3, **options}, mode=mode)


@pytest.mark.parametrize("mode", ["fo", "zo"])
def test_duplicate_parameters_warn_once(mode):
    p = Parameter(torch.randn(1, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HybridZOFO([p, p], 1e-3, mode=mode)
    assert len(caught) == 1
    assert "a parameter group with duplicate parameters" in str(caught[0].message)


OWN_ERRORS = [
    ({"mode": "both"}, ValueError, r"mode must be one of \('zo', 'fo'\), got 'both'"),
    ({"mode": None}, ValueError, "mode must be one of .* got None"),
    ({"mu": 0}, ValueError, "Invalid mu value: 0"),
    ({"mu": -1e-3}, ValueError, "Invalid mu value: -0.001"),
    ({"mu": float("nan")}, ValueError, "Invalid mu value: nan"),
    ({"mu": float("inf")}, ValueError, "Invalid mu value: inf"),
    ({"mu": "1e-3"}, ValueError, "Invalid mu value: '1e-3'"),
    ({"mu": True}, ValueError, "Invalid mu value: True"),
    ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ({"lr": float("inf")}, ValueError, "Invalid learning rate: inf"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate"),
    ({"weight_decay": float("nan")}, ValueError, "Invalid weight_decay value: nan"),
    ({"weight_decay": float("inf")}, ValueError, "Invalid weight_decay value: inf"),
    ({"estimator": "spsa"}, ValueError, "estimator must be one of .* got 'spsa'"),
    ({"num_samples": 0}, ValueError, "num_samples must be an int >= 1, got 0"),
    ({"num_samples": -2}, ValueError, "num_samples must be an int >= 1, got -2"),
    ({"num_samples": 1.5}, ValueError, "num_samples must be an int >= 1, got 1.5"),
    ({"num_samples": True}, ValueError, "num_samples must be an int >= 1, got True"),
    ({"distribution": "cauchy"}, ValueError, "distribution must be one of .* got 'cauchy'"),
    ({"perturbation": "copied"}, ValueError, "perturbation must be one of .* got 'copied'"),
    ({"rounding": "up"}, ValueError, "rounding must be one of .* got 'up'"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of .* got 'ignore'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    ({"seed": 1 << 64}, ValueError, "seed must be in"),
    ({"seed": 1.0}, TypeError, "seed must be an int, got 1.0"),
    ({"seed": True}, TypeError, "seed must be an int, got True"),
    ({"seed": None}, TypeError, "seed must be an int, got None"),
    ({"bogus": 1}, TypeError, "'bogus' is no option of HybridZOFO or of fo_optimizer=SGD"),
    ({"betas": (0.9, 0.99)}, TypeError, "'betas' is no option of HybridZOFO or of fo_optimizer"),
    ({"fo_optimizer": "SGD"}, TypeError, "fo_optimizer must be a torch optimizer class"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), OWN_ERRORS, ids=[repr(options) for options, *_ in OWN_ERRORS]
)
def test_own_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        HybridZOFO([Parameter(torch.ones(2))], **{"mode": "zo", "lr": 1e-3, **options})


@pytest.mark.parametrize("value", [0, -1e-3, float("nan"), "1e-3"])
def test_mu_is_checked_without_zo_groups_too(value):
    """As every other default: a ZO group may be added later."""
    with pytest.raises(ValueError, match="Invalid mu value"):
        HybridZOFO([Parameter(torch.ones(2))], mu=value)


def test_an_unavailable_backend_says_why():
    if torch.cuda.is_available():
        pytest.skip("Triton may be available")
    with pytest.raises(RuntimeError, match="backend='triton' is not available: "):
        HybridZOFO([Parameter(torch.ones(2))], mode="zo", lr=1e-3, backend="triton")


GROUP_ERRORS = [
    ({"mode": "both"}, ValueError, "mode must be one of"),
    ({"mode": "zo", "lr": -1}, ValueError, "Invalid learning rate: -1"),
    ({"mode": "zo", "lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ({"mode": "zo", "lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"mode": "zo", "mu": 0}, ValueError, "Invalid mu value: 0"),
    ({"mode": "zo", "mu": "small"}, ValueError, "Invalid mu value: 'small'"),
    ({"mode": "zo", "weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
    ({"mode": "zo", "seed": -1}, ValueError, "seed must be in"),
    ({"mode": "zo", "seed": 0.5}, TypeError, "seed must be an int"),
    ({"mode": "zo", "momentum": 0.9}, ValueError, "momentum must not be set in a group with mode="),
    ({"mode": "zo", "dampening": 0.5}, ValueError, "dampening must not be set"),
    ({"mode": "zo", "nesterov": True}, ValueError, "nesterov must not be set"),
]


@pytest.mark.parametrize(
    ("group", "error", "message"), GROUP_ERRORS, ids=[repr(group) for group, *_ in GROUP_ERRORS]
)
def test_group_options_are_checked_and_nothing_is_added(group, error, message):
    first, second = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        HybridZOFO([{"params": [second], **group}])
    optimizer = HybridZOFO([first])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [second], **group})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second]})  # the parameter is free again
    optimizer.step(lambda: first.sum() + second.sum())
    assert (first < 1).all()
    assert (second < 1).all()


@pytest.mark.parametrize(
    "option",
    [
        {"estimator": "one_sided"},
        {"num_samples": 4},
        {"distribution": "rademacher"},
        {"perturbation": "in_place"},
        {"rounding": "nearest"},
        {"nonfinite": "raise"},
        {"backend": "reference"},
    ],
    ids=repr,
)
def test_settings_of_the_optimizer_are_refused_in_a_group(option):
    """They would be ignored there: a user who writes zo=dict(num_samples=4) must hear of it."""
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        HybridZOFO([{"params": [Parameter(torch.ones(2))], "mode": "zo", **option}])


def test_complex_and_other_parameters_that_cannot_move_are_refused():
    for dtype in (torch.complex64, torch.complex128, torch.int64, torch.bool):
        with pytest.raises(TypeError, match=r"zeroth-order parameter .* has dtype"):
            HybridZOFO([torch.ones(2, dtype=dtype)], mode="zo", lr=1e-3)
    with pytest.raises(TypeError, match=r"'embed\.weight'"):
        HybridZOFO([("embed.weight", torch.ones(2, dtype=torch.complex64))], mode="zo", lr=1e-3)
    with pytest.raises(ValueError, match="meta device"):
        HybridZOFO([torch.ones(2, device="meta")], mode="zo", lr=1e-3)
    with pytest.raises(TypeError, match="dense"):
        HybridZOFO([torch.ones(2, 2).to_sparse()], mode="zo", lr=1e-3)


def test_can_be_printed(mode):
    problem = Problem()
    optimizer = make(problem.params, mode, lr=0.125, mu=0.0625)
    for text in (repr(optimizer), str(optimizer)):
        assert text.startswith("HybridZOFO (\nParameter Group 0\n")
        assert "lr: 0.125" in text
        assert "mu: 0.0625" in text
        assert f"mode: {'fo' if mode == 'fo' else 'zo'}" in text
        assert "estimator='two_sided'" in text
        assert "fo_optimizer: SGD" in text
    optimizer.step(problem.closure(optimizer))
    assert repr(copy.deepcopy(optimizer)) == repr(optimizer)
