"""Offloaded weights in estimates: pages that are resident, in closed form."""

import mmap

import pytest
import torch
from torch import nn

from zofo_optim.memory import estimate_memory
from zofo_optim.memory.offloaded import _AROUND

WIDTH, ROWS, LAYERS = 1024, 2, 4
LAYER = 4 * WIDTH * WIDTH
X = 4 * ROWS * WIDTH
AROUND = _AROUND * LAYERS
BATCH = dict(x=torch.zeros(ROWS, WIDTH), labels=torch.zeros(ROWS))
STREAMED = dict(perturbation="streamed", offloaded=True, device="cpu")


class Output(dict):
    loss = property(lambda self: self["loss"])


class Stack(nn.Module):
    """Linear layers, one after the other."""

    def __init__(self, device="meta"):
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(LAYERS)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, labels):
        return Output(loss=self.layers(x).square().mean())


def near(size):
    """Up to a few vectors of the batch."""
    return pytest.approx(size, abs=8 * X)


def test_one_layer_is_resident_at_a_time():
    found = estimate_memory(Stack(), "zo", BATCH, **STREAMED)
    assert (found.weights, found.on_disk) == (0, LAYERS * LAYER)
    assert found.peak == near(2 * LAYER + AROUND)  # and its copy
    # one kept aside, displaced beside the one put back before; the first, visited, and its copy
    assert found.verification == near(5 * LAYER + AROUND)


def test_closed_forms_make_no_copies():
    found = estimate_memory(Stack(), "zo", BATCH, structure="low_rank", **STREAMED)
    factors = 4 * LAYERS * 2 * WIDTH
    assert found.peak == near(LAYER + factors + AROUND)
    assert found.update == LAYER
    assert found.visiting == 3 * LAYER + AROUND  # in the verification


def test_a_backward_drops_what_is_behind():
    """And what is left when it ends is a layer at most."""

    class Adapted(Stack):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.adapter = nn.Parameter(torch.zeros(WIDTH, device="meta"))

        def forward(self, x, labels):
            return super().forward(x + self.adapter, labels)

    found = estimate_memory(Adapted(), "lora", BATCH, adapter=None, offloaded=True, device="cpu")
    assert found.visiting == LAYER + AROUND
    assert found.peak == near(LAYER + AROUND)
    assert found.adapter == 4 * WIDTH


def test_rows_of_an_embedding_come_alone():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100_000, WIDTH, device="meta")

        def forward(self, x, labels):
            return Output(loss=self.embedding(x).square().mean())

    ids = dict(x=torch.zeros(ROWS, dtype=torch.long), labels=torch.zeros(ROWS))
    found = estimate_memory(Embedded(), "zo", ids, **STREAMED)
    rows = _AROUND + ROWS * (4 * WIDTH + _AROUND)
    assert found.evaluation == pytest.approx(rows, abs=8 * X)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="offloading needs Linux")
def test_a_model_that_is_offloaded(tmp_path, monkeypatch):
    from zofo_optim.offload import maps, offload_weights

    monkeypatch.setattr(maps, "_IN_MEMORY", ())
    model = Stack(device="cpu").requires_grad_(False)
    offload_weights(model, folder=tmp_path)
    assert estimate_memory(model, "zo", BATCH, **STREAMED) == estimate_memory(
        Stack(), "zo", BATCH, **STREAMED
    )
    with pytest.raises(ValueError, match="offloaded must be True"):
        estimate_memory(model, "zo", BATCH)
