"""Base weights are found by name, whatever a model was wrapped in when they were saved."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from zofo_optim import (
    HybridZOFO,
    hybrid_param_groups,
    load_base_weights,
    load_hybrid,
    save_base_weights,
    save_hybrid,
)

pytest.importorskip("safetensors")


def net(fill=None):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
    for p in made.parameters() if fill is not None else ():
        nn.init.constant_(p, fill)
    return made


def compiled_block(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "block": compiled_block,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


def optimizer_of(model):
    return HybridZOFO(hybrid_param_groups(model, zo=dict(lr=1e-2), verbose=False))


@pytest.mark.parametrize("theirs", WRAPPERS)
@pytest.mark.parametrize("ours", WRAPPERS)
def test_saved_in_one_wrapper_and_loaded_in_another(ours, theirs, tmp_path):
    model = WRAPPERS[ours](net())
    wanted = [p.clone() for p in model.parameters()]
    file = save_base_weights(optimizer_of(model), model, tmp_path)
    assert sorted(load_file(file)) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    fresh = WRAPPERS[theirs](net(fill=7))
    load_base_weights(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), wanted, strict=True))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_files_of_versions_that_kept_the_wrapper(wrapper, tmp_path):
    from safetensors.torch import save_file

    model = WRAPPERS[wrapper](net())
    weights = {name: p.contiguous() for name, p in model.named_parameters()}
    save_file(weights, tmp_path / "zo_weights.safetensors")
    fresh = net(fill=7)
    load_base_weights(fresh, tmp_path)
    wanted = model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), wanted, strict=True))


@pytest.mark.parametrize("learns", ["0", "2", "nothing"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_hybrids(wrapper, learns, tmp_path):
    model = WRAPPERS[wrapper](net())
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(learns in name.split("."))
    optimizer = optimizer_of(model)
    optimizer.step(lambda: model(torch.ones(3)).sum())
    wanted = [p.detach().clone() for p in model.parameters()]
    save_hybrid(model, optimizer, tmp_path)
    fresh, _ = load_hybrid(tmp_path, net(fill=7))
    for name, p in fresh.named_parameters():
        assert p.requires_grad == name.startswith(learns)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), wanted, strict=True))


def test_two_weights_of_one_name(tmp_path):
    model = net()
    model[0].base_layer = copy.deepcopy(model[0])
    with pytest.raises(ValueError, match=r"one weight of the name '0\.weight', .*'0\.base_layer"):
        save_base_weights(optimizer_of(model), model, tmp_path)
