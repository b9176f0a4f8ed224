"""Weights whose memory is gone, or shared, are refused before an address is used."""

from itertools import product

import pytest
import torch

from zofo_kernels import Direction, Region, Regions, Weights, perturb_, perturbed, replay_, update_
from zofo_kernels.direction import Shift
from zofo_kernels.memory import first_shared
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


def pieces(*slices):
    base = torch.ones(16, 16)
    return [base[at] for at in slices]


def flat(*slices):
    base = torch.ones(64)
    return [base[at] for at in slices]


ALL = slice(None)
SHARED = {  # tensors, and positions of two that share memory
    "one reaches into the other": (flat(slice(8), slice(4, 16)), (0, 1)),
    "the same": (flat(ALL, ALL), (0, 1)),
    "within, past a smaller one": (flat(ALL, slice(8), slice(40, 48)), (0, 1)),
    "backwards": (flat(slice(20, 30), slice(8), slice(8, 25)), (0, 2)),
    "rows and a column": (pieces((slice(4, 6)), (ALL, 3)), (0, 1)),
    "columns that meet": (pieces((ALL, slice(0, 9)), (ALL, slice(8, 16))), (0, 1)),
    "the transposed": ([(square := torch.ones(16, 16)), square.T], (0, 1)),
    "another dtype": ([(base := torch.ones(64))[:9], base[8:20].view(torch.float64)], (0, 1)),
    "half an element": ([(word := torch.ones(8))[2:3], word.view(torch.float16)[5:6]], (0, 1)),
}

APART = {
    "neighbours": flat(slice(8), slice(8, 16), slice(16, 17)),
    "columns": pieces((ALL, slice(0, 8)), (ALL, slice(8, 16))),
    "interleaved": pieces((ALL, slice(0, None, 2)), (ALL, slice(1, None, 2))),
    "a row in the gap of columns": pieces((ALL, slice(0, 8)), (3, slice(8, 16))),
    "empty ones": flat(slice(8), slice(4, 4), slice(3, 3)),
    "halves of a word": [
        (words := torch.ones(8)).view(torch.float16)[0::2],
        words.view(torch.float16)[1::2],
    ],
    "dtypes side by side": [(two := torch.ones(64))[:8], two[8:20].view(torch.float64)],
    "channels last": [torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)],
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_memory_is_refused(case):
    tensors, (first, second) = SHARED[case]
    before = [t.clone() for t in tensors]
    for order in (tensors, tensors[::-1]):
        with pytest.raises(ValueError, match=r"tensors\[\d\] must not share memory with tensors"):
            perturb_(order, ALONG, 0.5)
    assert first_shared(tensors) == (first, second)
    assert first_shared([tensors[first]], [tensors[second]]) == (0, 1)
    assert first_shared([], tensors) is None
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("case", APART)
def test_tensors_in_the_gaps_of_others_are_weights(case):
    tensors = APART[case]
    expected = [t.contiguous().clone() for t in tensors]
    perturb_(expected, ALONG, 0.5)
    perturb_(tensors, ALONG, 0.5)
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, wanted)


def test_others_may_share_among_themselves():
    one, two, *others = flat(slice(4), slice(4, 8), slice(8, 30), slice(9, 20), slice(29, 40))
    assert first_shared([one, two], others) is None
    assert first_shared([one, others[1], two], others) == (1, 3)


@pytest.mark.parametrize(
    ("size", "stride", "itself"),
    [
        ((4, 4), (1, 1), True),
        ((4, 4), (3, 1), True),
        ((4, 4), (4, 1), False),
        ((2, 3), (3, 2), False),  # 0, 2, 4 and 3, 5, 7: dimensions that interleave
        ((3, 3), (4, 2), True),
        ((4, 1, 4), (1, 0, 5), False),
        ((1, 3), (0, 2), False),
        ((3, 2), (0, 1), True),
        ((3, 4), (8, 2), False),
    ],
)
def test_elements_that_share_memory_among_themselves(size, stride, itself):
    weight = torch.zeros(64).as_strided(size, stride, 3)
    addresses = [
        sum(i * s for i, s in zip(at, stride, strict=True)) for at in product(*map(range, size))
    ]
    assert (len(set(addresses)) < len(addresses)) == itself
    if itself:
        with pytest.raises(ValueError, match="must not share memory among its elements"):
            perturb_([weight], ALONG, 0.5)
    else:
        perturb_([weight], ALONG, 0.5)
        assert weight.abs().eq(0.5).all()
