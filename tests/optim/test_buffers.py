"""Buffers that a closure changes change once a step, as by one evaluation."""

import copy

import pytest
import torch
from conftest import each_of
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups

perturbation = each_of(["in_place", "streamed"])


class Counting(nn.Module):
    """Changes its buffers in every way that there is; its loss depends on them."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.linspace(0.5, 1.0, 4), requires_grad=False)
        self.head = nn.Parameter(torch.ones(4))
        for name in ("counted", "replaced", "hidden", "late", "still"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("absent", None)
        self.steps = 0

    def forward(self):
        loss = (self.base * self.head).square().sum() * (1 + self.counted + self.hidden)
        loss = loss + self.replaced + self.late + self.still
        self.counted += 1
        self.replaced = self.replaced + 1
        self.hidden.data.add_(1)
        if self.steps >= 2:
            self.late += 1
        return loss


def stepped(model, steps, **options):
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), fo=dict(lr=1e-3), verbose=False)
    optimizer = HybridZOFO(groups, **options)
    for step in range(steps):
        model.steps = step
        optimizer.zero_grad()
        optimizer.step(model)
    return optimizer


def values(model):
    return {name: float(buffer) for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
def test_buffers_change_once_a_step(estimator, perturbation):
    model = Counting()
    stepped(model, 5, estimator=estimator, num_samples=2, perturbation=perturbation)
    assert values(model) == dict(counted=5.0, replaced=5.0, hidden=5.0, late=3.0, still=0.0)


def test_every_evaluation_starts_from_the_same_buffers(perturbation):
    """Else the losses of a pair would differ by more than the perturbation."""
    model = Counting()
    seen = []
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), fo=dict(lr=1e-3), verbose=False)
    optimizer = HybridZOFO(groups, perturbation=perturbation, num_samples=2)

    def closure():
        seen.append(tuple(values(model).values()))
        return model()

    for step in range(3):
        seen.clear()
        optimizer.step(closure)
        assert len(set(seen)) == 1
        assert seen[0][:3] == (step, step, step)


def batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    model[0].requires_grad_(False)
    return model


def test_batch_norm_moves_as_in_a_plain_loop(perturbation):
    batches = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(1))
    model, plain = batch_norm(), batch_norm()
    groups = hybrid_param_groups(model, zo=dict(lr=0.0), fo=dict(lr=1e-2), verbose=False)
    optimizer = HybridZOFO(groups, perturbation=perturbation)
    expected = torch.optim.SGD(plain[1:].parameters(), lr=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        optimizer.step(lambda batch=batch: model(batch).square().mean())
        expected.zero_grad()
        plain(batch).square().mean().backward()
        expected.step()
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert int(model[1].num_batches_tracked) == len(batches)


def test_an_exception_leaves_them_as_after_the_first_evaluation():
    model, calls = Counting(), []
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), fo=dict(lr=1e-3), verbose=False)

    def closure():
        loss = model()
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("third")
        return loss

    with pytest.raises(KeyError, match="third"):
        HybridZOFO(groups).step(closure)
    assert values(model)["counted"] == 1.0


def test_it_can_be_turned_off_or_given_a_module():
    model = Counting()
    with pytest.warns(UserWarning, match="closure gave two losses"):  # they depend on the buffers
        stepped(model, 1, restore_buffers=False)
    assert values(model)["counted"] > 1
    model = Counting()
    optimizer = HybridZOFO([model.base], mode="zo", lr=1e-3, restore_buffers=model)
    optimizer.step(model)
    assert values(model)["counted"] == 1
    with pytest.raises(TypeError, match=r"restore_buffers must be a bool or a torch\.nn\.Module"):
        HybridZOFO([model.base], mode="zo", lr=1e-3, restore_buffers=[model])


@pytest.mark.parametrize("given", [True, False, "module"])
def test_a_copy_of_model_and_optimizer_restores_the_copied_models_buffers(given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    batch = torch.randn(8, 4)
    groups = hybrid_param_groups(model, zo=dict(lr=0.1), verbose=False)
    restored = model[1] if given == "module" else given
    optimizer = HybridZOFO(groups, restore_buffers=restored)
    other, again = copy.deepcopy((model, optimizer))
    for one, its in ((model, optimizer), (other, again)):
        for _ in range(2):
            its.step(lambda one=one: one(batch).square().mean() + one[0].weight.sum())
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert (int(other[1].num_batches_tracked) == 2) == bool(given)


def test_groups_are_a_list_and_a_copied_optimizer_works():
    model = Counting()
    optimizer = stepped(model, 1)
    assert isinstance(hybrid_param_groups(model, verbose=False), list)
    with pytest.warns(UserWarning, match="closure gave two losses"):  # a copy restores no buffers
        copy.deepcopy(optimizer).step(model)


def test_buffers_that_cannot_be_copied_are_left_alone():
    model = Counting()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("rows", torch.eye(3).to_sparse_csr())
    model.register_buffer("meta", torch.ones(3, device="meta"))
    model.register_buffer("packed", torch.ones(3).to(torch.float8_e4m3fn))
    stepped(model, 3)
    assert float(model.counted) == 3


def test_large_buffers_go_by_their_versions(monkeypatch):
    """The first step takes no copies of them; those that change are copied from then on."""
    monkeypatch.setattr("zofo_optim.buffers._ROOM", 0)
    model = Counting()
    optimizer = stepped(model, 1)
    changed = float(model.counted)
    optimizer.zero_grad()
    optimizer.step(model)
    assert model.counted == changed + 1
