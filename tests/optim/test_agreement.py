"""Checksums of weights: the same for the same elements, another for others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zofo_optim.agreement import _sum_of_bits

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.complex64, torch.int8, torch.int64),
]


@given(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(1, 5), st.data())
def test_the_same_wherever_the_elements_lie(dtype, count, gap, data):
    x = (3 * torch.randn(count)).to(dtype)
    elsewhere = torch.zeros(count + gap, dtype=dtype)
    elsewhere[gap:] = x
    strided = torch.zeros(count, 2, dtype=dtype)
    strided[:, 1] = x
    total = _sum_of_bits(x)
    assert total.dtype == torch.int64
    assert total == _sum_of_bits(elsewhere[gap:]) == _sum_of_bits(strided[:, 1])
    if count:
        other = x.clone()
        place = data.draw(st.integers(0, count - 1))
        other[place] = other[place] * 2 + 1  # none of these is its own
        if not torch.equal(other, x):
            assert _sum_of_bits(other) != total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_bit_counts(dtype):
    x = torch.ones(9, dtype=dtype)
    other = x.clone()
    other[4] = 1 + torch.finfo(dtype).eps
    assert _sum_of_bits(x) != _sum_of_bits(other)


def test_conjugated_and_negated_views():
    x = torch.complex(torch.randn(5), torch.randn(5))
    assert _sum_of_bits(x.conj()) == _sum_of_bits(x.conj().resolve_conj())
    assert _sum_of_bits(x.conj().imag) == _sum_of_bits(-x.imag)
