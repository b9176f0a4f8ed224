"""Models of a few weights, and their streamed steps against weights that are really perturbed."""

import copy

import torch
from conftest import same_bits
from torch import nn
from torch.nn import Parameter

from zofo_kernels import Direction, perturbed, update_
from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.evaluation import evaluate

MU, LR, SEED = 2.0**-7, 1e-2, 5


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(*shape, high=7, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def score(value):
    """A loss of any output, in which all elements count differently."""
    value = value.float()
    factors = torch.linspace(0.5, 1.5, max(value.numel(), 1))[: value.numel()]
    return (value.reshape(-1) * factors).sum()


class Call(nn.Module):
    """``function(x, **weights)`` as a module; keywords are parameters or modules."""

    def __init__(self, function, *inputs, **parts):
        super().__init__()
        self.function, self.inputs, self.names = function, inputs, list(parts)
        for name, part in parts.items():
            setattr(self, name, Parameter(part) if type(part) is torch.Tensor else part)

    def forward(self):
        return score(self.function(*self.inputs, **{n: getattr(self, n) for n in self.names}))


def frozen(model, dtype=None):
    """The same weights whatever ran before, not much smaller than 1, without gradients."""
    for index, p in enumerate(model.parameters()):
        if p.is_floating_point():
            p.data = p.data.copy_(0.3 + 0.2 * randn(*p.shape, seed=index))  # keeps the strides
    return model.to(dtype).requires_grad_(False)


def trained(model, **options):
    options = {"perturbation": "streamed", "distribution": "rademacher", "mu": MU} | options
    groups = hybrid_param_groups(model, zo={"lr": LR}, fo={"lr": LR}, verbose=False)
    return HybridZOFO(groups, seed=SEED, **options)


def contents(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model, expected):
    for (name, p), old in zip(model.named_parameters(), expected, strict=True):
        assert same_bits(p.detach(), old), name


def assert_matches(model, loss=lambda model: model(), *, steps=3, distribution="rademacher"):
    """Losses and weights of ``steps`` steps, against weights that are really perturbed."""
    simulated = copy.deepcopy(model)
    optimizer = trained(model, distribution=distribution)
    names = optimizer.param_groups[0]["param_names"]
    zo = [simulated.get_parameter(name) for name in names]
    fo = [p for p in simulated.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(fo, lr=LR) if fo else None
    for step in range(steps):
        seen, reference = [], []
        before, state = contents(model), torch.get_rng_state()

        def closure(seen=seen):
            value = loss(model)
            seen.append(value.detach().clone())
            return value

        optimizer.zero_grad()
        optimizer.backward(closure)
        assert_same(model, before)
        torch.set_rng_state(state)
        if sgd:
            sgd.zero_grad()
            evaluate(lambda: loss(simulated), gradients=True)
        direction = Direction(SEED, step, 0, distribution)
        kept = [p.detach().clone() for p in zo]
        for sign in (1, -1):
            torch.set_rng_state(state)
            for index, (p, old) in enumerate(zip(zo, kept, strict=True)):
                p.data.copy_(perturbed(old, direction, sign * MU, index=index))
            reference.append(evaluate(lambda: loss(simulated), gradients=False).loss)
            for p, old in zip(zo, kept, strict=True):
                p.data.copy_(old)
        plus, minus = seen[1 if fo else 0], seen[-1]
        assert torch.equal(plus.to(reference[0]), reference[0])
        assert torch.equal(minus.to(reference[1]), reference[1])
        assert not torch.equal(plus, minus)
        coefficient = ((reference[0] - reference[1]) / 2 / MU).reshape(1)
        assert torch.equal(optimizer.projected_grads.reshape(1), coefficient)
        optimizer.step()
        update_(zo, [direction], coefficient, LR)
        if sgd:
            assert any(p.grad is not None and p.grad.any() for p in fo)
            sgd.step()
        for (name, p), q in zip(model.named_parameters(), simulated.parameters(), strict=True):
            assert same_bits(p.detach(), q.detach()), name
    return optimizer


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


class Around(nn.Module):
    def __init__(self, module, *inputs):
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self):
        return score(first_tensor(self.module(*self.inputs)))
