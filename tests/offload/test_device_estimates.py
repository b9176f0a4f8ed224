"""Estimates of memory where weights visit a device, against what steps take there."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from offloaded import ON_LINUX
from torch import nn
from visited import pretended

from experiments.measure import peak_memory
from experiments.memory import cases
from experiments.memory.resident import METHODS
from zofo_optim.memory import estimate, estimate_memory
from zofo_optim.memory.device_visits import VisitingDevice
from zofo_optim.offload import offload_weights
from zofo_optim.offload.device_visits import visits_of
from zofo_optim.offload.in_turn import is_offloaded

pytestmark = [*ON_LINUX, pytest.mark.filterwarnings("ignore")]
__all__ = ["pretended"]  # a fixture


@pytest.fixture(autouse=True)
def visited_cpu(monkeypatch):
    """Estimates for "cpu" are of a CPU that weights visit, as of a GPU."""
    monkeypatch.setattr(estimate, "_offloaded", lambda made, asked: VisitingDevice(made))


@pytest.mark.parametrize(
    ("model", "name", "weights"),
    [
        ("Llama", "zo, streamed", "fp32"),
        ("Llama", "zo, per example", "bf16"),
        ("OPT", "hybrid, low rank, checkpointed", "fp32"),
        ("Llama", "lora, AdamW", "fp32"),
    ],
)
def test_steps(model, name, weights):
    config, (method, options) = cases.MODELS[model](), METHODS[name]
    found = estimate_memory(config, method, cases.BATCH, weights=weights, device="cpu", **options)
    made = cases.loaded(config, weights, torch.device("cpu")).requires_grad_(False)
    offload_weights(made, device="cpu")
    made = cases.with_adapter(made, method, options)
    optimizer, step = cases.training(made, config, method, options, weights, cases.BATCH)
    sizes = [p.nbytes for p in made.parameters() if is_offloaded(p)]
    first = peak_memory(step, made, optimizer, torch.device("cpu")) - sum(sizes)
    optimizer.zero_grad()
    later = peak_memory(step, made, optimizer, torch.device("cpu")) - sum(sizes)
    assert found.on_host == sum(sizes)
    assert found.on_disk == 0
    assert found.peak == pytest.approx(later, rel=0.01)
    # verification keeps the content of the largest weight on the host, which is the device here
    assert first - (max(sizes) if method == "zo" else 0) <= found.most * 1.01
    assert found.most <= 1.01 * max(first, later)


class Output(dict):
    loss = property(lambda self: self["loss"])


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(256, 256, device="meta") for _ in range(4)])

    def forward(self, x, labels):
        return Output(loss=self.layers(x).square().mean())


def test_a_layer_and_the_next_are_there():
    model, layer = Stack(), 4 * 256 * 256
    batch = dict(x=torch.zeros(1, 256), labels=torch.zeros(1))
    options = dict(perturbation="streamed", offloaded=True, device="cpu")
    found = estimate_memory(model, "zo", batch, **options)
    assert (found.on_host, found.visiting) == (4 * layer, 2 * layer)
    assert found.weights == 4 * 4 * 256  # biases stay
    assert found.peak == pytest.approx(found.weights + 3 * layer, abs=20_000)  # and a copy
    assert not model.layers[0]._forward_hooks  # a copy was rehearsed
    assert visits_of(model.layers[0].weight) is None
