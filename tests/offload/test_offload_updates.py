"""Updates of offloaded weights: one pass over all of them, which is done as a whole or not."""

import pytest
import torch
from conftest import same_bits
from failing import FailAt
from offloaded import ON_LINUX, any_folder  # noqa: F401
from torch import nn

from zofo_kernels import dispatch
from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.offload import in_turn, maps, offload_weights

pytestmark = ON_LINUX


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8).double()).requires_grad_(False)


def closure_of(model):
    x = torch.linspace(-1, 1, 16).view(2, 8)
    return lambda: model[1](model[0](x).double()).square().mean()


def optimizer_of(model, **options):
    groups = hybrid_param_groups(model, zo=dict(lr=1e-2, mu=1e-3), verbose=False)
    return HybridZOFO(groups, perturbation="streamed", **options)


@pytest.mark.parametrize("offloaded", [True, False])
@pytest.mark.parametrize("structure", ["full", "low_rank"])
def test_no_memory_at_any_torch_call(structure, offloaded, tmp_path, monkeypatch):
    """Weights in memory keep this promise; in pieces of a file they keep it too."""
    if dispatch.unavailable_reason("cpu"):
        pytest.skip("without numba a pass may stop half-way")
    monkeypatch.setattr(in_turn, "_PIECE", 1 << 10)
    expected, model = made(), made()
    if offloaded:
        offload_weights(model, folder=tmp_path)
    before = [p.clone() for p in model.parameters()]
    optimizers = [optimizer_of(one, structure=structure) for one in (expected, model)]
    for one, optimizer in zip((expected, model), optimizers, strict=True):
        optimizer.backward(closure_of(one))
    optimizers[0].step()
    place = 0
    while True:
        place += 1
        try:
            with FailAt(place, MemoryError):
                optimizers[1].step()
        except MemoryError:
            assert all(map(same_bits, model.parameters(), before)), place
        else:
            break
    assert place > 10
    assert all(map(same_bits, model.parameters(), expected.parameters()))


def test_pieces_leave_in_turn(tmp_path, monkeypatch):
    """Each as soon as it is written: the next one is as before then."""
    monkeypatch.setattr(in_turn, "_PIECE", 1 << 8)
    model = made()
    offload_weights(model, folder=tmp_path)
    optimizer = optimizer_of(model)
    optimizer.backward(closure_of(model))
    before = [p.clone() for p in model.parameters()]
    changed = []

    class Watched(maps.Pages):
        def drop(self):
            new = zip(model.parameters(), before, strict=True)
            changed.append(sum(int((p != old).sum()) for p, old in new))

    monkeypatch.setattr(in_turn, "pages_of", lambda tensor: watched(maps.pages_of(tensor)))

    def watched(pages):
        return None if pages is None else Watched(*pages)

    optimizer.step()
    assert changed == sorted(set(changed))
    assert changed[-1] == sum(p.numel() for p in model.parameters())
    assert max(b - a for a, b in zip([0, *changed], changed, strict=False)) <= 1 << 6
