"""Weights that visit a GPU."""

from contextlib import nullcontext

import pytest
import torch
from conftest import same_bits
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from offloaded import ON_LINUX, OPTIONS, any_folder, trained
from visited import CASES, MADE

from zofo_optim.offload import offload_weights, offloading
from zofo_optim.offload.target import Target

pytestmark = ON_LINUX
__all__ = ["any_folder"]  # fixtures


@pytest.mark.gpu
@pytest.mark.parametrize(("made", "options"), CASES)
def test_a_model_on_a_gpu(made, options, monkeypatch):
    monkeypatch.setattr(offloading, "Target", Target)
    expected, model = MADE[made]().cuda(), MADE[made]()
    offload_weights(model, device="cuda")
    assert model.get_input_embeddings().weight.is_pinned()
    for one in (expected, model):
        trained(one, **OPTIONS[options])
    exact = OPTIONS[options].get("distribution") == "rademacher"  # else backends differ a little
    for (name, p), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        if exact:
            assert same_bits(p.cpu(), theirs.cpu()), name
        else:
            torch.testing.assert_close(p.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_memory_of_a_gpu(graph, monkeypatch):
    """Two layers' weights at a time."""
    monkeypatch.setattr(offloading, "Target", Target)
    layers = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(16)]
    model = nn.Sequential(nn.Linear(2048, 2048), *layers)
    offload_weights(model, device="cuda")
    x = torch.zeros(1, 2048)
    model(x)  # it learns the order
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with nullcontext() if graph else torch.no_grad():
        loss = model(x).sum()
    if graph:
        loss.backward()
    weight = layers[0].weight.nbytes
    assert torch.cuda.max_memory_allocated() - before < 4.5 * weight
