"""Gaussian noise on a GPU is close to the reference, and the arithmetic on it is exact.

It is the hardware's logarithm, root, sine and cosine.
"""

import numpy as np
import pytest
import torch
from arranged import DIRECTIONS, GAUSSIAN, NARROW, PIECE, TENSORS, Arranged, of_each
from conftest import same_bits, weights
from hypothesis import given
from on_gpu import DEVICE, ON_GPU

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    Direction,
    Shift,
    noise,
    perturb_,
    perturbed,
    reference,
    update_,
)

pytestmark = pytest.mark.gpu


# Gaussian noise: close to the reference.


@pytest.mark.parametrize("index", [0, 2**32 - 1])
@pytest.mark.parametrize("offset", [0, 5, 2**35 - 2**21, 2**62 + 77])
def test_normals_are_close_to_the_reference(index, offset):
    """The hardware's logarithm is only absolutely accurate near 1, where normals are small."""
    n, direction = 1 << 22, Direction(11, 2**64 - 1, 13)
    z = noise((n,), direction, index=index, offset=offset, **ON_GPU).cpu().double()
    expected = noise((n,), direction, index=index, offset=offset, backend="reference").double()
    assert z.isfinite().all()
    assert (z - expected).abs().max() < 5e-4
    assert (z - expected).square().mean().sqrt() < 1e-5
    large = expected.abs() > 0.1
    assert (z - expected)[large].abs().max() < 5e-5


@given(TENSORS, DIRECTIONS)
def test_normals_in_tensors_of_all_kinds(tensors, direction):
    direction = direction._replace(distribution="gaussian")
    zeros = [torch.zeros(t["size"], dtype=t["dtype"]) for t in tensors]
    place = {"indices": of_each(tensors, "index"), "offsets": of_each(tensors, "offset")}
    arranged = Arranged(zeros, of_each(tensors, "shift"), DEVICE)
    perturb_(arranged.tensors, direction, 1.0, **place, backend="triton")
    perturb_(zeros, direction, 1.0, **place, backend="reference")
    for w, expected in zip(arranged.tensors, zeros, strict=True):
        error = 5e-4 + torch.finfo(w.dtype).eps * expected.double().abs()
        assert ((w.cpu().double() - expected.double()).abs() <= error).all()
    assert arranged.rest_is_untouched()


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
def test_normals_do_not_depend_on_dtype_layout_and_way(shift):
    n, offset = 3 * PIECE + 21, 2**35 - 128 * 40
    place = {"indices": [4], "offsets": [offset], "backend": "triton"}
    z = noise((n,), GAUSSIAN, index=4, offset=offset, **ON_GPU)
    for dtype in DTYPES:
        expected = z.to(dtype)
        again = noise((n,), GAUSSIAN, index=4, offset=offset, dtype=dtype, **ON_GPU)
        assert same_bits(again, expected)
        w = torch.zeros(n + shift, dtype=dtype, device=DEVICE)[shift:]
        out = perturbed(w, GAUSSIAN, 1.0, index=4, offset=offset, backend="triton")
        assert torch.equal(out, expected)
        perturb_([w], GAUSSIAN, 1.0, **place)
        assert torch.equal(w, expected)
        w.zero_()
        update_([w], [GAUSSIAN], torch.tensor([-1.0]), 1.0, rounding="nearest", **place)
        assert torch.equal(w, expected)
        perturb_([w], GAUSSIAN, 1.0, recover=Shift(GAUSSIAN, 1.0), **place)
        error = 2 * torch.finfo(dtype).eps * expected.double().abs()
        assert ((w.double() - expected.double()).abs() <= error).all()


# Arithmetic on the device's own normals: exact.


SIZE, OFFSET = 2 * 10**5, 2**33
PLACE = {"indices": [6], "offsets": [OFFSET]}


def own_noise(direction):
    return noise((SIZE,), direction, index=6, offset=OFFSET, **ON_GPU).cpu()


def half_ulp(x, dtype):
    """Of ``dtype`` at x, in fp64."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().double().clamp(min=limits.tiny)).exponent.double() - 1
    return limits.eps / 2 * torch.exp2(exponent)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("scale", [1e-3, -0.37, 1 / 3, 1e-30])
def test_a_shift_is_one_fused_product_and_sum(dtype, scale):
    w, z = weights((SIZE,), dtype, 1, 0.02), own_noise(GAUSSIAN).double()
    result = w.to(DEVICE)
    perturb_([result], GAUSSIAN, scale, **PLACE, backend="triton")
    result, product = result.cpu(), torch.tensor(scale).double() * z  # both exact in fp64
    exact = w.double() + product
    error = half_ulp(exact, dtype) + 2.0**-50 * (w.double().abs() + product.abs())
    if dtype in NARROW:
        error += half_ulp(exact, torch.float32)
        assert (result == exact.float().to(dtype)).double().mean() > 0.999
    assert ((result.double() - exact).abs() <= error).all()


@pytest.mark.parametrize("scale", [1e-3, -0.37, 1 / 3])
def test_a_shift_of_double_weights_is_one_fused_product_and_sum(scale):
    w, z = weights((SIZE,), torch.float64, 1, 0.02), own_noise(GAUSSIAN)
    result = w.to(DEVICE)
    perturb_([result], GAUSSIAN, scale, **PLACE, backend="triton")
    wide = np.longdouble
    if np.finfo(wide).nmant < 63:
        pytest.skip("numpy has no number wider than a double here")
    product = wide(scale) * z.numpy().astype(wide)
    exact = w.numpy().astype(wide) + product
    missed = torch.from_numpy(np.abs(result.cpu().numpy() - exact).astype(np.float64))
    size = torch.from_numpy((np.abs(w.numpy()) + np.abs(product)).astype(np.float64))
    assert (missed <= half_ulp(result.cpu(), torch.float64) + 2.0**-61 * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "change", [{}, {"step": 2}, {"distribution": "gaussian"}, {"distribution": "rademacher"}]
)
def test_two_shifts_in_one_pass_are_two_passes(dtype, distribution, change):
    direction = Direction(3, 1, 0, distribution)
    other = direction._replace(**change)
    one = weights((SIZE,), dtype, 1, 0.02).to(DEVICE)
    two = one.clone()
    perturb_([one], direction, -1e-3, recover=Shift(other, 1e-3), **PLACE, backend="triton")
    perturb_([two], None, recover=Shift(other, 1e-3), **PLACE, backend="triton")
    perturb_([two], direction, -1e-3, **PLACE, backend="triton")
    assert same_bits(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("distributions", "weight_decay"),
    [("g", 0.0), ("g", 0.03), ("ggg", 0.0), ("gr", 0.03), ("rgg", 0.0)],
)
def test_updates_are_the_formula_with_every_rounding_in_its_place(
    dtype, rounding, distributions, weight_decay
):
    """Given the device's noise, to the bit: after a shift taken off, as without one."""
    kinds = {kind[0]: kind for kind in DISTRIBUTIONS}
    directions = [Direction(3, 1, s, kinds[kind]) for s, kind in enumerate(distributions)]
    coefficients = weights((len(directions),), torch.float64, 5, 1.0)
    options = {"weight_decay": weight_decay, "rounding": rounding, "backend": "triton"}
    w, lr = weights((SIZE,), dtype, 1, 0.02), 1e-3

    compute = reference.compute_dtype(dtype)
    rate = torch.tensor(lr, dtype=torch.float64).to(compute)
    x, delta = w.to(compute), torch.zeros(SIZE, dtype=compute)
    for c, direction in zip(coefficients.to(compute), directions, strict=True):
        delta = delta + rate * c * own_noise(direction).to(compute)
    if weight_decay:
        delta = delta + rate * torch.tensor(weight_decay, dtype=compute) * x
    x = x - delta
    expected = x.to(dtype)
    if rounding == "stochastic" and dtype in NARROW:
        cpu = torch.device("cpu")
        bits = reference.rounding_values(directions[0], 6, OFFSET, SIZE, cpu)
        expected = reference.round_stochastic(x, bits, dtype)
    plain = w.to(DEVICE)
    update_([plain], directions, coefficients, lr, **options, **PLACE)
    assert same_bits(plain.cpu(), expected)

    for shift in (Shift(directions[0], 1e-3), Shift(Direction(8, 8), 1e-3)):
        one = w.to(DEVICE)
        perturb_([one], shift.direction, shift.scale, **PLACE, backend="triton")
        two = one.clone()
        update_([one], directions, coefficients, lr, recover=shift, **options, **PLACE)
        perturb_([two], None, recover=shift, **PLACE, backend="triton")
        update_([two], directions, coefficients, lr, **options, **PLACE)
        assert same_bits(one, two)
