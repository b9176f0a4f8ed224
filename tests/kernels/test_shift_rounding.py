"""How shifts of noise version 2 round 16-bit weights that are spaced too widely for them."""

import math

import numpy as np
import pytest
import torch
from conftest import coarse, each_of, same_bits, shifted, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_kernels import (
    DISTRIBUTIONS,
    Direction,
    Pass,
    Program,
    Shift,
    perturb_,
    perturbed,
    replay_,
    update_,
)

NARROW = (torch.bfloat16, torch.float16)
dtype, distribution = each_of(NARROW), each_of(DISTRIBUTIONS)
MIXED = torch.cat([weights((400,), torch.float32, k, s) for k, s in enumerate((2.0, 0.03, 1e-4))])
"""Coarse weights beside others, for a scale of 1e-3."""


def special(kind):
    """Powers of 2, what is next to them, 0 and the ends of the range."""
    powers = torch.tensor([2.0**e for e in range(-26, 13)]).to(kind)
    near = torch.cat([powers, powers.nextafter(2 * powers), powers.nextafter(0 * powers)])
    ends = torch.tensor([0.0, torch.finfo(kind).max, math.inf]).to(kind)
    return torch.cat([near, -near, ends, -ends])


def run(w, shifts, backend, **place):
    """``shifts`` in turn, by one ``perturb_`` for each; a way back recovers."""
    out = w.clone()
    lists = {name: [value] for name, value in place.items()}
    for direction, scale, back in shifts:
        if back:
            perturb_([out], None, recover=Shift(direction, -scale), **lists, backend=backend)
        else:
            perturb_([out], direction, scale, **lists, backend=backend)
    return out


@settings(max_examples=25)
@given(
    st.sampled_from(NARROW),
    st.sampled_from([2.0**-25, 1e-6, 1e-4, 2.0**-10, 1e-3, -1e-3, 0.02, 0.5]),
    st.booleans(),
    st.integers(0, 300),
    st.integers(1, 900),
    st.sampled_from([0, 8, 13, 128, 2**35 - 60, 2**62 + 77]),
    st.integers(0, 2**64 - 1),
)
def test_a_shift_is_the_definition(backend, kind, scale, back, start, count, offset, seed):
    """To the bit along signs, on all backends."""
    w = torch.cat([MIXED.to(kind), special(kind)])[start : start + count].clone()
    shift = Shift(Direction(seed, 3, 1, "rademacher"), scale, back)
    found = run(w, [shift], backend, indices=7, offsets=offset)
    assert same_bits(found, shifted(w, shift, 7, offset))


def test_normal_noise_agrees_but_for_its_last_bits(backend, dtype):
    shift = Shift(Direction(5, 3, 1), 1e-3)
    w = torch.cat([weights((20_000,), dtype, 1, 2.0), weights((5_000,), dtype, 2, 0.02)])
    found, wanted = run(w, [shift], backend), shifted(w, shift)
    assert coarse(w, shift).mean() > 0.2
    assert (found != wanted).float().mean() < 1e-3
    eps = torch.finfo(dtype).eps
    assert ((found.double() - wanted.double()).abs() <= eps * (w.double().abs() + 0.01)).all()


def test_both_sides_are_equally_far(backend, dtype, distribution):
    """Where no power of 2 lies between."""
    w = torch.linspace(1.3, 1.7, 4000).to(dtype)
    direction = Direction(1, 2, 3, distribution)
    scale = torch.finfo(dtype).eps / 4
    up, down = (run(w, [Shift(direction, s, False)], backend) for s in (scale, -scale))
    assert (up != w).float().mean() > 0.1
    torch.testing.assert_close(up.double() - w.double(), w.double() - down.double(), atol=0, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_come_back(backend, dtype, distribution, sign):
    """Those between powers of 2, and the powers themselves, which many models begin at."""
    eps = torch.finfo(dtype).eps
    w = torch.cat([torch.linspace(1.3, 1.7, 2000), torch.full((500,), 1.0), torch.full((500,), -2)])
    w = w.to(dtype)
    shift = Shift(Direction(1, 2, 3, distribution), sign * eps / 5)
    moved = run(w, [shift], backend)
    assert (moved != w).float().mean() > 0.1
    assert same_bits(run(moved, [shift.taken_off()], backend), w)
    both = moved.clone()  # to the other side in one pass
    perturb_([both], shift.direction, -shift.scale, recover=shift, backend=backend)
    assert same_bits(both, run(w, [shift._replace(scale=-shift.scale)], backend))
    perturb_([both], None, recover=shift._replace(scale=-shift.scale), backend=backend)
    assert same_bits(both, w)


@pytest.mark.parametrize("around", [1.5, -1.5, 1.0])
@pytest.mark.parametrize("part", [0.5, 0.1, 0.01])
def test_displacements_are_unbiased(dtype, distribution, around, part):
    """The mean along z of what weights get is the scale; version 1 gives a part of it, or 0."""
    scale, count = part * torch.finfo(dtype).eps, 400_000
    w = torch.full((count,), around, dtype=dtype)

    def slope(version):
        direction = Direction(7, 8, 9, distribution, version)
        z = perturbed(torch.zeros(count), direction, 1.0).double()
        moved = perturbed(w, direction, scale).double() - perturbed(w, direction, -scale).double()
        along = moved * z / (2 * scale)
        return along.mean().item(), along.std().item() / math.sqrt(count)

    mean, error = slope(2)
    assert abs(mean - 1) < 4 * error
    assert error < 0.03
    if part < 0.2:
        assert slope(1)[0] < 0.1


def test_weights_do_not_wander_far(dtype):
    """After many moves, each weight is at most a few spacings from where it was."""
    w = torch.cat([weights((3000,), dtype, 1, 1.0), torch.ones(1000, dtype=dtype)])
    out, mu = w.clone(), 1e-3
    for step in range(30):
        carried = Shift(Direction(1, step), mu)
        perturb_([out], carried.direction, mu)
        perturb_([out], carried.direction, -mu, recover=carried)
        perturb_([out], None, recover=carried._replace(scale=-mu))
    away = (out.double() - w.double()).abs()
    assert (away <= 0.01 * w.double().abs() + 2e-3).all()
    if dtype == torch.bfloat16:  # coarse at 1; what is not rounds to nearest, as before
        assert same_bits(out[3000:], w[3000:])


def test_the_largest_numbers_stay_finite(backend, dtype, distribution):
    """As rounding to nearest leaves them; nothing would come back from infinity."""
    largest = torch.finfo(dtype).max
    w = torch.tensor([largest, -largest] * 3000).to(dtype)
    shift = Shift(Direction(1, 2, 3, distribution), torch.finfo(dtype).eps * largest / 32)
    moved = run(w, [shift], backend)
    assert moved.isfinite().all()
    assert (moved != w).any()


def test_versions_mix_in_a_pass(backend, dtype):
    first, second = Direction(1, 2, 0, "rademacher", 1), Direction(1, 2, 1, "rademacher", 2)
    w = torch.cat([MIXED.to(dtype), special(dtype)])
    out = w.clone()
    perturb_([out], second, 1e-3, recover=Shift(first, 1e-3), backend=backend)
    back = Shift(first, -1e-3, True)
    assert same_bits(out, shifted(shifted(w, back), Shift(second, 1e-3)))


@pytest.mark.parametrize("version", [1, 2])
def test_updates_recover_as_moves_do(backend, dtype, version):
    direction = Direction(1, 2, 0, "rademacher", version)
    shift = Shift(direction, -1e-3)
    one, two = MIXED.to(dtype), MIXED.to(dtype)
    arguments = [direction], torch.tensor([0.5]), 0.01
    update_([one], *arguments, recover=shift, backend=backend)
    perturb_([two], None, recover=shift, backend=backend)
    update_([two], *arguments, backend=backend)
    assert same_bits(one, two)


def test_programs_do_the_same(backend, dtype):
    along = [Direction(1, step, 0, "rademacher") for step in range(3)]
    shifts = [Shift(d, 1e-3) for d in along]
    program = Program(
        Pass((s, s.taken_off()), (s.direction,), (0.5,), lr=1e-3, weight_decay=0.0) for s in shifts
    )
    one, two = MIXED.to(dtype), MIXED.to(dtype)
    replay_([one], program, backend=backend)
    for shift in shifts:
        perturb_([two], shift.direction, shift.scale, backend=backend)
        perturb_([two], None, recover=shift, backend=backend)
        update_([two], [shift.direction], torch.tensor([0.5]), 1e-3, backend=backend)
    assert same_bits(one, two)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_wider_weights_round_as_ever(backend, kind, distribution):
    w = weights((3000,), kind, 1, 100.0)
    one, two = (
        run(w, [(Direction(1, 2, 3, distribution, v), 1e-7, False)], backend) for v in (1, 2)
    )
    assert same_bits(one, two)


@pytest.mark.parametrize(
    ("scale", "kind", "law", "wanted"),
    [
        (1e-3, torch.bfloat16, "gaussian", 0.25),  # spacings: 2^-9 in the binade from 1/4 on
        (1e-3, torch.bfloat16, "rademacher", 0.125),
        (2.0**-10, torch.bfloat16, "gaussian", 0.25),  # as wide as the scale is not too wide
        (-1e-3, torch.float16, "gaussian", 2.0),
        (2.0**-26, torch.float16, "gaussian", 0.0),
        (1e-3, torch.float32, "gaussian", math.inf),
        (0.0, torch.bfloat16, "gaussian", math.inf),
    ],
)
def test_where_weights_become_coarse(scale, kind, law, wanted):
    assert Shift(Direction(0, 0, 0, law), scale).coarse_from(kind) == wanted
    assert Shift(Direction(0, 0, 0, law, 1), scale).coarse_from(kind) == math.inf


def test_the_rounding_bits_are_their_own(element_bits):
    """Neither those of updates nor the direction's."""
    direction = Direction(2024, 7, 1)
    bits = [element_bits(direction, 2, 5, 1 << 14, stream) - 2**15 for stream in (0, 1, 2)]
    correlation = np.corrcoef(bits)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4 / 2**7


@pytest.mark.parametrize("version", [0, 3, True, 1.0, None])
def test_unknown_versions_are_refused(version):
    with pytest.raises(ValueError, match=r"version must be one of \(1, 2\), got"):
        perturb_([torch.zeros(3)], Direction(0, 0, version=version), 0.1)
