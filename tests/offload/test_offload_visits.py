"""How often a step reads a weight: once for all evaluations that share a forward pass."""

import mmap
from collections import Counter
from itertools import groupby

import pytest
import torch
from conftest import same_bits
from offloaded import ON_LINUX, any_folder  # noqa: F401
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.offload import maps, offload_weights

pytestmark = ON_LINUX

WIDTH = mmap.PAGESIZE // 128
"""A product of 32 columns fills a page in fp32."""
PER_EXAMPLE = dict(structure="low_rank", directions="per_example")
CASES = {
    "both sides of all directions at once": (dict(PER_EXAMPLE, estimator="antithetic"), 1),
    "several examples of a direction": (
        dict(PER_EXAMPLE, estimator="antithetic", examples_per_direction=2),
        1,
    ),
    "one side after the other": (dict(PER_EXAMPLE), 2),
    "the clean loss and one side": (dict(PER_EXAMPLE, estimator="one_sided"), 2),
    "one direction": ({}, 2),
    "three directions": (dict(num_samples=3), 6),
}


def made():
    torch.manual_seed(0)
    sizes = [(32, WIDTH), (WIDTH, 32), (32, 2 * WIDTH)]
    layers = [nn.Linear(*size, bias=False) for size in sizes]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def optimizer_of(model, **options):
    directions = options.get("directions", "shared")
    zo = dict(lr=1e-2, mu=1e-3)
    groups = hybrid_param_groups(model, zo=zo, directions=directions, verbose=False)
    return HybridZOFO(groups, perturbation="streamed", **options)


@pytest.mark.parametrize("case", CASES)
def test_visits(case, tmp_path, monkeypatch):
    options, visits = CASES[case]
    expected, model = made().requires_grad_(False), made().requires_grad_(False)
    offload = offload_weights(model, folder=tmp_path)
    assert offload.nbytes == 4 * mmap.PAGESIZE  # no two weights share a page
    events = []
    for name in ("prefetch", "drop"):
        do = getattr(maps.Pages, name)

        def seen(pages, name=name, do=do):
            found = range(pages.start, pages.stop, mmap.PAGESIZE)
            events.extend((name, page) for page in found)
            return do(pages)

        monkeypatch.setattr(maps.Pages, name, seen)
    x = torch.linspace(-1, 1, 32).repeat(8, 1)  # pairs are of the same example
    pairs = [(one, optimizer_of(one, **options)) for one in (expected, model)]
    for _ in range(3):
        for one, optimizer in pairs:
            events.clear()

            def closure(one=one):
                losses = one(x).square().mean(1)
                return losses if "directions" in options else losses.mean()

            optimizer.backward(closure)
            evaluated = list(events)
            optimizer.step()
    assert all(map(same_bits, model.parameters(), expected.parameters()))
    counts = Counter(evaluated)
    for page in range(0, offload.nbytes, mmap.PAGESIZE):
        assert counts["prefetch", page] == visits
        own = [name for name, _ in groupby(n for n, number in evaluated if number == page)]
        if page != 0:  # the first one is read ahead at the end of the pass before
            assert own == ["prefetch", "drop"] * visits
