"""Journals find their parameters by name, whatever the model was wrapped in, and refuse by name."""

import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay
from zofo_optim.journal import JournalError

WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)


def optimizer_of(model):
    groups = hybrid_param_groups(model, zo=dict(lr=1e-2), verbose=False)
    return HybridZOFO(groups, distribution="rademacher")


def steps(model, optimizer, count=2):
    for _ in range(count):
        optimizer.step(lambda: model(torch.ones(3)).square().sum())


@pytest.mark.parametrize("theirs", WRAPPERS)
@pytest.mark.parametrize("ours", WRAPPERS)
def test_wrapped_models(ours, theirs, tmp_path):
    model = WRAPPERS[ours](net()).requires_grad_(False)
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run").attach(optimizer):
        steps(model, optimizer)
    fresh = WRAPPERS[theirs](net()).requires_grad_(False)
    assert replay(fresh, tmp_path / "run").verified
    assert all(map(same_bits, fresh.parameters(), model.parameters()))
    # and training goes on in the other wrapper
    other = optimizer_of(fresh)
    other.load_state_dict(optimizer.state_dict())
    with Journal(tmp_path / "run", resume=True).attach(other):
        steps(fresh, other)
    steps(model, optimizer)
    assert all(map(same_bits, fresh.parameters(), model.parameters()))
    assert replay(net(), tmp_path / "run").verified


def test_another_order_is_refused_by_name(tmp_path):
    model = net()
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run").attach(optimizer):
        steps(model, optimizer)
    turned = list(model.named_parameters())[::-1]
    other = HybridZOFO([dict(params=turned, mode="zo", lr=1e-2)], distribution="rademacher")
    other.param_groups[0]["zo_step"] = 2
    message = r"'0\.weight' at place 0, which is at another place here, where '2\.bias' is"
    with pytest.raises(JournalError, match=f"must have the names of .* journal has {message}"):
        Journal(tmp_path / "run", resume=True).attach(other)
