"""update_: against the formula, its rounding, and what it must leave alone."""

import math

import numpy as np
import pytest
import torch
from conftest import same_bits, weights
from hypothesis import given
from hypothesis import strategies as st

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    NOISE_VERSIONS,
    Direction,
    Shift,
    noise,
    perturb_,
    reference,
    update_,
)

NARROW = (torch.bfloat16, torch.float16)
GAUSSIAN, RADEMACHER = Direction(3, 1), Direction(3, 1, 0, "rademacher")
ONE = torch.ones(1)


def neighbours(x, dtype):
    """Of fp32 x, the values of bf16 or fp16 next to it towards and away from 0, in fp64.

    Both are x itself where x fits. Beyond the largest fp16 comes 65536, which stands for inf.
    """
    if dtype == torch.bfloat16:
        pattern = x.view(torch.int32)
        toward = pattern & ~0xFFFF
        away = torch.where(toward == pattern, toward, toward + 0x10000)
        return toward.view(torch.float32).double(), away.view(torch.float32).double()
    exact = x.double().numpy()
    size = np.abs(exact)
    _, exponent = np.frexp(size)
    unit = np.ldexp(1.0, np.maximum(exponent - 11, -24))
    toward, away = np.floor(size / unit) * unit, np.ceil(size / unit) * unit
    return (torch.from_numpy(np.copysign(side, exact)) for side in (toward, away))


def round_by_bits(x, random, dtype):
    """fp32 x to bf16 or fp16: away from 0 iff ulp fraction + random / 2^16 reaches 1.

    fp16 above 2^-14 takes the upper 13 bits of random: as many as fp32 has more than fp16.
    """
    toward, away = neighbours(x, dtype)
    fraction = torch.where(toward == away, 0.0, (x.double() - toward) / (away - toward))
    if dtype == torch.float16:
        random = torch.where(x.abs() < 2.0**-14, random, random >> 3 << 3)
    return torch.where(fraction + random / 2**16 >= 1, away, toward).to(dtype)


def exact_update(w, zs, coefficients, lr, weight_decay=0.0, random=None):
    """The formula with every rounding in its place, for z = +-1, which makes products exact."""
    compute = torch.float64 if w.dtype == torch.float64 else torch.float32
    x = w.to(compute)
    rate = torch.tensor(lr, dtype=torch.float64).to(compute)
    delta = torch.zeros_like(x)
    for c, z in zip(coefficients.to(compute), zs, strict=True):
        delta = delta + rate * c * z.to(compute)
    if weight_decay:
        delta = delta + rate * torch.tensor(weight_decay, dtype=compute) * x
    x = x - delta
    return x.to(w.dtype) if random is None else round_by_bits(x, random, w.dtype)


DIRECTIONS = st.lists(
    st.builds(
        Direction,
        seed=st.just(2**63 + 11),
        step=st.just(9),
        sample=st.integers(0, 3),
        distribution=st.sampled_from(DISTRIBUTIONS),
        version=st.sampled_from(NOISE_VERSIONS),
        rank=st.just(0),
    ),
    min_size=1,
    max_size=3,
)
SHAPES = st.one_of(
    st.lists(st.integers(0, 7), max_size=3).map(tuple),
    st.sampled_from([(1,), (127,), (2049,), (61, 67)]),
)
OFFSETS = st.one_of(st.just(0), st.integers(1, 3000), st.just(2**32 + 5), st.just(2**62 + 77))


@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), OFFSETS), min_size=1, max_size=3),
    DIRECTIONS,
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from(["nearest", "stochastic"]),
    st.booleans(),
)
def test_update_is_the_formula(
    backend, element_noise, tensors, directions, weight_decay, recover, rounding, strided
):
    """Against fp64, with the tolerance that rounding (one or two of them), fp32 and z need."""
    lr, carried = 0.3, -0.25
    coefficients = weights((len(directions),), torch.float64, 5, 1.0)
    if recover is not None:
        recover = Shift(directions[0]._replace(sample=recover), carried)
    before = [weights(shape, dtype, i) for i, (shape, dtype, _) in enumerate(tensors)]
    indices = [3 * i for i in range(len(tensors))]
    after = [w.clone() for w in before]
    if strided:
        after = [torch.stack([w, w], dim=-1)[..., 1] for w in before]
    update_(
        after,
        directions,
        coefficients,
        lr,
        weight_decay=weight_decay,
        recover=recover,
        rounding=rounding,
        indices=indices,
        offsets=[offset for _, _, offset in tensors],
        backend=backend,
    )
    for w, result, index, (shape, dtype, offset) in zip(
        before, after, indices, tensors, strict=True
    ):

        def z_of(direction, index=index, offset=offset, w=w):
            z = element_noise(direction, index, offset, w.numel())
            return torch.from_numpy(z).reshape(w.shape)

        compute = torch.float64 if dtype == torch.float64 else torch.float32
        value, error = w.double(), torch.zeros(shape, dtype=torch.float64)
        sizes = value.abs()
        if recover is not None:
            value = value - carried * z_of(recover.direction)
            sizes = sizes + (carried * z_of(recover.direction)).abs()
            error = error + torch.finfo(dtype).eps / 2 * value.abs() + 5e-6 * abs(carried)
        delta = weight_decay * value
        for c, direction in zip(coefficients, directions, strict=True):
            delta = delta + c * z_of(direction)
            sizes = sizes + (lr * c * z_of(direction)).abs()
            error = error + 5e-6 * (lr * c).abs()
        value = value - lr * delta
        ulps = 1 if rounding == "stochastic" and dtype in NARROW else 0.5
        error = error * (1 + torch.finfo(dtype).eps) + 4 * torch.finfo(compute).eps * sizes
        error = error + ulps * torch.finfo(dtype).eps * value.abs()
        error = error + 2.0**-24 * (dtype == torch.float16)
        assert result.dtype == dtype
        assert ((result.double() - value).abs() <= error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_signs_give_exactly_the_bits_of_the_formula(
    backend, element_noise, element_bits, dtype, rounding, samples, weight_decay
):
    """And so the same bits in all backends."""
    index, offset, lr = 6, 2**33 + 37, 0.013
    directions = [RADEMACHER._replace(sample=s) for s in range(samples)]
    coefficients = weights((samples,), torch.float32, 5, 1.0)
    w = torch.cat([weights((5003,), dtype, 1, sigma) for sigma in (1.0, 0.02, 1e-5)])
    zs = [torch.from_numpy(element_noise(d, index, offset, w.numel())) for d in directions]
    random = None
    if rounding == "stochastic" and dtype in NARROW:
        random = torch.from_numpy(element_bits(directions[0], index, offset, w.numel()))
    expected = exact_update(w, zs, coefficients, lr, weight_decay, random)
    update_(
        [w],
        directions,
        coefficients,
        lr,
        weight_decay=weight_decay,
        rounding=rounding,
        indices=[index],
        offsets=[offset],
        backend=backend,
    )
    assert same_bits(w, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("samples", [1, 2])
def test_one_pass_with_recover_is_restore_then_update(
    backend, dtype, distribution, rounding, samples
):
    directions = [Direction(8, 1, s, distribution) for s in range(samples)]
    swapped = DISTRIBUTIONS[1 - DISTRIBUTIONS.index(distribution)]
    options = {"weight_decay": 0.1, "rounding": rounding, "backend": backend}
    for carried in (
        directions[0],
        directions[-1],
        Direction(8, 0, 0, distribution),
        directions[0]._replace(distribution=swapped),
    ):
        shift = Shift(carried, 1e-3)
        w = [weights((2500,), dtype, 1, 0.02), weights((3, 5), dtype, 2, 0.02)]
        perturb_(w, carried, 1e-3, backend=backend)
        other = [x.clone() for x in w]
        coefficients = torch.tensor([0.7, -0.2])[:samples]
        update_(w, directions, coefficients, 1e-2, recover=shift, **options)
        perturb_(other, None, recover=shift, backend=backend)
        update_(other, directions, coefficients, 1e-2, **options)
        assert all(map(same_bits, w, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lr_may_be_a_number_or_a_tensor(backend, dtype):
    lr = 0.1
    rates = [lr, torch.tensor(lr, dtype=torch.float64), torch.tensor([lr], dtype=torch.float64)]
    results = []
    for rate in rates:
        w = weights((300,), dtype)
        update_([w], [RADEMACHER], torch.tensor([0.3]), rate, weight_decay=0.1, backend=backend)
        results.append(w)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])
    assert not torch.equal(results[0], weights((300,), dtype))


def test_double_weights_use_double_coefficients_and_lr(backend, element_noise):
    c, lr = torch.tensor([1 / 3], dtype=torch.float64), 0.1
    z = torch.from_numpy(element_noise(RADEMACHER, 0, 0, 100))
    w = torch.zeros(100, dtype=torch.float64)
    update_([w], [RADEMACHER], c, lr, backend=backend)
    assert torch.equal(w, -(lr * c) * z)
    w = torch.zeros(100)
    update_([w], [RADEMACHER], c, lr, backend=backend)
    assert torch.equal(w, -(torch.tensor(lr) * c.float()) * z.float())


def test_coefficients_and_lr_that_require_grad(backend):
    w, c = torch.nn.Parameter(torch.zeros(9)), torch.ones(1, requires_grad=True)
    version = w._version
    update_([w], [GAUSSIAN], c, torch.tensor(1.0, requires_grad=True), backend=backend)
    assert torch.equal(w.detach(), -noise((9,), GAUSSIAN, backend=backend))
    assert w._version > version
    assert w.is_leaf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", [GAUSSIAN, RADEMACHER], ids=DISTRIBUTIONS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_threads_change_nothing(threads, dtype, direction, rounding):
    results = []
    for count in (1, 2, 3):
        threads(count)
        w = [weights((n,), dtype, n) for n in (70_001, 3, 130_050)]
        options = {"recover": Shift(direction, 0.1), "rounding": rounding}
        update_(w, [direction], torch.tensor([0.1]), 0.3, offsets=[5, 0, 128], **options)
        results.append(w)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# Rounding.


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_nearest_is_the_cast_of_torch(backend, element_noise, dtype):
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    w = pattern.view(dtype)[~pattern.view(dtype).isnan()]
    z = torch.from_numpy(element_noise(RADEMACHER, 0, 0, w.numel())).float()
    for step in (0.0, 1e-7, 2.0**-12, 0.3, 17.0, 1e38):
        expected = (w.float() - torch.tensor(step) * z).to(dtype)
        after = w.clone()
        update_([after], [RADEMACHER], ONE, step, rounding="nearest", backend=backend)
        assert same_bits(after, expected)


def stochastic(dtype, sigma, lr, n, backend, z_of, low=0.0):
    """Weights of size low + |N(0, sigma^2)| moved by lr: fp32 target, result."""
    w = weights((n,), torch.float64, 1, sigma)
    w = (w + torch.copysign(torch.tensor(low), w)).to(dtype)
    z = torch.from_numpy(z_of(RADEMACHER, 0, 0, n)).float()
    target = w.float() - torch.tensor(lr) * z
    update_([w], [RADEMACHER], ONE, lr, backend=backend)
    return target, w


@pytest.mark.parametrize(
    ("dtype", "sigma", "lr", "low"),
    [
        (torch.bfloat16, 0.02, 1e-5, 0.0),
        (torch.bfloat16, 1e-38, 1e-40, 0.0),  # subnormal
        (torch.bfloat16, 1e30, 3e27, 0.0),
        (torch.float16, 0.02, 1e-5, 0.0),
        (torch.float16, 1e-5, 1e-8, 0.0),  # subnormal
        (torch.float16, 5e-5, 1e-8, 0.0),  # on both sides of 2^-14
        (torch.float16, 1000.0, 7.0, 60000.0),  # near overflow
    ],
)
def test_stochastic_rounding_is_unbiased(backend, element_noise, dtype, sigma, lr, low):
    interpreted = backend == "triton"
    n = 1 << (16 if interpreted else 18)
    target, result = stochastic(dtype, sigma, lr, n, backend, element_noise, low)
    if interpreted:  # slow, so fewer: but these are the numbers that the reference gives
        assert same_bits(
            result, stochastic(dtype, sigma, lr, n, "reference", element_noise, low)[1]
        )
    toward, away = neighbours(target, dtype)
    result = result.double()
    kept = away.abs() <= torch.finfo(dtype).max
    assert kept.float().mean() > 0.9
    assert ((result == toward) | (result == away) | ~kept).all()

    inside = kept & (toward != away)
    assert inside.float().mean() > 0.3
    p = ((target.double() - toward) / (away - toward))[inside]
    up = (result == away)[inside].double()
    assert (up - p).mean().abs() < 5 * (p * (1 - p)).sum().sqrt() / len(p)
    for low_p, high_p in ((0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1)):  # not only on average
        part = (p >= low_p) & (p < high_p)
        error = (p * (1 - p))[part].sum().sqrt()
        assert (up - p)[part].sum().abs() < 5 * error + 1e-9
    # values that fit stay: where the target is on the grid, so is the result
    assert (result == toward)[toward == away].all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_keeps_what_fits(backend, dtype):
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = pattern.view(dtype)[~pattern.view(dtype).isnan()]
    subnormal = numbers[numbers.abs() < torch.finfo(dtype).smallest_normal]
    # often enough that every value of the 16 random bits meets both kinds; in the interpreter,
    # the ends of their range
    times, count = (10, 2**20) if backend != "triton" else (3, 2**17)
    for w in (numbers.repeat(times), subnormal.repeat(count // len(subnormal))):
        bits = reference.rounding_values(GAUSSIAN, 0, 0, len(w), w.device)
        assert {0, 65535} <= set(bits.tolist())
        after = w.clone()
        update_([after], [GAUSSIAN], torch.zeros(1), 1.0, backend=backend)
        assert same_bits(after, w)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_beyond_the_largest_number(backend, dtype):
    """The value above the largest is infinity; a finite sum further out becomes infinite too."""
    largest = torch.finfo(dtype).max
    n = 4000
    w = torch.full((n,), largest, dtype=dtype)
    half_ulp = 16.0 if dtype == torch.float16 else 2.0**119
    z = noise((n,), RADEMACHER)
    update_([w], [RADEMACHER], -ONE, half_ulp, backend=backend)
    assert set(w[z > 0].tolist()) == {largest, math.inf}
    assert 0.4 < w[z > 0].isinf().float().mean() < 0.6
    assert w[z < 0].isfinite().all()
    w = torch.full((n,), largest, dtype=dtype)
    update_([w], [RADEMACHER], -ONE, 3e38, backend=backend)
    assert (w[z > 0] == math.inf).all()
    assert not w.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_special_values_survive(backend, dtype, rounding):
    w = torch.ones(3000, dtype=dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    w[500:503] = w[2100:2103] = special
    options = {"rounding": rounding, "backend": backend}
    for step in range(5):
        update_([w], [Direction(step, 0)], ONE, 0.01, **options)
    for at in (500, 2100):
        assert w[at].isnan()
        assert torch.equal(w[at + 1 : at + 3], special[1:])
    assert w.isfinite().sum() == 3000 - 6
    # inf - decay * inf is no number, as in torch.optim.SGD
    update_([w], [GAUSSIAN], ONE, 0.01, weight_decay=0.1, **options)
    assert w[500:503].isnan().all()
    assert w.isfinite().sum() == 3000 - 6


def test_every_nan_stays_one(backend):
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in NARROW:
        w = pattern.view(dtype)[pattern.view(dtype).isnan()]
        for rounding in ("nearest", "stochastic"):
            after = w.clone()
            update_([after], [GAUSSIAN], ONE, 0.1, rounding=rounding, backend=backend)
            assert after.isnan().all()


def test_small_updates_survive_in_bfloat16_only_by_stochastic_rounding():
    """lr * c = 1e-6 on weights of sigma 0.02: all of it in expectation, against a few percent."""
    n, lr = 1 << 22, 1e-6
    start = weights((n,), torch.bfloat16, 1, 0.02)
    z = noise((n,), GAUSSIAN).double()
    survived = {}
    for rounding in ("stochastic", "nearest"):
        w = start.clone()
        update_([w], [GAUSSIAN], ONE, lr, rounding=rounding)
        moved = start.double() - w.double()
        survived[rounding] = (torch.dot(moved, z) / (lr * torch.dot(z, z))).item()
    assert abs(survived["stochastic"] - 1) < 0.05
    assert 0.005 < survived["nearest"] < 0.06

    # 1e-6 of each weight: nothing at all
    w = start.clone()
    update_([w], [GAUSSIAN], torch.zeros(1), 1.0, weight_decay=1e-6, rounding="nearest")
    assert same_bits(w, start)
    update_([w], [GAUSSIAN], torch.zeros(1), 1.0, weight_decay=1e-6)
    lost = start.double().abs().sum() - w.double().abs().sum()
    assert abs(lost / (1e-6 * start.double().abs().sum()) - 1) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_dtypes_ignore_rounding(backend, dtype):
    results = []
    for rounding in ("stochastic", "nearest"):
        w = weights((3000,), dtype)
        update_([w], [GAUSSIAN], ONE, 1e-3, rounding=rounding, backend=backend)
        results.append(w)
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_zero_coefficient_changes_no_bit(backend, dtype, rounding):
    w = weights((3000,), dtype)
    tiny = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, math.inf, -math.inf, tiny, -tiny, tiny / 4, -tiny / 4]
    w[1000:1008] = torch.tensor(special, dtype=torch.float64).to(dtype)
    w[1008:1010] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min]).to(dtype)
    before = w.clone()
    directions = [GAUSSIAN, RADEMACHER]
    for lr in (1.0, 0.0, torch.tensor(0.5)):
        update_([w], directions, torch.zeros(2), lr, rounding=rounding, backend=backend)
        update_([w], directions[:1], torch.zeros(1), lr, rounding=rounding, backend=backend)
    update_([w], directions, torch.ones(2), 0.0, rounding=rounding, backend=backend)
    assert same_bits(w, before)


# Errors name the argument, and change nothing.

BAD_ARGUMENTS = [
    ({"directions": []}, ValueError, "directions must hold at least one"),
    ({"directions": [(1, 2, 3, "gaussian")]}, TypeError, "direction must be"),
    ({"directions": [Direction(0, -1)]}, ValueError, "step must be .*-1"),
    ({"coefficients": torch.ones(2)}, ValueError, r"coefficients must be .*\(1,\).*\(2,\)"),
    ({"coefficients": torch.tensor(1.0)}, ValueError, r"coefficients must be .*\(1,\).*\(\)"),
    ({"coefficients": torch.ones(1, 1)}, ValueError, r"coefficients must be .*\(1, 1\)"),
    ({"coefficients": torch.ones(1, dtype=torch.int64)}, ValueError, "coefficients .*int64"),
    ({"lr": torch.ones(2)}, ValueError, r"lr must have one element.*\(2,\)"),
    ({"lr": math.nan}, ValueError, "lr must be .*nan"),
    ({"lr": torch.ones(1, dtype=torch.complex64)}, ValueError, "lr must .*real.*complex64"),
    ({"coefficients": [1.0]}, TypeError, "coefficients must be a tensor, got list"),
    ({"offsets": [0, 1.5]}, TypeError, "offsets must hold ints, got 1.5"),
    ({"rounding": "up"}, ValueError, "rounding must be .*'up'"),
    ({"weight_decay": math.nan}, ValueError, "weight_decay must be .*nan"),
    ({"weight_decay": math.inf}, ValueError, "weight_decay must be .*inf"),
    ({"recover": GAUSSIAN}, TypeError, "recover must be"),
    ({"recover": Shift(GAUSSIAN, math.inf)}, ValueError, "recover.scale must be .*inf"),
    ({"indices": [0]}, ValueError, r"indices must have .*\(2\).* 1"),
    ({"offsets": [0, -8]}, ValueError, "offsets must be .*-8"),
    ({"tensors": torch.ones(2)}, TypeError, r"tensors must be .*pass \[tensor\]"),
    ({"backend": "numba"}, ValueError, "backend must be .*'numba'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(backend, change, error, message):
    tensors = [torch.ones(5), torch.ones(2, 2).t()]
    arguments = {
        "tensors": tensors,
        "directions": [GAUSSIAN],
        "coefficients": ONE,
        "lr": 0.1,
        "backend": backend,
    }
    with pytest.raises(error, match=message):
        update_(**(arguments | change))
    assert all(w.eq(1).all() for w in tensors)


def test_a_tensor_listed_twice_is_refused(backend):
    w = torch.ones(3)
    with pytest.raises(ValueError, match=r"tensors\[1\] must not be in the list twice"):
        update_([w, w], [GAUSSIAN], ONE, 0.1, backend=backend)
    assert w.eq(1).all()


def test_infinite_weights_and_no_step(backend):
    """A learning rate of 0 does not even decay: inf - 0 * inf is no NaN."""
    w = torch.tensor([math.inf, 1.0])
    update_([w], [GAUSSIAN], torch.zeros(1), 0.0, weight_decay=0.1, backend=backend)
    assert w.tolist() == [math.inf, 1.0]


def test_a_bad_tensor_leaves_earlier_ones_alone(backend):
    good, strided = torch.ones(5), torch.ones(5, 2)[:, 0]
    for bad in (torch.zeros(3, dtype=torch.int32), torch.zeros(1).expand(3)):
        with pytest.raises((TypeError, ValueError), match=r"tensors\[2\]"):
            update_([good, strided, bad], [GAUSSIAN], ONE, 0.1, backend=backend)
    assert good.eq(1).all()
    assert strided.eq(1).all()


def test_lazily_negated_coefficients_and_rates(backend):
    """torch keeps the sign of some views aside; their memory has the other one."""
    lazy = torch.complex(torch.ones(1), torch.full((1,), 2.0)).conj().imag
    assert lazy.is_neg()
    for coefficients, lr in ((lazy, 0.5), (torch.ones(1), lazy)):
        got, expected = torch.zeros(100), torch.zeros(100)
        update_([got], [RADEMACHER], coefficients, lr, backend=backend)
        plain = lr.clone().resolve_neg() if isinstance(lr, torch.Tensor) else lr
        update_([expected], [RADEMACHER], coefficients.clone().resolve_neg(), plain)
        assert torch.equal(got, expected)
        assert got.abs().max() > 0
