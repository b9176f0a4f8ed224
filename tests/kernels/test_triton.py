"""The Triton backend in the interpreter: lists of tensors, far places, keys, many directions.

What the operations compute is tested on every backend, this one too, in test_noise, test_perturb
and test_update.
"""

import math

import numpy as np
import pytest
import torch
from arranged import (
    DIRECTIONS,
    GAUSSIAN,
    HERE,
    NARROW,
    RADEMACHER,
    RUNS,
    TENSORS,
    Arranged,
    agree,
    alike,
    interpreted_kernels,
    of_each,
    z_of,
)
from conftest import same_bits, weights
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    Direction,
    Shift,
    Weights,
    noise,
    perturb_,
    perturbed,
    update_,
)
from zofo_kernels.region import Region

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture(scope="module")
def kernels(interpreted):
    return interpreted_kernels()


# Lists of tensors of every kind in one call.


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity - infinity
@settings(max_examples=30)
@given(TENSORS, DIRECTIONS, DIRECTIONS, st.sampled_from(["perturb", "both", "nearest", "random"]))
def test_lists_of_all_kinds_agree_with_the_reference(tensors, direction, other, mode):
    """Bit for bit where z is a sign; NaN and infinite weights too; nothing else is written."""
    before = [weights((t["size"],), t["dtype"], i) for i, t in enumerate(tensors)]
    for w in before:
        w[5::300] = torch.tensor(math.nan)
        w[6::300] = torch.tensor(math.inf)
        w[7::300] = torch.tensor(-math.inf)
    place = {"indices": of_each(tensors, "index"), "offsets": of_each(tensors, "offset")}
    arranged = Arranged(before, of_each(tensors, "shift"))
    expected = [w.clone() for w in before]
    for group, backend in ((arranged.tensors, "triton"), (expected, "reference")):
        if mode in ("perturb", "both"):
            recover = Shift(other, 0.25) if mode == "both" else None
            perturb_(group, direction, -0.37, recover=recover, **place, backend=backend)
        else:
            update_(
                group,
                [direction],
                torch.tensor([0.7]),
                0.013,
                weight_decay=0.1,
                recover=Shift(direction, 0.25),
                rounding="nearest" if mode == "nearest" else "stochastic",
                **place,
                backend=backend,
            )
    signs = {direction.distribution} | ({other.distribution} if mode == "both" else set())
    for w, result, wanted in zip(before, arranged.tensors, expected, strict=True):
        if signs == {"rademacher"}:
            assert alike(result, wanted)
            continue
        assert torch.equal(result.isnan(), wanted.isnan())
        number = wanted.isfinite()
        assert torch.equal(result.isinf(), wanted.isinf())
        eps = max(torch.finfo(w.dtype).eps, torch.finfo(torch.float32).eps / 4)
        bound = 2 * eps * (wanted.double().abs() + 1) + 1e-5
        assert ((result.double() - wanted.double()).abs() <= bound)[number].all()
    assert arranged.rest_is_untouched()


# Far places, and many parameters.


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("lead", [128 * 8, 128 * 8 - 3], ids=["aligned", "not aligned"])
def test_block_counters_that_cross_32_bits_within_a_piece(element_noise, distribution, lead):
    direction = Direction(5, 6, 7, distribution)
    per_block = {"gaussian": 8, "rademacher": 128}[distribution]
    for border in (per_block * 2**32, per_block * 2**33, 2**32, 2**31):
        w = torch.zeros(2048)
        perturb_([w], direction, 1.0, indices=[9], offsets=[border - lead], **HERE)
        z = z_of(element_noise, direction, 9, border - lead, 2048)
        torch.testing.assert_close(w.double(), z, rtol=0, atol=5e-6)


@pytest.mark.parametrize("lead", [1024, 1021], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("fraction", [0.5, 0.1, 2.0**-9])
def test_rounding_bits_where_their_block_counter_crosses_32_bits(
    element_noise, element_bits, lead, fraction
):
    index, offset, size = 2**32 - 1, 8 * 2**32 - lead, 2048
    w = torch.full((size,), 1.5, dtype=torch.bfloat16)  # between 1.5 and its neighbours: 2^-7
    step = torch.tensor(fraction * 2.0**-7)
    place = {"indices": [index], "offsets": [offset]}
    update_([w], [RADEMACHER], torch.ones(1), step, **place, **HERE)
    z = z_of(element_noise, RADEMACHER, index, offset, size)
    units = (1.5 - step * z.float()).double().numpy() * 2**7
    up = units % 1 * 2**16 + element_bits(RADEMACHER, index, offset, size) >= 2**16
    assert 0 < up.sum() < size
    np.testing.assert_array_equal(w.double().numpy() * 2**7, np.floor(units) + up)


@pytest.mark.parametrize("direction", [GAUSSIAN, RADEMACHER], ids=DISTRIBUTIONS)
def test_many_parameters_in_one_call(element_noise, direction):
    indices = [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, *range(2, 40)]
    sizes = [24 + 8 * (i % 3) + (i % 5 == 0) for i in range(len(indices))]
    offsets = [(i % 4) * 2**36 for i in range(len(indices))]
    group = [torch.zeros(n) for n in sizes]
    perturb_(group, direction, 1.0, indices=indices, offsets=offsets, **HERE)
    for w, index, offset in zip(group, indices, offsets, strict=True):
        z = z_of(element_noise, direction, index, offset, w.numel())
        torch.testing.assert_close(w.double(), z, rtol=0, atol=5e-6)


# Keys made on the device, and steps known only there.


@given(RUNS)
@example([(1, 2, 0, "gaussian", 5), (1, 2, 5, "rademacher", 5), (1, 2, 11, "rademacher", 1)])
@example([(1, 2, 0, "gaussian", 3), (1, torch.tensor(2), 3, "gaussian", 3)])
@example([(1, torch.tensor(2), 0, "gaussian", 3), (1, torch.tensor(3), 3, "gaussian", 3)])
@example([(1, 2, 7, "gaussian", 1), (1, 2, 7, "gaussian", 1), (2, 2, 8, "gaussian", 1)])
def test_keys_on_the_device(kernels, runs):
    directions = [
        Direction(seed, step, sample + i, distribution)
        for seed, step, sample, distribution, count in runs
        for i in range(count)
    ]
    keys = kernels._device_keys(directions, torch.device("cpu"))
    assert keys.dtype == torch.int32
    assert keys.shape == (len(directions), 4)
    low, high, kind, _ = (keys.long() & 0xFFFFFFFF).T.tolist()
    assert list(zip(low, high, strict=True)) == [d.key() for d in directions]
    assert kind == [DISTRIBUTIONS.index(d.distribution) for d in directions]


@pytest.mark.parametrize(
    ("distribution", "dtype"), [("gaussian", torch.bfloat16), ("rademacher", torch.float32)]
)
def test_a_step_on_the_device_is_as_good_as_a_number(distribution, dtype):
    """In each kind of pass; read when the pass runs, and told apart from other tensors."""
    counter, results = torch.tensor(0), {}
    for how in ("number", "tensor", "two tensors"):
        w = [weights((64,), dtype)]
        kept = Weights(w, [4])
        for step in range(2):
            counter.fill_(step)
            steps = {"number": [step] * 2, "tensor": [counter] * 2}
            steps = steps.get(how, [counter, counter.clone()])
            a, b = (Direction(2**64 - 1, s, 3, distribution) for s in steps)
            other = a._replace(sample=0)
            perturb_(kept, a, 0.1, **HERE)
            perturb_(kept, b, -0.1, recover=Shift(a, 0.1), **HERE)
            perturb_(kept, other, 0.3, recover=Shift(b, -0.1), **HERE)
            update_(kept, [other], torch.ones(1), 0.2, recover=Shift(other, 0.3), **HERE)
            perturb_(kept, a, 0.1, **HERE)
            update_(kept, [a, b, other], torch.ones(3), 0.2, recover=Shift(b, 0.1), **HERE)
            update_(kept, [b], torch.ones(1), 0.2, **HERE)
        results[how] = w
    for how in ("tensor", "two tensors"):
        assert all(map(same_bits, results["number"], results[how]))


# Updates along many directions.


@pytest.mark.parametrize(
    ("samples", "recover"), [(1, False), (1, True), (2, False), (2, True), (5, True), (70, True)]
)
def test_updates_along_many_signs_are_the_formula(element_noise, samples, recover):
    index, offset, lr, size = 3, 2**33, 0.013, 203  # 200 elements aligned, 3 not
    directions = [RADEMACHER._replace(sample=s) for s in range(samples)]
    coefficients = weights((samples,), torch.float32, 5, 1.0)
    w = weights((size,), torch.float32)
    z = [z_of(element_noise, d, index, offset, size).float() for d in directions]
    expected, shift = w, None
    if recover:
        shift = Shift(directions[-1], 0.01)
        expected = w - torch.tensor(0.01) * z[-1]
    delta = torch.zeros(size)
    for c, values in zip(coefficients, z, strict=True):
        delta = delta + torch.tensor(lr) * c * values
    expected = expected - delta
    place = {"indices": [index], "offsets": [offset]}
    update_([w], directions, coefficients, lr, recover=shift, **place, **HERE)
    assert same_bits(w, expected)


@pytest.mark.parametrize("offset", [2**33, 2**33 + 8, 5])
@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize(("back", "along"), [(GAUSSIAN, RADEMACHER), (RADEMACHER, GAUSSIAN)])
def test_updates_recover_along_another_distribution(back, along, samples, offset):
    directions = [along._replace(sample=s) for s in range(samples)]
    coefficients, shift = weights((samples,), torch.float32, 5, 1.0), Shift(back, 0.25)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for backend in ("triton", "reference"):
            w = [weights((203,), dtype), weights((24,), dtype, 1)]
            place = {"offsets": [offset, 8], "backend": backend}
            update_(w, directions, coefficients, 0.1, recover=shift, **place)
            results.append(w)
        for ours, wanted in zip(*results, strict=True):
            assert agree(ours, wanted, GAUSSIAN, roundings=2 + samples)
            assert not torch.equal(ours, weights(tuple(ours.shape), dtype))


@pytest.mark.parametrize(
    ("samples", "dtype"),
    [(2, torch.float32), (5, torch.float32), (5, torch.bfloat16), (70, torch.float32)],
)
def test_updates_along_directions_of_both_distributions(element_noise, samples, dtype):
    """Runs of both kinds, from either on, with steps of their own in between."""
    index, offset, lr, size = 3, 2**33, 0.5, 203
    directions = [
        Direction(7, s // 30, s, DISTRIBUTIONS[s % 7 < 3 if samples > 2 else 1 - s])
        for s in range(samples)
    ]
    assert len({d.distribution for d in directions}) == 2
    coefficients = weights((samples,), torch.float64, 5, 0.2)
    w = weights((size,), dtype)
    before = w.double()
    place = {"indices": [index], "offsets": [offset]}
    shift = Shift(GAUSSIAN, 2.0**-4)
    update_([w], directions, coefficients, lr, recover=shift, **place, **HERE)
    zs = [z_of(element_noise, d, index, offset, size) for d in [GAUSSIAN, *directions]]
    recovered = before - shift.scale * zs[0]
    terms = [lr * c * z for c, z in zip(coefficients, zs[1:], strict=True)]
    expected = recovered - sum(terms)
    ulps = 2 * (recovered.abs() + expected.abs()) if dtype in NARROW else sum(map(torch.abs, terms))
    error = torch.finfo(dtype).eps * (ulps + 1) + 1e-5
    assert ((w.double() - expected).abs() <= error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_and_lr_of_every_dtype_and_layout(dtype):
    """The kernels read them where they lie."""
    values = [0.7, -0.2, 1 / 3]
    for kind in DTYPES:
        strided = torch.tensor(values, dtype=kind).repeat_interleave(2)[::2]
        rates = torch.tensor([0.1], dtype=kind), torch.tensor(2)
        for coefficients, lr in zip(
            (torch.tensor(values, dtype=kind), strided), rates, strict=True
        ):
            for samples in (1, 3):
                results = []
                for backend in ("triton", "reference"):
                    w = weights((16,), dtype)
                    directions = [RADEMACHER._replace(sample=s) for s in range(samples)]
                    update_([w], directions, coefficients[:samples], lr, backend=backend)
                    results.append(w)
                assert same_bits(*results)


# Reading elsewhere, and not at all.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [2**35 - 128, 5])
@pytest.mark.parametrize("shifts", [(0, 0), (0, 1), (1, 0)], ids=str)
def test_copies_between_any_alignments(kernels, dtype, offset, shifts):
    """Of one tensor, which needs no table, and of two."""
    for direction, count in ((GAUSSIAN, 1), (GAUSSIAN, 2), (RADEMACHER, 2)):
        before = [weights((203,), dtype, seed) for seed in range(count)]
        source = Arranged(before, shifts[1:] * count)
        to = Arranged([torch.full_like(w, 7.0) for w in before], shifts[:1] * count)
        slots = [Region(w, i, offset) for i, w in enumerate(to.tensors)]
        kernels.perturb_copy(slots, source.tensors, Shift(direction, 0.25))
        expected = [w.clone() for w in before]
        perturb_(expected, direction, 0.25, offsets=[offset] * count, **HERE)
        assert all(map(same_bits, to.tensors, expected))
        assert all(map(same_bits, source.tensors, before))
        assert to.rest_is_untouched()
        assert source.rest_is_untouched()
        out = perturbed(source.tensors[-1], direction, 0.25, index=count - 1, offset=offset, **HERE)
        assert same_bits(out, expected[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shift", "offset"), [(0, 0), (1, 0), (0, 5), (1, 2**35 - 1001)])
def test_noise_is_written_over_anything(kernels, element_noise, dtype, shift, offset):
    for direction in (GAUSSIAN, RADEMACHER):
        out = Arranged([torch.full((2003,), math.nan, dtype=dtype)], [shift])
        kernels.fill_noise(Region(out.tensors[0], 3, offset), direction)
        z = z_of(element_noise, direction, 3, offset, 2003)
        error = 5e-6 * (direction is GAUSSIAN) + torch.finfo(dtype).eps / 2 * z.abs()
        assert ((out.tensors[0].double() - z).abs() <= error).all()
        assert out.rest_is_untouched()
        again = noise((2003,), direction, index=3, offset=offset, dtype=dtype, **HERE)
        assert same_bits(out.tensors[0], again)


def test_double_weights_take_scales_in_double(element_noise):
    third, z = 1 / 3, z_of(element_noise, RADEMACHER, 0, 0, 203)
    w = torch.zeros(203, dtype=torch.float64)
    perturb_([w], RADEMACHER, third, **HERE)
    assert torch.equal(w, third * z)
    perturb_([w], RADEMACHER, 0.1, recover=Shift(RADEMACHER, 0.7), **HERE)
    assert torch.equal(w, (third * z - 0.7 * z) + 0.1 * z)
    before = w.clone()
    c = torch.tensor([third], dtype=torch.float64)
    update_([w], [RADEMACHER], c, 0.1, weight_decay=0.7, recover=Shift(RADEMACHER, 1e-9), **HERE)
    start = before - 1e-9 * z
    assert torch.equal(w, start - (0.1 * third * z + 0.1 * 0.7 * start))
    w = torch.zeros(203, dtype=torch.float64)
    perturb_([w], GAUSSIAN, third, **HERE)
    assert torch.equal(w, third * noise((203,), GAUSSIAN, dtype=torch.float64, **HERE))
    assert torch.equal(perturbed(w, RADEMACHER, 1e-17, **HERE), w + 1e-17 * z)
    narrow = torch.zeros(203)
    perturb_([narrow], RADEMACHER, third, **HERE)
    assert torch.equal(narrow, (torch.tensor(third) * z).float())
