"""Lists of tensors of every kind, anywhere in memory, and the directions of the Triton tests."""

import importlib

import torch
from conftest import same_bits
from hypothesis import strategies as st

from zofo_kernels import DISTRIBUTIONS, DTYPES, NOISE_VERSIONS, Direction

NARROW = (torch.bfloat16, torch.float16)
GAUSSIAN, RADEMACHER = Direction(3, 1), Direction(3, 1, 0, "rademacher")
PIECE, GUARD = 4096, 1040  # elements of a program; bytes, more than a program's lead of 127 fp64
HERE = {"backend": "triton"}


def interpreted_kernels():
    """The module of the Triton backend, which the interpreter runs."""
    module = importlib.import_module("zofo_kernels.triton")
    assert module.INTERPRETED
    assert 8 * module.VECTORS == PIECE
    return module


class Arranged:
    """Tensors in one buffer, otherwise of bytes 0xFF, which are NaN in each dtype.

    Args:
        values: what the tensors hold.
        shifts: how many elements past a multiple of 16 bytes each of them starts.
    """

    def __init__(self, values, shifts, device="cpu"):
        spans, end = [], GUARD
        for w, shift in zip(values, shifts, strict=True):
            start = -(-end // 16) * 16 + shift * w.element_size()
            spans.append(slice(start, start + w.numel() * w.element_size()))
            end = spans[-1].stop + GUARD
        self.spans = spans
        self.memory = torch.full((end,), 0xFF, dtype=torch.uint8, device=device)
        assert self.memory.data_ptr() % 16 == 0
        self.tensors = [
            self.memory[span].view(w.dtype).view(w.shape)
            for w, span in zip(values, spans, strict=True)
        ]
        for view, w in zip(self.tensors, values, strict=True):
            view.copy_(w)

    def rest_is_untouched(self):
        rest = self.memory.clone()
        for span in self.spans:
            rest[span] = 0xFF
        return bool((rest == 0xFF).all())


def alike(a, b):
    """The same bits, but that any NaN is as good as another."""
    number = ~b.isnan()
    return torch.equal(~a.isnan(), number) and same_bits(a[number], b[number])


def z_of(element_noise, direction, index, offset, size):
    return torch.from_numpy(element_noise(direction, index, offset, size))


SIZES = st.one_of(
    st.integers(0, 40),
    st.sampled_from([127, 128, 129, 1000, PIECE - 8, PIECE, 2 * PIECE]),
    st.sampled_from([PIECE - 1, PIECE + 1, 2 * PIECE - 3, 2 * PIECE + 8, 2 * PIECE + 127]),
)
OFFSETS = st.one_of(
    st.sampled_from([0, 128, 2**35 - 128, 2**39 - 2048, 2**62]),
    st.sampled_from([1, 8, 64, 127, 2**32 - 5, 2**35 - 1001, 2**39 - 999, 2**62 + 77]),
    st.integers(0, 3000),
)
TENSORS = st.lists(
    st.fixed_dictionaries(
        {
            "size": SIZES,
            "dtype": st.sampled_from(DTYPES),
            "shift": st.one_of(st.just(0), st.integers(0, 9)),
            "index": st.one_of(st.integers(0, 9), st.sampled_from([2**31, 2**32 - 1])),
            "offset": OFFSETS,
        }
    ),
    min_size=1,
    max_size=5,
)
DIRECTIONS = st.builds(
    Direction,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    sample=st.one_of(st.integers(0, 9), st.just(2**64 - 1)),
    distribution=st.sampled_from(DISTRIBUTIONS),
    version=st.sampled_from(NOISE_VERSIONS),
    rank=st.just(0),
)


def of_each(tensors, name):
    return [t[name] for t in tensors]


BIG = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**31, 2**63, 2**64 - 1]))
RUNS = st.lists(
    st.tuples(
        BIG,
        st.one_of(BIG, st.integers(0, 2**63 - 1).map(torch.tensor)),
        st.one_of(st.integers(0, 100), st.sampled_from([2**32 - 3, 2**63 - 3, 2**64 - 200])),
        st.sampled_from(DISTRIBUTIONS),
        st.sampled_from([1, 2, 3, 63, 64, 65, 150]),
    ),
    min_size=1,
    max_size=4,
)


def agree(result, wanted, direction, roundings=1):
    """Whether two backends may give these: the same bits along signs, else within a tolerance.

    ``roundings`` is how many passes round the weight to its dtype. Each may end on the next
    number, and along a Gaussian each is off by 5e-6; weights and shifts stay below 3 on the way.
    """
    if direction.distribution == "rademacher":
        return same_bits(result, wanted)
    eps = max(torch.finfo(wanted.dtype).eps, torch.finfo(torch.float32).eps / 4)
    bound = roundings * (eps * (wanted.double().abs() + 3) + 5e-6)
    same_kind = result.dtype == wanted.dtype and result.shape == wanted.shape
    return same_kind and bool(((result.double() - wanted.double()).abs() <= bound).all())
