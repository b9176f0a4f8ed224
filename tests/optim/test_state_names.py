"""State dicts go by a parameter's place; where both sides have names, their order must agree."""

import copy

import pytest
import torch
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    made[2].requires_grad_(False)
    return made


def named(model, mode, order=1):
    frozen = mode == "zo"
    pairs = [(n, p) for n, p in model.named_parameters() if p.requires_grad != frozen]
    return dict(params=pairs[::order], mode=mode, lr=1e-2)


def trained(model, *groups):
    optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.Adam)
    optimizer.step(lambda: model(torch.ones(4)).square().sum())
    return optimizer


@pytest.mark.parametrize("turned", ["zo", "fo"])
def test_another_order_is_refused(turned):
    model = net()
    state = trained(model, named(model, "fo"), named(model, "zo")).state_dict()
    order = {"fo": 1, "zo": 1, turned: -1}
    other = HybridZOFO(
        [named(model, mode, order[mode]) for mode in ("fo", "zo")], fo_optimizer=torch.optim.Adam
    )
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"state_dict must have the parameters of group [01] .*at another place"
    ):
        other.load_state_dict(state)
    assert other.state_dict() == before  # no state: comparing it compares no tensors
    for group in state["param_groups"]:
        group.pop("param_names")
    other.load_state_dict(state)


def test_other_names_are_taken_as_in_torch():
    model = net()
    state = trained(model, named(model, "fo")).state_dict()
    state["param_groups"][0]["param_names"][1] = "else"
    for kind in (torch.optim.Adam, HybridZOFO):
        other = kind([{k: v for k, v in named(model, "fo").items() if k != "mode"}])
        other.load_state_dict(state)
        assert other.param_groups[0]["param_names"][:2] == ["0.weight", "else"]
    names = state["param_groups"][0]["param_names"]
    names[1:] = ["1.weight", "0.bias", "else"]
    with pytest.raises(ValueError, match=r"'1\.weight' at place 1, which is at another place"):
        other.load_state_dict(state)


@pytest.mark.parametrize("saved_wrapped", [True, False])
def test_wrappers_may_differ(saved_wrapped):
    def optimizer_of(wrapped):
        model = net()
        model = torch.compile(model, backend="eager") if wrapped else model
        groups = hybrid_param_groups(model, zo=dict(lr=1e-2), verbose=False)
        optimizer = HybridZOFO(groups)
        optimizer.step(lambda: model(torch.ones(4)).square().sum())
        return optimizer

    state = optimizer_of(saved_wrapped).state_dict()
    other = optimizer_of(not saved_wrapped)
    names = [group["param_names"] for group in other.param_groups]
    other.load_state_dict(state)
    assert [group["param_names"] for group in other.param_groups] == names


def test_unnamed_parameters_go_by_place():
    model = net()
    params = [p for p in model.parameters() if p.requires_grad]
    state = trained(model, dict(params=params)).state_dict()
    HybridZOFO([named(model, "fo")], fo_optimizer=torch.optim.Adam).load_state_dict(state)
