"""What torch tests of steps, in every mode: their direction, their groups, and nothing to do."""

import warnings

import pytest
import torch
from conftest import each_of
from least_squares import MODES, SGD_INPUTS, Problem, make
from torch.nn import Parameter

from zofo_optim import HybridZOFO

pytestmark = pytest.mark.usefixtures("seeded")
mode = each_of(MODES)


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
    optimizer = HybridZOFO([problem.weight], 1e-3, mode=first)
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
        warnings.filterwarnings("ignore", ".*requires_grad=False")
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
