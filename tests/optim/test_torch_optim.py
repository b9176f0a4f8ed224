"""What torch tests for its own optimizers, in every mode; FO-only against the class itself.

``mode="fo"`` and ``mode="zo"`` put all parameters in one kind of group; "hybrid" puts the first
one in a ZO group. Saving, loading and hooks are in ``test_torch_optim_state.py``.
"""

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from zofo_optim import HybridZOFO

MODES = ("fo", "zo", "hybrid")
SGD_INPUTS = {
    "default": {},
    "lr": {"lr": 1e-2},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "weight_decay": {"weight_decay": 0.5},
    "momentum": {"momentum": 0.9},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
SGD_FLAGS = {
    "plain": {},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False},
    "fused": {"fused": True},
}


def lr_of(optimizer):
    return float(optimizer.param_groups[0]["lr"])


SCHEDULERS = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: schedules.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, milestones=[2, 7], gamma=0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, factor=0.4, total_iters=4),
    "LinearLR": lambda o: schedules.LinearLR(o, start_factor=0.4, end_factor=0.8, total_iters=4),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, power=0.9, total_iters=20),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=20),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=5),
    "CyclicLR": lambda o: schedules.CyclicLR(o, lr_of(o) / 5, lr_of(o), step_size_up=4),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=lr_of(o), total_steps=40),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=2, threshold=0.5),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o,
        [schedules.ConstantLR(o, factor=0.1, total_iters=3), schedules.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.4, total_iters=4), schedules.ExponentialLR(o, 0.95)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=lr_of(o) / 2, anneal_epochs=5),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def make(params, mode, **options):
    """A HybridZOFO over ``params``; in "hybrid" the first one is zeroth-order."""
    params = list(params)
    if mode != "hybrid":
        return HybridZOFO(params, mode=mode, **options)
    groups = [{"params": params[:1], "mode": "zo"}, {"params": params[1:], "mode": "fo"}]
    return HybridZOFO(groups, **options)


class Problem:
    """Least squares in a weight and a bias, small enough that ZO at lr=1e-2 is stable."""

    def __init__(self, dtype=torch.float32, strided=False, shape=(3, 4)):
        generator = torch.Generator().manual_seed(1)

        def draw(*size):
            values = torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
            return torch.stack((values, values), -1)[..., 0] if strided else values

        self.weight, self.bias = Parameter(draw(*shape)), Parameter(draw(shape[0]))
        self.params = [self.weight, self.bias]
        self.input = draw(shape[1])
        assert self.weight.is_contiguous() != strided

    def loss(self):
        return (self.weight.mv(self.input) + self.bias).square().sum()

    def closure(self, optimizer):
        """In the style that torch documents."""

        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    def values(self):
        return [p.detach().clone() for p in self.params]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def torch_step(optimizer, closure):
    closure()
    optimizer.step()


# ---- construction -----------------------------------------------------------------------------


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
        HybridZOFO(params, mode=mode, **options)


@pytest.mark.parametrize("mode", ["fo", "zo"])
def test_duplicate_parameters_warn_once(mode):
    p = Parameter(torch.randn(1, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HybridZOFO([p, p], mode=mode)
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
        HybridZOFO([Parameter(torch.ones(2))], **{"mode": "zo", **options})


@pytest.mark.parametrize("value", [0, -1e-3, float("nan"), "1e-3"])
def test_mu_is_checked_without_zo_groups_too(value):
    """As every other default: a ZO group may be added later."""
    with pytest.raises(ValueError, match="Invalid mu value"):
        HybridZOFO([Parameter(torch.ones(2))], mu=value)


def test_an_unavailable_backend_says_why():
    if torch.cuda.is_available():
        pytest.skip("Triton may be available")
    with pytest.raises(RuntimeError, match="backend='triton' is not available: "):
        HybridZOFO([Parameter(torch.ones(2))], mode="zo", backend="triton")


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
            HybridZOFO([torch.ones(2, dtype=dtype)], mode="zo")
    with pytest.raises(TypeError, match=r"'embed\.weight'"):
        HybridZOFO([("embed.weight", torch.ones(2, dtype=torch.complex64))], mode="zo")
    with pytest.raises(ValueError, match="meta device"):
        HybridZOFO([torch.ones(2, device="meta")], mode="zo")
    with pytest.raises(TypeError, match="dense"):
        HybridZOFO([torch.ones(2, 2).to_sparse()], mode="zo")


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


# ---- direction --------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("options", SGD_INPUTS.values(), ids=SGD_INPUTS)
def test_goes_in_the_right_direction(mode, options, strided):
    for flag in ({}, {"maximize": True}, {"foreach": True}, {"fused": True}):
        chosen = {"mu": 1e-3, **options, **flag}
        problem = Problem(strided=strided)
        optimizer = make(problem.params, mode, **chosen)
        start = problem.loss().item()
        for _ in range(20):
            optimizer.step(problem.closure(optimizer))
        if chosen.get("maximize"):
            assert problem.loss().item() > start
        else:
            assert problem.loss().item() < start


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_every_estimator_goes_in_the_right_direction(estimator, distribution):
    for mode in ("zo", "hybrid"):
        for samples in (1, 3):
            problem = Problem()
            options = {"num_samples": samples, "lr": 3e-3}
            optimizer = make(
                problem.params, mode, estimator=estimator, distribution=distribution, **options
            )
            start = problem.loss().item()
            for _ in range(60):
                optimizer.step(problem.closure(optimizer))
            assert problem.loss().item() < 0.5 * start


def rosenbrock(p):
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


def advance(scheduler, loss):
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_every_mode(mode, name, tensor_lr):
    """The lr follows torch.optim.SGD's, the step uses it, and the loss falls."""

    def lr():
        return torch.tensor(5e-4) if tensor_lr else 5e-4

    problem, twin = Problem(), Problem()
    optimizer = make(problem.params, mode, lr=lr(), momentum=0.5)
    by_hand = make(twin.params, mode, lr=lr(), momentum=0.5)
    groups = [{"params": [torch.zeros(1)]} for _ in optimizer.param_groups]
    reference = torch.optim.SGD(groups, lr=lr(), momentum=0.5)
    scheduler, expected = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    start, seen = problem.loss().item(), set()
    for _ in range(25):
        for ours, theirs in zip(by_hand.param_groups, reference.param_groups, strict=True):
            ours["lr"], ours["momentum"] = theirs["lr"], theirs["momentum"]
        loss = optimizer.step(problem.closure(optimizer)).item()
        by_hand.step(twin.closure(by_hand))
        assert equal(problem.values(), twin.values())
        reference.step()
        advance(scheduler, loss)
        advance(expected, loss)
        for ours, theirs in zip(optimizer.param_groups, reference.param_groups, strict=True):
            assert isinstance(ours["lr"], torch.Tensor) == isinstance(theirs["lr"], torch.Tensor)
            assert float(ours["lr"]) == float(theirs["lr"])
        seen.add(float(optimizer.param_groups[0]["lr"]))
    assert len(seen) > 1
    assert problem.loss().item() < start


def test_all_schedulers_are_covered():
    wanted = set(schedules.__all__) - {"LRScheduler"}
    assert wanted <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rosenbrock_gets_closer_under_every_scheduler(name):
    for mode in ("fo", "zo"):
        p = Parameter(torch.tensor([1.5, 1.5]))
        optimizer = HybridZOFO([p], lr=1e-4, mode=mode)
        scheduler = SCHEDULERS[name](optimizer)
        for _ in range(35):
            loss = optimizer.step(lambda p=p: rosenbrock(p))
            advance(scheduler, loss.item())
            optimizer.zero_grad()
        assert rosenbrock(p) < rosenbrock(torch.tensor([1.5, 1.5]))
        assert p.detach().dist(torch.ones(2)) < 0.5**0.5


def test_several_schedulers_and_groups(mode):
    problem = Problem()
    first = {"params": [problem.weight], "mode": "fo" if mode == "fo" else "zo", "lr": 1e-2}
    second = {"params": [problem.bias], "mode": "zo" if mode == "zo" else "fo"}
    optimizer = HybridZOFO([first, second], lr=1e-3)
    chain = [
        schedules.StepLR(optimizer, gamma=0.99, step_size=10),
        schedules.ExponentialLR(optimizer, gamma=0.99),
        schedules.ReduceLROnPlateau(optimizer),
    ]
    start = problem.loss().item()
    for _ in range(20):
        loss = optimizer.step(problem.closure(optimizer))
        for scheduler in chain:
            advance(scheduler, loss)
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs == pytest.approx([1e-2 * 0.99**22, 1e-3 * 0.99**22])
    assert problem.loss().item() < start


def test_stepping_the_scheduler_first_warns_and_last_does_not(mode):
    for early in (True, False):
        problem = Problem()
        optimizer = make(problem.params, mode)
        scheduler = schedules.StepLR(optimizer, step_size=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                if early:
                    scheduler.step()
                optimizer.step(problem.closure(optimizer))
                if not early:
                    scheduler.step()
        told = [w for w in caught if "lr_scheduler.step()" in str(w.message)]
        assert len(told) == early
        if mode != "hybrid":  # there weight.requires_grad is worth a warning of its own
            assert len(caught) == early


@pytest.mark.parametrize("dims", [0, 1, 2])
@pytest.mark.parametrize("options", SGD_INPUTS.values(), ids=SGD_INPUTS)
def test_tensor_lr_equals_float_lr(mode, options, dims):
    options = {k: v for k, v in options.items() if k != "lr"}
    for flag in SGD_FLAGS.values():
        problem, twin = Problem(), Problem()
        lr = torch.full((1,) * dims, 1e-3)
        plain = make(problem.params, mode, lr=1e-3, **options, **flag)
        tensor = make(twin.params, mode, lr=lr, **options, **flag)
        start = problem.values()
        for _ in range(5):
            plain.step(problem.closure(plain))
            tensor.step(twin.closure(tensor))
        assert not equal(problem.values(), start)
        assert all(group["lr"] is lr for group in tensor.param_groups)
        assert lr.tolist() == torch.full((1,) * dims, 1e-3).tolist()
        # the products lr * g are rounded in another order by torch's own loops
        torch.testing.assert_close(problem.values(), twin.values(), rtol=1e-6, atol=1e-7)
        if mode == "zo":
            assert equal(problem.values(), twin.values())


# ---- groups -----------------------------------------------------------------------------------


def test_param_groups_lr(mode):
    """A group with lr=0 stays, the other one moves; doubling an lr doubles the first step."""
    first, second = ("zo", "fo") if mode == "hybrid" else (mode, mode)
    moved = {}
    for lrs in ((1e-3, 0.0), (0.0, 1e-3), (2e-3, 1e-3)):
        problem = Problem(torch.float64)
        start = problem.values()
        optimizer = HybridZOFO(
            [
                {"params": [problem.weight], "lr": lrs[0], "mode": first},
                {"params": [problem.bias], "lr": lrs[1], "mode": second},
            ]
        )
        optimizer.step(problem.closure(optimizer))
        moved[lrs] = [p - s for p, s in zip(problem.values(), start, strict=True)]
    tiny = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(moved[1e-3, 0.0][1], torch.zeros(3).double(), **tiny)
    torch.testing.assert_close(moved[0.0, 1e-3][0], torch.zeros(3, 4).double(), **tiny)
    torch.testing.assert_close(moved[2e-3, 1e-3][0], 2 * moved[1e-3, 0.0][0], rtol=1e-9, atol=1e-14)
    assert all(moved[2e-3, 1e-3][i].abs().max() > 1e-5 for i in (0, 1))


def test_param_groups_weight_decay(mode):
    """Decay acts on its own group only: one step differs by -lr * decay * w, no more."""
    first, second = ("zo", "fo") if mode == "hybrid" else (mode, mode)
    after = {}
    for decay in (0.0, 0.5):
        problem = Problem(torch.float64)
        start = problem.values()
        groups = [
            {"params": [problem.weight], "mode": first, "weight_decay": decay},
            {"params": [problem.bias], "mode": second, "weight_decay": 0.0},
        ]
        optimizer = HybridZOFO(groups, lr=1e-2)
        optimizer.step(problem.closure(optimizer))
        after[decay] = problem.values()
    difference = after[0.5][0] - after[0.0][0]
    torch.testing.assert_close(difference, -1e-2 * 0.5 * start[0], rtol=1e-9, atol=1e-14)
    assert torch.equal(after[0.5][1], after[0.0][1])


def test_maximize_is_minimize_mirrored(mode):
    moved = {}
    for maximize in (False, True):
        problem = Problem(torch.float64)
        start = problem.values()
        optimizer = make(problem.params, mode, maximize=maximize)
        optimizer.step(problem.closure(optimizer))
        moved[maximize] = [p - s for p, s in zip(problem.values(), start, strict=True)]
    for down, up in zip(moved[False], moved[True], strict=True):
        assert down.abs().max() > 1e-5
        torch.testing.assert_close(up, -down, rtol=1e-9, atol=1e-14)


def test_maximize_may_differ_by_group():
    for mode in ("fo", "zo"):
        a, b = Parameter(torch.ones(4).double()), Parameter(torch.ones(4).double())
        groups = [{"params": [a], "maximize": True}, {"params": [b], "maximize": False}]
        optimizer = HybridZOFO(groups, lr=1e-2, mode=mode, num_samples=16)
        for _ in range(10):
            optimizer.step(lambda a=a, b=b: a.square().sum() + b.square().sum())
        assert a.norm() > 2
        assert b.norm() < 2


def test_parameters_may_be_added_while_training(mode):
    problem = Problem()
    first, second = ("zo", "fo") if mode == "hybrid" else (mode, mode)
    optimizer = HybridZOFO([problem.weight], mode=first)
    bias = problem.bias.detach().clone()
    for _ in range(3):
        optimizer.step(problem.closure(optimizer))
    assert torch.equal(problem.bias, bias)
    optimizer.add_param_group({"params": problem.bias, "mode": second, "lr": 1e-2})
    optimizer.step(problem.closure(optimizer))
    assert not torch.equal(problem.bias, bias)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": [problem.bias]})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([problem.bias])


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_group_added_later_equals_one_given_at_once(steps):
    """The new ZO group joins at the current step, with the next noise indices."""
    late, early = Problem(torch.float64), Problem(torch.float64)
    joining = HybridZOFO([late.weight], mode="zo", lr=1e-3)
    at_once = HybridZOFO(
        [{"params": [early.weight], "lr": 1e-3}, {"params": [early.bias], "lr": 0.0, "mu": 1e-30}],
        mode="zo",
    )  # mu = 1e-30 does not move the bias, lr = 0 does not train it
    for _ in range(steps):
        joining.step(late.closure(joining))
        at_once.step(early.closure(at_once))
        torch.testing.assert_close(late.values(), early.values(), rtol=0, atol=1e-12)
    joining.add_param_group({"params": [late.bias], "lr": 1e-2})
    at_once.param_groups[1].update(lr=1e-2, mu=1e-3)
    for _ in range(2):
        joining.step(late.closure(joining))
        at_once.step(early.closure(at_once))
        torch.testing.assert_close(late.values(), early.values(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16,) * 2])
def test_mixed_dtypes(mode, dtypes):
    a = Parameter(torch.linspace(0.5, 1.5, 6).to(dtypes[0]))
    b = Parameter(torch.linspace(0.5, 1.5, 6).to(dtypes[1]))
    c = Parameter(torch.linspace(0.5, 1.5, 6))

    def loss():
        return a.float().square().sum() + b.float().square().sum() + c.square().sum()

    optimizer = make([a, b, c], mode, lr=1e-2, mu=1e-2)
    start = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        optimizer.step(loss)
    assert loss().item() < start
    assert [a.dtype, b.dtype, c.dtype] == [*dtypes, torch.float32]


# ---- nothing to do ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", SGD_INPUTS.values(), ids=SGD_INPUTS)
def test_noop_when_parameters_have_no_gradient(options):
    p = torch.randn(4, 4)
    before = p.clone()
    optimizer = HybridZOFO([p], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here asks for a gradient
        for _ in range(3):
            optimizer.step(lambda: torch.tensor([10.0]))
    assert torch.equal(p, before)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("options", SGD_INPUTS.values(), ids=SGD_INPUTS)
def test_noop_for_zero_gradients_and_constant_losses(mode, options):
    if options.get("weight_decay"):
        options = {**options, "weight_decay": 0.0}
    a = Parameter(torch.linspace(1, 2, 8).double())
    b = Parameter(torch.linspace(1, 2, 8).double())
    before = a.detach().clone()
    optimizer = make([a, b], mode, **options)
    for _ in range(3):
        for p in (a, b):
            p.grad = torch.zeros_like(p)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(lambda: 1)
    torch.testing.assert_close([a.detach(), b.detach()], [before, before], rtol=0, atol=3e-15)
    if mode == "fo":
        assert torch.equal(a, before)


def test_a_constant_loss_still_decays(mode):
    """As with SGD and zero gradients: L2 regularisation does not come from the closure."""
    p = Parameter(torch.linspace(1, 2, 8).double())
    q = Parameter(torch.linspace(1, 2, 8).double())
    expected = p.detach() * (1 - 1e-2 * 0.5)
    optimizer = make([p, q], mode, lr=1e-2, weight_decay=0.5)
    optimizer.step(lambda: (p.sum() + q.sum()) * 0.0)
    torch.testing.assert_close([p.detach(), q.detach()], [expected] * 2, rtol=0, atol=2e-15)


# ---- calling conventions ----------------------------------------------------------------------


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_grad_mode_is_restored(mode, outside):
    problem, seen = Problem(), []
    optimizer = make(problem.params, mode)

    def closure():
        seen.append(torch.is_grad_enabled())
        return problem.loss()

    def fail():
        raise KeyError

    with outside():
        enabled = torch.is_grad_enabled()
        optimizer.step(closure)
        assert torch.is_grad_enabled() == enabled
        optimizer.zero_grad()
        optimizer.backward(closure)
        assert torch.is_grad_enabled() == enabled
        optimizer.step()
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(KeyError):
            optimizer.step(fail)
        assert torch.is_grad_enabled() == enabled
    assert torch.is_grad_enabled()
    once = {"fo": [True], "zo": [False, False], "hybrid": [True, False, False]}[mode]
    assert seen == 2 * once


def test_step_returns_what_the_closure_returned(mode):
    problem = Problem()
    optimizer = make(problem.params, mode, lr=0.0, mu=1e-4)
    clean = problem.loss().item()
    loss = optimizer.step(problem.closure(optimizer))
    assert isinstance(loss, torch.Tensor)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(clean, rel=1e-3)
    assert optimizer.last_loss.item() == pytest.approx(clean, rel=1e-3)
    assert not optimizer.last_loss.requires_grad

    def number():
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss.item()

    returned = optimizer.step(number)
    assert type(returned) is float
    assert returned == pytest.approx(clean, rel=1e-3)
    optimizer.zero_grad()
    optimizer.backward(problem.loss)
    assert optimizer.step() is None


@pytest.mark.parametrize("style", ["loss only", "documented", "number", "one element"])
def test_closure_styles_are_the_same(mode, style):
    reference, problem = Problem(torch.float64), Problem(torch.float64)
    expected, optimizer = (make(p.params, mode, momentum=0.5) for p in (reference, problem))

    def closure():
        if style == "documented":
            return problem.closure(optimizer)()
        if style == "number":
            return problem.closure(optimizer)().item()
        return problem.loss().reshape(1, 1) if style == "one element" else problem.loss()

    for _ in range(4):
        expected.zero_grad()
        expected.step(reference.loss)
        optimizer.zero_grad()
        optimizer.step(closure)
    assert equal(problem.values(), reference.values())
    assert not equal(problem.values(), Problem(torch.float64).values())


BAD_RESULTS = {
    "None": (lambda p: None, TypeError, "does it end in 'return loss'"),
    "tuple": (lambda p: (p.sum(), 1), TypeError, "got tuple"),
    "vector": (lambda p: p * 1, ValueError, r"scalar loss \(one element\), got shape"),
    "empty": (lambda p: p[:0], ValueError, "scalar loss"),
    "complex": (lambda p: p.sum() * 1j, TypeError, "real loss, got dtype torch.complex"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_closure_must_return_a_real_scalar(mode, case):
    bad, error, message = BAD_RESULTS[case]
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = make([p, q], mode)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: bad(q))
    torch.testing.assert_close([p.detach(), q.detach()], [torch.ones(3)] * 2, rtol=0, atol=1e-6)


def test_step_needs_a_closure_that_can_be_called(mode):
    optimizer = make(Problem().params, mode)
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure must be callable, got float"):
        optimizer.step(0.5)
    with pytest.raises(TypeError, match="closure must be callable, got NoneType"):
        optimizer.backward(None)


def test_zero_grad_to_zero_or_none(mode):
    problem = Problem()
    optimizer = make(problem.params, mode)
    for p in problem.params:
        p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum() == 0 for p in problem.params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in problem.params)


def test_no_reference_cycle_keeps_an_optimizer_alive(mode):
    problem = Problem()
    optimizer = make(problem.params, mode, momentum=0.9)
    optimizer.step(problem.loss)
    schedules.StepLR(optimizer, 3)
    alive = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


# ---- first-order groups are the torch optimizer -----------------------------------------------


def assert_same_state(ours, theirs, left, right):
    for a, b in zip(left, right, strict=True):
        assert ours.state[a].keys() == theirs.state[b].keys()
        for key, value in theirs.state[b].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours.state[a][key], value)
            else:
                assert ours.state[a][key] == value


@pytest.mark.parametrize("flags", SGD_FLAGS.values(), ids=SGD_FLAGS)
@pytest.mark.parametrize("options", SGD_INPUTS.values(), ids=SGD_INPUTS)
def test_first_order_is_sgd_bit_for_bit(options, flags):
    for kind in ({}, {"strided": True}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}):
        problem, twin = Problem(**kind), Problem(**kind)
        ours = HybridZOFO(problem.params, **options, **flags)
        theirs = torch.optim.SGD(twin.params, **options, **flags)
        for _ in range(12):
            ours.step(problem.closure(ours))
            torch_step(theirs, twin.closure(theirs))
        assert equal(problem.values(), twin.values())
        assert_same_state(ours, theirs, problem.params, twin.params)
        assert not equal(problem.values(), Problem(**kind).values())


def test_first_order_is_sgd_with_groups_schedulers_and_clipping():
    problem, twin = Problem(), Problem()

    def groups(p):
        return [{"params": [p.weight], "lr": 1e-2, "momentum": 0.9}, {"params": [p.bias]}]

    ours = HybridZOFO(groups(problem), lr=1e-3, weight_decay=0.1)
    theirs = torch.optim.SGD(groups(twin), lr=1e-3, weight_decay=0.1)
    chains = [
        [schedules.StepLR(o, 2, gamma=0.5), schedules.CosineAnnealingLR(o, 9)]
        for o in (ours, theirs)
    ]
    for _ in range(12):
        ours.zero_grad()
        ours.backward(problem.loss)
        nn.utils.clip_grad_norm_(problem.params, 0.5)
        ours.step()
        theirs.zero_grad()
        twin.loss().backward()
        nn.utils.clip_grad_norm_(twin.params, 0.5)
        theirs.step()
        for scheduler in (*chains[0], *chains[1]):
            scheduler.step()
        assert equal(problem.values(), twin.values())


OTHER_OPTIMIZERS = [
    (torch.optim.Adadelta, {"lr": 0.5, "rho": 0.8}),
    (torch.optim.Adafactor, {"lr": 1e-2, "d": 2.0}),
    (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}),
    (torch.optim.Adam, {"lr": 1e-2, "betas": (0.8, 0.99), "amsgrad": True}),
    (torch.optim.Adam, {"lr": torch.tensor(1e-2), "maximize": True}),
    (torch.optim.Adamax, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    (torch.optim.ASGD, {"lr": 1e-2, "t0": 3}),
    (torch.optim.NAdam, {"lr": 1e-2, "momentum_decay": 6e-3, "decoupled_weight_decay": True}),
    (torch.optim.RAdam, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 1e-2, "centered": True, "momentum": 0.1}),
    (torch.optim.Rprop, {"lr": 1e-2, "etas": (0.4, 1.3)}),
]


@pytest.mark.parametrize(
    ("cls", "options"), OTHER_OPTIMIZERS, ids=[cls.__name__ for cls, _ in OTHER_OPTIMIZERS]
)
def test_other_first_order_optimizers_are_the_class_itself(cls, options):
    options = {"weight_decay": 0.0, **options}
    if cls is torch.optim.Rprop:
        del options["weight_decay"]
    problem, twin = Problem(), Problem()
    ours = HybridZOFO(problem.params, fo_optimizer=cls, **options)
    theirs = cls(twin.params, **options)
    assert_same_state(ours, theirs, problem.params, twin.params)  # Adagrad's is there at once
    for _ in range(10):
        ours.step(problem.closure(ours))
        torch_step(theirs, twin.closure(theirs))
        assert equal(problem.values(), twin.values())
    assert_same_state(ours, theirs, problem.params, twin.params)
    assert not equal(problem.values(), Problem().values())
    for key, value in theirs.param_groups[0].items():
        if key != "params":
            assert ours.param_groups[0][key] == value


def test_muon_and_sparse_adam():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    weights = [Parameter(torch.linspace(0, 1, 12).reshape(3, 4)) for _ in range(2)]
    ours = HybridZOFO(
        [weights[0]], lr=1e-2, weight_decay=0.1, momentum=0.9, fo_optimizer=torch.optim.Muon
    )
    theirs = torch.optim.Muon([weights[1]], lr=1e-2, weight_decay=0.1, momentum=0.9)
    embeddings = [nn.Embedding(5, 3, sparse=True) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    sparse = HybridZOFO(embeddings[0].parameters(), lr=0.1, fo_optimizer=torch.optim.SparseAdam)
    dense = torch.optim.SparseAdam(embeddings[1].parameters(), lr=0.1)
    rows = torch.tensor([0, 2, 2])
    for _ in range(3):
        ours.zero_grad()
        ours.step(lambda: (weights[0] - 1).square().sum())
        theirs.zero_grad()
        (weights[1] - 1).square().sum().backward()
        theirs.step()
        sparse.zero_grad()
        sparse.step(lambda: embeddings[0](rows).square().sum())
        dense.zero_grad()
        embeddings[1](rows).square().sum().backward()
        dense.step()
    assert torch.equal(*weights)
    assert torch.equal(embeddings[0].weight, embeddings[1].weight)


def test_a_partial_may_stand_for_the_class():
    make_adam = functools.partial(torch.optim.AdamW, betas=(0.5, 0.9), eps=1e-3)
    problem, twin = Problem(), Problem()
    ours = HybridZOFO(problem.params, lr=1e-2, weight_decay=0.1, fo_optimizer=make_adam)
    theirs = make_adam(twin.params, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        ours.step(problem.closure(ours))
        torch_step(theirs, twin.closure(theirs))
    assert equal(problem.values(), twin.values())
    assert ours.param_groups[0]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize(
    ("cls", "bound"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.5}),
        (torch.optim.AdamW, {"weight_decay": 0.5}),
    ],
    ids=repr,
)
def test_a_partial_keeps_what_it_binds(cls, bound):
    """HybridZOFO's own defaults must not silently undo partial(SGD, momentum=0.9)."""
    problem, twin = Problem(), Problem()
    ours = HybridZOFO(problem.params, fo_optimizer=functools.partial(cls, **bound))
    theirs = cls(twin.params, **{"lr": 1e-3, **bound})
    for _ in range(5):
        ours.step(problem.closure(ours))
        torch_step(theirs, twin.closure(theirs))
    assert equal(problem.values(), twin.values())


def test_first_order_optimizers_that_cannot_be_used_say_so():
    p = Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="without a closure, got LBFGS"):
        HybridZOFO([p], fo_optimizer=torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"momentum=0.9 is no option of fo_optimizer=AdamW"):
        HybridZOFO([p], momentum=0.9, fo_optimizer=torch.optim.AdamW)
    with pytest.raises(TypeError, match=r"nesterov=True is no option of fo_optimizer=Adam"):
        HybridZOFO([p], nesterov=True, fo_optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 0: 1\.5"):
        HybridZOFO([p], betas=(1.5, 0.9), fo_optimizer=torch.optim.Adam)
    with pytest.raises(TypeError, match="fo_optimizer must make a torch Optimizer, got list"):
        HybridZOFO([p], fo_optimizer=lambda params: list(params))
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        HybridZOFO([p], fused=True, foreach=True)


def test_momentum_belongs_to_first_order_groups_only():
    """Given once for the optimizer it serves the FO groups; ZO groups keep no state."""
    problem, twin = Problem(), Problem()
    optimizer, plain = make(problem.params, "hybrid", momentum=0.9), make(twin.params, "hybrid")
    optimizer.step(problem.closure(optimizer))
    plain.step(twin.closure(plain))
    assert equal(problem.values(), twin.values())  # the first step has no momentum yet
    assert list(optimizer.state) == [problem.bias]
    assert len(plain.state.get(twin.weight, {})) == 0


def test_differentiable_reaches_through_the_step():
    def through(cls, **options):
        w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        g = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
        p = w.clone()
        p.grad = g
        optimizer = cls([p], lr=0.1, momentum=0.9, differentiable=True, **options)
        for _ in range(2):
            optimizer.step(lambda: 1.0)
        return torch.autograd.grad(p.square().sum(), [w, g])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert equal(through(HybridZOFO), through(torch.optim.SGD))
    assert all(g.abs().min() > 0 for g in through(torch.optim.SGD))


@pytest.mark.parametrize("options", SGD_INPUTS.values(), ids=SGD_INPUTS)
def test_complex_first_order_parameters(options):
    start = torch.randn(3, 3, dtype=torch.complex64)
    p, q = Parameter(start.clone()), Parameter(start.clone())
    ours, theirs = HybridZOFO([p], **options), torch.optim.SGD([q], **options)
    for _ in range(5):
        ours.zero_grad()
        ours.step(lambda: (p - 1j).abs().square().sum())
        theirs.zero_grad()
        (q - 1j).abs().square().sum().backward()
        theirs.step()
    assert torch.equal(p, q)
    assert not torch.equal(p, start)


@pytest.mark.parametrize("hybrid", [False, True])
def test_sparse_gradients(hybrid):
    """Cyclic coordinate descent on Rosenbrock with uncoalesced gradients, as torch tests SGD."""
    p, q = Parameter(torch.tensor([1.5, 1.5])), Parameter(torch.tensor([1.5, 1.5]))
    frozen = Parameter(torch.zeros(3), requires_grad=False)
    groups = [{"params": [p]}, *([{"params": [frozen], "mode": "zo"}] if hybrid else [])]
    ours, theirs = HybridZOFO(groups, lr=1e-4), torch.optim.SGD([q], lr=1e-4)

    def closure(optimizer, p, row):
        optimizer.zero_grad()
        loss = rosenbrock(p)
        loss.backward()
        if p.grad is not None:  # in a ZO evaluation backward does nothing
            value = p.grad[row] / 4
            p.grad = torch.sparse_coo_tensor([[row, row]], torch.stack((value, 3 * value)), (2,))
        return loss + frozen.sum()

    for i in range(40):
        ours.step(functools.partial(closure, ours, p, i % 2))
        torch_step(theirs, functools.partial(closure, theirs, q, i % 2))
        assert torch.equal(p, q)
    assert rosenbrock(p) < rosenbrock(torch.tensor([1.5, 1.5]))


def test_set_default_dtype(mode):
    """Where Python numbers meet float64 defaults, nothing changes its dtype."""
    problem, twin = Problem(), Problem()
    optimizer, plain = make(problem.params, mode), make(twin.params, mode)
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(3):
            optimizer.step(problem.closure(optimizer))
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(3):
        plain.step(twin.closure(plain))
    assert equal(problem.values(), twin.values())
    assert not equal(problem.values(), Problem().values())
