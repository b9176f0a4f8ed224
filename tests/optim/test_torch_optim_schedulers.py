"""torch's learning-rate schedulers drive every mode."""

import warnings

import pytest
import torch
from conftest import each_of
from least_squares import MODES, SGD_FLAGS, SGD_INPUTS, Problem, equal, make, rosenbrock
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from zofo_optim import HybridZOFO

pytestmark = pytest.mark.usefixtures("seeded")
mode = each_of(MODES)


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
