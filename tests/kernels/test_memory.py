"""Weights whose memory is gone, or shared, are refused before an address is used."""

import pytest
import torch

from zofo_kernels import Direction, Region, Regions, Weights, perturb_, perturbed, replay_, update_
from zofo_kernels.direction import Shift
from zofo_kernels.program import Pass, Program

ALONG = Direction(1, 2, 0, "rademacher")

PASSES = {
    "perturb_": lambda w: perturb_(w, ALONG, 0.5),
    "update_": lambda w: update_(w, [ALONG], torch.ones(1), 0.5),
    "replay_": lambda w: replay_(w, Program([Pass((Shift(ALONG, 0.5),))])),
}


def free(tensor):
    tensor.untyped_storage().resize_(0)


def views():
    """Tensors that are their storage, lie in the middle of it, or are strided."""
    return {
        "whole": torch.ones(64),
        "offset": torch.ones(64)[8:24],
        "transposed": torch.ones(8, 8).T,
        "columns": torch.ones(8, 8)[:, 2:4],
    }


@pytest.mark.parametrize("view", views())
@pytest.mark.parametrize("name", PASSES)
def test_freed_storage_is_refused(name, view):
    kept, gone = torch.ones(4), views()[view]
    free(gone)
    with pytest.raises(ValueError, match=r"tensors\[1\] must hold data, got a storage of 0 bytes"):
        PASSES[name]([kept, gone])
    assert kept.eq(1).all()


@pytest.mark.parametrize("view", views())
@pytest.mark.parametrize("name", PASSES)
def test_storage_freed_after_a_pass_is_refused_and_may_come_back(name, view):
    kept, gone = torch.ones(4), views()[view]
    weights = Weights([kept, gone])
    PASSES[name](weights)
    PASSES[name](weights)
    before, size = kept.clone(), gone.untyped_storage().nbytes()
    free(gone)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"tensors\[1\] must hold data"):
            PASSES[name](weights)
        assert torch.equal(kept, before)
    gone.untyped_storage().resize_(size)
    gone.fill_(1)
    PASSES[name](weights)
    assert not torch.equal(kept, before)
    assert gone.ne(1).all()


def test_storage_cut_short_is_refused():
    weight = torch.ones(64)
    weight.untyped_storage().resize_(128)
    with pytest.raises(ValueError, match="a storage of 128 bytes where 256 are needed"):
        perturb_([weight], ALONG, 0.5)


def test_freed_storage_is_refused_by_copies_and_regions():
    weight = torch.ones(64)
    free(weight)
    with pytest.raises(ValueError, match="tensor must hold data"):
        perturbed(weight, ALONG, 0.5)
    with pytest.raises(ValueError, match=r"regions\[0\] must hold data"):
        Regions([Region(weight, 0)])
