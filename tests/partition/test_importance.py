"""Importances are what the gradients and the optimizer's first step say, and nothing is changed."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zofo_optim.costs import costs_of
from zofo_optim.costs.memory import LiveBytes
from zofo_optim.partition.importance import profile_of
from zofo_optim.partition.trial_step import TrialStep

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
SGD = TrialStep(torch.optim.SGD, dict(lr=0.1))


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
            self.norm = nn.BatchNorm1d(5)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))


def tensors_of(model):
    return dict(model.named_parameters())


def loss_of(model, x=X):
    return lambda: model(x).square().mean()


def gradients(model, closure):
    model.zero_grad()
    closure().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expected(model, closures, cls, options):
    """By a real step of all tensors at once, on copies."""
    total = dict.fromkeys(tensors_of(model), 0.0)
    for closure in closures:
        for name, g in gradients(model, closure).items():
            w = tensors_of(model)[name].detach().double()
            copy = nn.Parameter(w.clone())
            copy.grad = g.double()
            cls([copy], **options).step()
            total[name] += -(g.double() * (copy.detach() - w)).sum().item() / len(closures)
    largest = max(map(abs, total.values()))
    return {name: value / largest for name, value in total.items()}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, dict(lr=1e-6)),
        (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.5)),
        (torch.optim.AdamW, dict(lr=2e-5, weight_decay=0.0)),
        (torch.optim.AdamW, dict(lr=2e-5, betas=(0.8, 0.9), weight_decay=0.1)),
        (torch.optim.Adagrad, dict(lr=1e-2)),
        (torch.optim.Adafactor, dict(lr=1e-2)),
    ],
)
def test_agrees_with_a_real_step(cls, options):
    model = Net().eval()
    closures = [loss_of(model), loss_of(model, X[:3] * 2)]
    found = profile_of(model, closures, tensors_of(model), TrialStep(cls, options))
    assert found.importance == pytest.approx(expected(model, closures, cls, options), rel=1e-9)
    assert max(map(abs, found.importance.values())) == 1.0
    assert found.gradient_norm["unused.weight"] == 0.0


def test_sgd_orders_by_the_gradient_as_the_loss_decreases():
    """I_k is what the loss loses when tensor k alone makes its step, to first order."""
    model = Net().eval()
    found = profile_of(model, [loss_of(model)], tensors_of(model), SGD)
    before, norms = gradients(model, loss_of(model)), found.gradient_norm
    assert norms["first.weight"] == pytest.approx(before["first.weight"].norm().item())
    ratio = (norms["first.weight"] / norms["second.bias"]) ** 2
    found = found.importance
    assert found["first.weight"] / found["second.bias"] == pytest.approx(ratio)


def test_maximize_counts_what_is_gained():
    model = Net().eval()
    step = TrialStep(torch.optim.SGD, dict(lr=0.1, maximize=True))
    found = profile_of(model, [loss_of(model)], tensors_of(model), step).importance
    assert found == pytest.approx(
        profile_of(model, [loss_of(model)], tensors_of(model), SGD).importance
    )


def test_everything_is_as_before():
    model = Net(dropout=0.5)
    model.first.bias.requires_grad_(False)
    aside = torch.ones(5, 4)
    model.first.weight.grad = aside
    contents = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    required = [p.requires_grad for p in model.parameters()]
    draws = []
    for profiled in (False, True):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
        if profiled:

            def closure():
                np.random.rand(), random.random()  # noqa: NPY002
                return model(X).square().mean()

            chosen = {"first.bias": model.first.bias, "second.weight": model.second.weight}
            found = profile_of(model, [closure, closure], chosen, SGD)
            assert set(found.importance) == set(chosen)
            assert min(found.importance.values()) > 0
        draws.append((torch.rand(2).tolist(), np.random.rand(), random.random()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert all(torch.equal(contents[name], value) for name, value in model.state_dict().items())
    assert versions == [p._version for p in model.parameters()]
    assert required == [p.requires_grad for p in model.parameters()]
    assert model.first.weight.grad is aside
    assert torch.equal(aside, torch.ones(5, 4))
    assert all(p.grad is None for p in model.parameters() if p is not model.first.weight)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_are_freed_as_they_come():
    """When the lowest tensor's gradient is there, no other is."""
    model = Net().eval()
    alive = []

    def look(p):
        alive.append([name for name, q in model.named_parameters() if q.grad is not None])

    handle = model.first.weight.register_post_accumulate_grad_hook(look)  # before ours
    profile_of(model, [loss_of(model)], tensors_of(model), SGD)
    handle.remove()
    assert alive == [["first.weight"]]


def test_closures_that_call_backward_themselves():
    model = Net().eval()
    expected = profile_of(model, [loss_of(model)], tensors_of(model), SGD)

    def own():
        model.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss.item()

    def in_micro_batches():
        for part in X.split(2):
            (model(part).square().mean() / 3).backward()
        return 0.0

    for closure in (own, in_micro_batches):
        found = profile_of(model, [closure], tensors_of(model), SGD)
        assert found.importance == pytest.approx(expected.importance, rel=1e-5)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    """Re-entrant checkpoints of a tensor used twice give its gradient in parts."""
    model = Net(dropout=0.3)
    x = X.clone().requires_grad_()

    def closure(segment):
        hidden = segment(lambda h: model.dropout(model.first(h)), x)
        hidden = segment(lambda h: model.dropout(model.first(h)), hidden[:, :4])
        return model.second(hidden).square().mean()

    found = []
    for run in (lambda f, h: f(h), lambda f, h: checkpoint(f, h, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        closure_ = lambda run=run: closure(run)  # noqa: E731
        found.append(profile_of(model, [closure_], tensors_of(model), SGD))
    assert found[0].importance == pytest.approx(found[1].importance, rel=1e-5)


def test_losses_of_examples_are_averaged():
    model = Net().eval()
    found = profile_of(model, [lambda: model(X).square().mean(1)], tensors_of(model), SGD)
    whole = profile_of(model, [loss_of(model)], tensors_of(model), SGD)
    assert found.importance == pytest.approx(whole.importance)


def test_16_bits_and_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4)).bfloat16()
    model[2].weight = model[0].weight
    step = TrialStep(torch.optim.SGD, dict(lr=1e-9))  # far below the spacing of the weights
    x = X.bfloat16()
    found = profile_of(model, [lambda: model(x).float().square().mean()], tensors_of(model), step)
    assert set(found.importance) == {"0.weight", "2.bias"}
    assert min(found.importance.values()) > 0


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda model: 1.5, TypeError, "with a graph, or call backward itself, got float 1.5"),
        (lambda model: torch.ones(()), TypeError, r"got a tensor without one, of shape \(\)"),
        (lambda model: None, TypeError, "got NoneType"),
        (lambda model: model(X), ValueError, "scalar loss"),
        (lambda model: model(X).sum() * torch.inf, FloatingPointError, "not, of '"),
    ],
)
def test_refusals(closure, error, message):
    model = Net().eval()
    with pytest.raises(error, match=message):
        profile_of(model, [lambda: closure(model)], tensors_of(model), SGD)
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_rate_of_0_tells_nothing():
    model = Net().eval()
    with pytest.raises(ValueError, match=r"learning rate by which some tensor moves.*lr=0\.0"):
        profile_of(
            model,
            [loss_of(model)],
            tensors_of(model),
            TrialStep(torch.optim.SGD, dict(lr=0.0)),
        )
    with pytest.raises(ValueError, match="got none"):
        profile_of(model, [], tensors_of(model), SGD)


def test_options_are_those_of_the_class():
    with pytest.raises(TypeError, match="'betas' is no option"):
        TrialStep(torch.optim.SGD, dict(lr=0.1, betas=(0.9, 0.9)))
    TrialStep(torch.optim.SGD, dict(lr=0.1, initial_lr=0.1, mode="fo"))


def test_greentrainers_importance_is_the_same_to_first_order():
    """Its gradients are those after the step; the difference shrinks with the learning rate."""
    differences = []
    for lr in (1e-2, 1e-3):
        model = Net().eval().double()
        closure = loss_of(model, X.double())
        step = TrialStep(torch.optim.SGD, dict(lr=lr))
        ours = profile_of(model, [closure], tensors_of(model), step).importance
        before = gradients(model, closure)
        with torch.no_grad():
            for name, g in before.items():
                tensors_of(model)[name].sub_(lr * g)
        after = gradients(model, closure)
        theirs = {name: lr * (after[name] * before[name]).sum().item() for name in before}
        largest = max(map(abs, theirs.values()))
        differences.append(max(abs(theirs[n] / largest - ours[n]) for n in theirs))
    assert 0 < differences[1] < 0.2 * differences[0]
    assert differences[0] < 0.05


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_trial_takes_little_memory_beside_the_tensor(cls):
    w, g = (torch.randn(2000, 2000).bfloat16() for _ in range(2))
    step = TrialStep(cls, dict(lr=1e-3))
    with LiveBytes() as watch:
        step.of(w, g)
    assert watch.most < 2 * w.nbytes + (1 << 24)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("AdamW", (1100, 1000)),
        ("RMSprop", (1100, 1000)),
        ("Adafactor", (1100, 1000)),  # its steps depend on rows and columns
        ("Muon", (600, 500)),
    ],
)
def test_parts_make_the_step_of_the_whole(name, shape):
    cls = getattr(torch.optim, name, None)
    if cls is None:
        pytest.skip(f"this torch has no {name}")
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(shape, generator=generator).double() for _ in range(2))
    options = dict(lr=1e-2, weight_decay=0.1)
    tiny = TrialStep(cls, {**options, "lr": 1e-10})
    assert tiny._is_elementwise() is (name in ("AdamW", "RMSprop"))
    told = TrialStep(cls, options).of(w, g.t().contiguous().t())
    moved = nn.Parameter(w.clone())
    moved.grad = g.clone()
    cls([moved], **options).step()
    rel = 1e-3 if name == "Muon" else 1e-9  # which multiplies in bf16
    assert told.gain.item() == pytest.approx(-(g * (moved.detach() - w)).sum().item(), rel=rel)
    assert told.square.item() == pytest.approx(g.square().sum().item())


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)])
def test_capturable_optimizers(lr):
    """Their steps are tried where they cannot be captured."""
    model = Net().eval()
    options = dict(lr=lr, capturable=True)
    step = TrialStep(torch.optim.AdamW, options)
    plain = TrialStep(torch.optim.AdamW, dict(lr=1e-2))
    found, expected = (
        profile_of(model, [loss_of(model)], tensors_of(model), s) for s in (step, plain)
    )
    assert found.importance == pytest.approx(expected.importance, rel=1e-5)
    costs = costs_of(model, loss_of(model), fo_optimizer=torch.optim.AdamW, fo=step.options)
    same = costs_of(model, loss_of(model), fo_optimizer=torch.optim.AdamW)
    assert [t.state_bytes for t in costs.tensors] == [t.state_bytes for t in same.tensors]


def test_large_buffers_are_put_back(monkeypatch):
    monkeypatch.setattr("zofo_optim.buffers._ROOM", 8)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)
            self.register_buffer("seen", torch.zeros(100))

        def forward(self, x):
            self.seen += 1
            return self.linear(x).square().mean()

    model = Counting()
    profile_of(model, [lambda: model(X)], tensors_of(model), SGD)
    costs_of(model, lambda: model(X))
    assert not model.seen.any()


def test_inference_mode_of_the_caller_does_not_matter():
    model = Net().eval()
    expected = profile_of(model, [loss_of(model)], tensors_of(model), SGD)
    with torch.inference_mode():
        step = TrialStep(torch.optim.SGD, dict(lr=0.1))
        assert profile_of(model, [loss_of(model)], tensors_of(model), step) == expected
