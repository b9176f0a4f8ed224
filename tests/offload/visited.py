"""The CPU stands for a device that offloaded weights visit."""

from contextlib import contextmanager

import pytest
import torch
from offloaded import OPTIONS
from tiny_llama import base_model, lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zofo_kernels import matrix_of
from zofo_optim.offload import device_visits, offload_weights, offloading
from zofo_optim.offload.in_turn import is_offloaded
from zofo_optim.offload.target import Target

CASES = [("LoRA", name) for name in OPTIONS]
CASES += [("base", name) for name in OPTIONS if name != "coupled"]  # with first-order groups
MADE = {"base": lambda: base_model().requires_grad_(False), "LoRA": lora}


class Pretended(Target):
    """The CPU, as a device that is visited."""

    def __init__(self, device):
        super().__init__(device)
        self.visited = True

    def keeps(self, weight):
        return matrix_of(weight.shape) is None


class NoHostWeights(TorchDispatchMode):
    """Raises where something computes with a weight on the host, as it would with a GPU's."""

    def __init__(self):
        super().__init__()
        self.allowed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not self.allowed and any(map(is_offloaded, tensors)):
            assert func.is_view, f"{func} computes with a host's weight"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.setattr(offloading, "Target", Pretended)


@pytest.fixture
def watched(monkeypatch):
    """Models in here compute with copies alone."""
    mode = NoHostWeights()

    @contextmanager
    def allowed():
        mode.allowed += 1
        try:
            yield
        finally:
            mode.allowed -= 1

    def allowing(call):
        def made(*args):
            with allowed():
                return call(*args)

        return made

    for name in ("_fetched", "on_device"):
        one = getattr(device_visits.DeviceVisits, name)
        monkeypatch.setattr(device_visits.DeviceVisits, name, allowing(one))
    return mode


def visiting(model, **options):
    offload_weights(model, device="cpu", **options)
    return model


def home(model):
    """All that is frozen and a matrix is on the host."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    assert frozen
    return all(map(is_offloaded, frozen))
