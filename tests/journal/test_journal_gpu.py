"""Journals of trainings on a GPU: no waiting for the device, replays there and on the CPU."""

import pytest
import torch
from conftest import same_bits
from torch import nn

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay
from zofo_optim.journal import read

pytestmark = pytest.mark.gpu


def job(dtype, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 257), nn.Tanh(), nn.Linear(257, 1)).to("cuda", dtype)
    model.requires_grad_(False)
    base = {name: p.clone() for name, p in model.named_parameters()}
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    x = torch.randn(8, 64, device="cuda").to(dtype)
    optimizer = HybridZOFO(groups, **options)
    return model, base, optimizer, lambda: model(x).float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_replay_gives_the_trained_weights(dtype, perturbation, distribution, tmp_path):
    path = tmp_path / "run.zofo"
    model, base, optimizer, loss = job(dtype, perturbation=perturbation, distribution=distribution)
    with Journal(path).attach(optimizer):
        for _ in range(6):
            optimizer.step(loss)
    here = {name: p.clone() for name, p in base.items()}
    assert replay(here, path) == (0, 6, True)
    for name, p in model.named_parameters():
        assert same_bits(here[name].cpu(), p.cpu())
    if distribution == "rademacher":
        there = {name: p.cpu() for name, p in base.items()}
        assert replay(there, path).verified
        for name, p in model.named_parameters():
            assert same_bits(there[name], p.cpu())


def test_records_do_not_wait_for_the_device(tmp_path):
    path = tmp_path / "run.zofo"
    _, _, optimizer, loss = job(torch.float32)
    journal = Journal(path, fsync_every=0).attach(optimizer)
    optimizer.step(loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    journal.flush()
    assert read(path).stop == 4
    journal.close()
