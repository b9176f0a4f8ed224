"""First-order groups are the torch optimizer itself, bit for bit."""

import functools
import warnings

import pytest
import torch
from conftest import each_of
from least_squares import MODES, SGD_FLAGS, SGD_INPUTS, Problem, equal, make, rosenbrock, torch_step
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules

from zofo_optim import HybridZOFO

pytestmark = pytest.mark.usefixtures("seeded")
mode = each_of(MODES)


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
