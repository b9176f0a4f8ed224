"""Directions of low rank on a GPU: along signs the bits of the CPU, else within a tolerance."""

import pytest
import torch
from arranged import Arranged, agree
from conftest import same_bits, weights
from hypothesis import given
from hypothesis import strategies as st
from on_gpu import DEVICE
from test_triton_low_rank import SHAPES, directions

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    Direction,
    Shift,
    Weights,
    factors,
    noise,
    perturb_,
    perturbed,
    update_,
)

pytestmark = pytest.mark.gpu

LARGER = [*SHAPES, (300, 4096), (77, 1001), (3, 70, 56)]


@given(
    st.lists(
        st.tuples(st.sampled_from(LARGER), st.sampled_from(DTYPES), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    ),
    directions,
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["nearest", "stochastic"]),
)
def test_steps_are_those_of_the_cpu(made, direction, samples, along_another, rounding):
    before = [weights(shape, dtype, i) for i, (shape, dtype, _) in enumerate(made)]
    arranged = Arranged(before, [shift for *_, shift in made], DEVICE)
    along = [direction._replace(sample=s) for s in range(samples)]
    other = Shift(along[-1]._replace(step=7) if along_another else along[0], -0.01)
    for group in (arranged.tensors, before):
        perturb_(group, along[0], 0.01)
        perturb_(group, other.direction, other.scale, recover=Shift(along[0], 0.01))
        coefficients = weights((samples,), torch.float32, 5, 1.0)
        update_(group, along, coefficients, 0.1, recover=other, rounding=rounding)
    for result, wanted in zip(arranged.tensors, before, strict=True):
        assert agree(result.cpu(), wanted, direction, roundings=8)
    assert arranged.rest_is_untouched()


@pytest.mark.parametrize("rank", [1, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_copies_and_several_ranks_along_signs(dtype, rank):
    direction = Direction(3, 1, 0, "rademacher", rank=rank)
    results = []
    for device in (DEVICE, "cpu"):
        w = [weights(shape, dtype, i).to(device) for i, shape in enumerate(LARGER)]
        along = [direction, direction._replace(rank=0), direction._replace(rank=2, sample=1)]
        update_(Weights(w), along, torch.ones(3, device=device), 0.1)
        copies = [perturbed(x, direction, 0.25) for x in w]
        z = [noise(shape, direction, dtype=dtype, device=device) for shape in LARGER]
        results.append([x.cpu() for x in (*w, *copies, *z)])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 5])
def test_factors_are_those_of_the_cpu(distribution, rank):
    along = [Direction(5, 6, sample, distribution, rank=rank) for sample in range(3)]
    matrices = [shape for shape in LARGER if min(shape) > 1 and len(shape) > 1]
    for shapes in (matrices, matrices[:1]):
        made = factors(shapes, along, device=DEVICE)
        wanted = factors(shapes, along)
        for ours, theirs in zip(made, wanted, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                exact = distribution == "rademacher"
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0.0 if exact else 5e-4)
