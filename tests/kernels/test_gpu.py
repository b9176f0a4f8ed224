"""The compiled Triton kernels on a GPU: against the CPU, and against their own noise.

What comes from integers alone (signs, rounding bits, and all arithmetic on signs) has the bits of
the CPU. Gaussian noise is the hardware's logarithm, root, sine and cosine: close to the reference,
and the arithmetic on it is exact. The first run compiles some hundred variants.
"""

import importlib
import math
import random

import numpy as np
import pytest
import torch
from conftest import same_bits, weights
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_triton import DIRECTIONS, PIECE, RUNS, TENSORS, Arranged, alike, of_each

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    Direction,
    Shift,
    Weights,
    noise,
    perturb_,
    perturbed,
    reference,
    update_,
)
from zofo_kernels.dispatch import backend_for

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ON_GPU = {"device": DEVICE, "backend": "triton"}
NARROW = (torch.bfloat16, torch.float16)
GAUSSIAN, RADEMACHER = Direction(3, 1), Direction(3, 1, 0, "rademacher")
SIGNS = DIRECTIONS.map(lambda direction: direction._replace(distribution="rademacher"))
SECOND = 2 * 10**9  # cycles of a GPU, about


@pytest.fixture(scope="module")
def kernels():
    module = importlib.import_module("zofo_kernels.triton")
    assert not module.INTERPRETED
    return module


def to_gpu(tensors):
    return [w.to(DEVICE) for w in tensors]


def memory_for(count):
    """Skip where the device has no room for ``count`` bytes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < count:
        pytest.skip(f"needs {count / 2**30:.0f} GiB of device memory, {free / 2**30:.1f} are free")


def test_triton_serves_the_gpu():
    assert backend_for(torch.device("cuda")).__name__ == "zofo_kernels.triton"


# Integers: the bits of the CPU.


@given(TENSORS, SIGNS, SIGNS, st.sampled_from(["perturb", "both", "recover"]))
def test_perturbing_along_signs_has_the_bits_of_the_cpu(tensors, direction, other, mode):
    """NaN and infinite weights too; nothing beside the tensors is written."""
    before = [weights((t["size"],), t["dtype"], i) for i, t in enumerate(tensors)]
    for w in before:
        w[5::300] = torch.tensor(math.nan)
        w[6::300] = torch.tensor(math.inf)
        w[7::300] = torch.tensor(-math.inf)
    place = {"indices": of_each(tensors, "index"), "offsets": of_each(tensors, "offset")}
    arranged = Arranged(before, of_each(tensors, "shift"), DEVICE)
    for group in (arranged.tensors, before):
        recover = None if mode == "perturb" else Shift(other, 0.25)
        added = None if mode == "recover" else direction
        perturb_(group, added, -0.37, recover=recover, **place)
    assert all(alike(a.cpu(), b) for a, b in zip(arranged.tensors, before, strict=True))
    assert arranged.rest_is_untouched()


@given(
    TENSORS,
    st.lists(SIGNS, min_size=1, max_size=3),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(["nothing", "the same", "another"]),
    st.sampled_from(["nearest", "stochastic"]),
)
def test_updates_along_signs_have_the_bits_of_the_cpu(
    tensors, directions, weight_decay, carried, rounding
):
    """So the rounding bits are the same as well."""
    before = [weights((t["size"],), t["dtype"], i, 0.02) for i, t in enumerate(tensors)]
    place = {"indices": of_each(tensors, "index"), "offsets": of_each(tensors, "offset")}
    arranged = Arranged(before, of_each(tensors, "shift"), DEVICE)
    coefficients = weights((len(directions),), torch.float32, 5, 1.0)
    shift = Shift(RADEMACHER if carried == "another" else directions[0], 1e-3)
    for group in (arranged.tensors, before):
        update_(
            group,
            directions,
            coefficients,
            1e-3,
            weight_decay=weight_decay,
            recover=None if carried == "nothing" else shift,
            rounding=rounding,
            **place,
        )
    assert all(same_bits(a.cpu(), b) for a, b in zip(arranged.tensors, before, strict=True))
    assert arranged.rest_is_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 77, 2**31 - 640, 2**39 - 1000, 2**62])
def test_signs_are_those_of_the_cpu(dtype, offset):
    for index, direction in ((0, RADEMACHER), (2**32 - 1, Direction(9, 2**63, 4, "rademacher"))):
        place = {"index": index, "offset": offset, "dtype": dtype}
        z = noise((3, 333_347), direction, **place, **ON_GPU)
        assert z.device.type == DEVICE
        assert same_bits(z.cpu(), noise((3, 333_347), direction, **place))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_16_bit_weight_has_the_bits_of_the_cpu(dtype):
    """Subnormal, on a tie, infinite; shifted and moved by nothing, by little and by much."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).repeat(4)
    for scale in (0.0, 1e-40, 2.0**-24, 2.0**-12, 1e-3, 0.3, 3e4, 3e38):
        shifted = perturbed(w.to(DEVICE), RADEMACHER, scale, backend="triton").cpu()
        assert alike(shifted, perturbed(w, RADEMACHER, scale))
        for rounding in ("nearest", "stochastic"):
            results = []
            for group in (to_gpu([w]), [w.clone()]):
                one = torch.ones(1)
                update_(group, [RADEMACHER], one, scale, weight_decay=0.1, rounding=rounding)
                results.append(group[0].cpu())
            assert alike(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_and_huge_wide_weights_have_the_bits_of_the_cpu(dtype):
    limits = torch.finfo(dtype)
    values = [limits.tiny, limits.tiny / 3, limits.tiny * limits.eps, limits.max, 1.0, 0.0]
    w = torch.tensor([v for x in values for v in (x, -x)], dtype=torch.float64).to(dtype)
    w = w.repeat(100)
    for scale in (0.0, 1e-40, limits.tiny if dtype == torch.float32 else 1e-38, 1.0, 3e38):
        results = []
        for group in (to_gpu([w]), [w.clone()]):
            perturb_(group, RADEMACHER, scale)
            update_(group, [RADEMACHER], torch.ones(1), scale, recover=Shift(RADEMACHER, 1e-39))
            results.append(group[0].cpu())
        assert alike(*results)


@given(RUNS)
def test_keys_made_on_the_device(kernels, runs):
    directions = [
        Direction(seed, step, sample + i, distribution)
        for seed, step, sample, distribution, count in runs
        for step in [step.to(DEVICE) if isinstance(step, torch.Tensor) else step]
        for i in range(count)
    ]
    keys = kernels._device_keys(directions, torch.device(DEVICE)).cpu()
    low, high, kind, _ = (keys.long() & 0xFFFFFFFF).T.tolist()
    assert list(zip(low, high, strict=True)) == [d.key() for d in directions]
    assert kind == [DISTRIBUTIONS.index(d.distribution) for d in directions]


@pytest.mark.parametrize("samples", [1, 2, 70])
def test_updates_along_many_directions(samples):
    directions = [RADEMACHER._replace(sample=s) for s in range(samples)]
    coefficients, results = weights((samples,), torch.float32, 5, 1.0), []
    for device in (DEVICE, "cpu"):
        w = [weights((n,), dtype, n).to(device) for n in (9000, 131) for dtype in DTYPES]
        update_(w, directions, coefficients.to(device), 0.01, recover=Shift(directions[-1], 0.1))
        results.append([x.cpu() for x in w])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_coefficients_and_lr_of_every_dtype_layout_and_place(dtype, samples):
    directions = [RADEMACHER._replace(sample=s) for s in range(samples)]
    for kind in DTYPES:
        dense = torch.tensor([0.7, -0.2, 1 / 3])[:samples].to(kind)
        strided = dense.repeat_interleave(2)[::2]
        rate = torch.tensor([0.1], dtype=kind)
        for coefficients, lr in (
            (dense, 0.1),
            (strided, rate),
            (dense.to(DEVICE), torch.tensor(2, device=DEVICE)),
            (dense.to(DEVICE).repeat_interleave(2)[::2], rate.to(DEVICE)),
        ):
            w = weights((200,), dtype)
            on_gpu = w.to(DEVICE)
            update_([on_gpu], directions, coefficients, lr, backend="triton")
            lr = lr.cpu() if isinstance(lr, torch.Tensor) else lr
            update_([w], directions, coefficients.cpu(), lr)
            assert same_bits(on_gpu.cpu(), w)


def test_a_thousand_tensors_in_one_call():
    generator = random.Random(0)
    tensors, offsets = [], []
    for i in range(1000):
        size = generator.choice([1, 8, 64, 100, 768, PIECE, 3 * PIECE + 1])
        tensors.append(weights((size,), generator.choice(DTYPES), i))
        offsets.append(generator.choice([0, 128, 7, 2**40]))
    on_gpu = to_gpu(tensors)
    for group in (on_gpu, tensors):
        kept = Weights(group, offsets=offsets)
        perturb_(kept, RADEMACHER, 1e-3)
        perturb_(kept, RADEMACHER, -1e-3, recover=Shift(RADEMACHER, 1e-3))
        update_(kept, [RADEMACHER], torch.ones(1), 1e-4, recover=Shift(RADEMACHER, -1e-3))
    assert all(same_bits(a.cpu(), b) for a, b in zip(on_gpu, tensors, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    w = weights((65, 129, 3), dtype)
    results = []
    for base in (w.to(DEVICE), w.clone()):
        views = [base[..., 0].t(), base[:33, ::2, 1], base[40:, 5, 1], base[33:40, 1:70, 1:]]
        kept = Weights(views)
        for step in range(2):  # copies must not be kept
            direction = Direction(1, step, 0, "rademacher")
            perturb_(kept, direction, 0.1)
            update_(kept, [direction], torch.ones(1), 1e-2, recover=Shift(direction, 0.1))
            base.mul_(2)
        copies = [perturbed(view, RADEMACHER, 0.25) for view in views]
        assert all(copy.is_contiguous() for copy in copies)
        results.append([base.cpu(), *(copy.cpu() for copy in copies)])
    assert all(map(same_bits, *results))


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
        perturb_([one], *shift, **PLACE, backend="triton")
        two = one.clone()
        update_([one], directions, coefficients, lr, recover=shift, **options, **PLACE)
        perturb_([two], None, recover=shift, **PLACE, backend="triton")
        update_([two], directions, coefficients, lr, **options, **PLACE)
        assert same_bits(one, two)


# Statistics of 10^8 elements: within five standard errors of a true sample.

N = 10**8
SE = 1 / math.sqrt(N)
WORDS = {"seed": 2024, "step": 7, "sample": 1}


def draw(index=0, **fields):
    return noise((N,), Direction(**(WORDS | fields)), index=index, **ON_GPU).double()


@pytest.fixture(scope="module")
def draws():
    memory_for(8 * 2**30)
    return draw()


@pytest.fixture(scope="module")
def signs():
    memory_for(8 * 2**30)
    return draw(distribution="rademacher")


def dependence(x, y):
    """The correlations of x with y and of x^2 with y^2, in standard errors."""
    n = math.sqrt(x.numel())
    of_squares = torch.dot(x * x - 1, y * y - 1) / 2
    return max(abs(torch.dot(x, y).item()), abs(of_squares.item())) / n


def test_moments(draws):
    assert abs(draws.mean().item()) < 5 * SE
    assert abs(draws.square().mean().item() - 1) < 5 * math.sqrt(2) * SE
    assert abs(draws.pow(3).mean().item()) < 5 * math.sqrt(15) * SE
    assert abs(draws.pow(4).mean().item() - 3) < 5 * math.sqrt(96) * SE  # the kurtosis
    assert abs(draws.pow(6).mean().item() - 15) < 5 * math.sqrt(10395 - 225) * SE


def test_tails_and_extremes(draws):
    size = draws.abs()
    assert 5.2 < size.max().item() < 5.8
    for bound in (0.1, 0.5, 1, 2, 3, 4, 4.5):
        p = 2 * stats.norm.sf(bound)
        part = (size > bound).double().mean().item()
        assert abs(part - p) < 5 * math.sqrt(p * (1 - p)) * SE + 4e-7, bound
        upper = (draws > bound).double().mean().item()
        assert abs(upper - p / 2) < 5 * math.sqrt(p / 2) * SE + 2e-7, bound
    assert abs((draws > 0).double().mean().item() - 0.5) < 5 * 0.5 * SE


def test_kolmogorov_smirnov(draws):
    """512 angles leave a dip of the density at |z| < 0.01: at most 7e-4 of the function."""
    some = draws[::100].cpu().numpy()
    p = stats.kstest(some, stats.norm.cdf)
    critical = math.sqrt(math.log(2 / 5.7e-7) / 2)  # of probability 5.7e-7: 5 sigma
    assert p.statistic < critical / math.sqrt(len(some)) + 7e-4


def test_neighbours_are_independent(draws):
    for lag in [*range(1, 17), 32, 128, PIECE]:
        assert dependence(draws[:-lag], draws[lag:]) < 5, lag
    blocks = draws[: N // 8 * 8].view(-1, 8)  # normals of one call
    for values in (blocks, (blocks.square() - 1) / math.sqrt(2)):
        together = values.T @ values / math.sqrt(len(values))
        together.fill_diagonal_(0)
        assert together.abs().max().item() < 5


@pytest.mark.parametrize(
    "other",
    [{"index": 1}, {"index": 256}, {"step": 8}, {"sample": 2}, {"seed": 2025}],
    ids=str,
)
def test_parameters_steps_and_seeds_are_independent(draws, signs, other):
    y = draw(**other)
    for lag in (0, 1, 8):
        assert dependence(draws[lag:], y[: N - lag]) < 5
    del y
    y = draw(**other, distribution="rademacher")
    for lag in (0, 1, 32, 128):
        assert abs(torch.dot(signs[lag:], y[: N - lag]).item()) * SE < 5


def test_signs_are_balanced_and_independent(signs):
    assert bool((signs.abs() == 1).all())
    assert abs(signs.mean().item()) < 5 * SE
    by_bit = signs[: N // 128 * 128].view(-1, 128)
    n = math.sqrt(len(by_bit))
    assert by_bit.mean(dim=0).abs().max().item() < 5 / n
    together = by_bit.T @ by_bit / n
    together.fill_diagonal_(0)
    assert together.abs().max().item() < 5.5  # the largest of 8128 pairs
    for lag in [*range(1, 17), 32, 128, PIECE]:
        assert abs(torch.dot(signs[:-lag], signs[lag:]).item()) * SE < 5, lag


# Large tensors.


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
def test_more_elements_than_an_int32_counts(shift):
    """Near its start and its end, and where numbers of elements or bytes reach 2^31."""
    size, offset, near = 2**31 + 4099, 2**35 - 2**20, 700
    memory_for(2 * (size + shift) + 2**29)
    whole = torch.zeros(size + shift, dtype=torch.bfloat16, device=DEVICE)
    kept = Weights([whole[shift:]], [5], [offset])
    starts = [0, 2**20 - near, 2**30 - near, 2**31 - near, 2**31 + 4096 - near, size - 2 * near]

    def at(start):
        return kept.tensors[0][start : start + 2 * near].cpu()

    def on_cpu(run, start, w, backend="auto"):
        run(Weights([w], [5], [offset + start]), backend)
        return w

    def signs(kept, backend):
        perturb_(kept, RADEMACHER, 0.3, backend=backend)
        shift = Shift(RADEMACHER, 0.3)
        perturb_(kept, RADEMACHER, -0.3, recover=shift, backend=backend)
        directions, shift = [RADEMACHER], Shift(RADEMACHER, -0.3)
        update_(kept, directions, torch.ones(1), 0.3, recover=shift, backend=backend)

    def normals(kept, backend):
        perturb_(kept, GAUSSIAN, 0.1, backend=backend)

    signs(kept, "triton")
    for start in starts:
        w = torch.zeros(at(start).numel(), dtype=torch.bfloat16)
        assert same_bits(at(start), on_cpu(signs, start, w))
    whole.zero_()
    normals(kept, "triton")
    for start in starts:
        w = torch.zeros(at(start).numel(), dtype=torch.bfloat16)
        expected = on_cpu(normals, start, w, "reference").double()
        assert ((at(start).double() - expected).abs() <= 2.0**-7 * expected.abs() + 5e-5).all()
    assert shift == 0 or whole[0] == 0


def test_passes_allocate_next_to_nothing():
    memory_for(2**30)
    kept = Weights([torch.zeros(2**27, dtype=torch.bfloat16, device=DEVICE)])
    coefficients = torch.ones(2, device=DEVICE)
    perturb_(kept, GAUSSIAN, 0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    perturb_(kept, GAUSSIAN, -0.1, recover=Shift(GAUSSIAN, 0.1))
    update_(kept, [GAUSSIAN, RADEMACHER], coefficients, 0.1, recover=Shift(GAUSSIAN, -0.1))
    assert torch.cuda.max_memory_allocated() - before < 2**16


# Streams, devices, graphs: nothing waits for the device.


def every_pass(tensors, steps=(1, 2), coefficients=None, backend="auto"):
    """All kinds of passes but for copies; ends where no shift is carried."""
    a, b = (Direction(7, step, 0, kind) for step, kind in zip(steps, DISTRIBUTIONS, strict=True))
    if coefficients is None:
        coefficients = torch.ones(2)
    options = {"backend": backend}
    for direction in (a, b):
        perturb_(tensors, direction, 1e-2, **options)
        perturb_(tensors, direction, -1e-2, recover=Shift(direction, 1e-2), **options)
        shift = Shift(direction, -1e-2)
        update_(tensors, [direction], coefficients[:1], 0.1, recover=shift, **options)
    update_(tensors, [a, b], coefficients, 0.1, weight_decay=0.1, **options)


def some_weights():
    return [weights((n,), dtype, n).to(DEVICE) for n in (9000, 131, 8) for dtype in DTYPES]


def test_no_pass_waits_for_the_device():
    kept, coefficients = Weights(some_weights()), torch.ones(2, device=DEVICE)
    step = torch.tensor(3, device=DEVICE)

    def passes():
        every_pass(kept, coefficients=coefficients)
        every_pass(kept, (step, step), coefficients)

    def passes_and_tables():
        every_pass(kept.tensors, coefficients=coefficients)
        noise((100,), GAUSSIAN, **ON_GPU)
        perturbed(kept.tensors[0], GAUSSIAN, 0.1)

    passes()
    passes_and_tables()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes_and_tables()
        torch.cuda._sleep(SECOND)
        passes()
        end = torch.cuda.Event()
        end.record()
        waited = end.query()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    assert not waited


def test_passes_run_on_the_current_stream():
    w, start = some_weights(), some_weights()
    kept, coefficients = Weights(w), torch.ones(2, device=DEVICE)
    every_pass(kept, coefficients=coefficients)
    expected = [x.clone() for x in w]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):  # once, for its memory
        every_pass(kept, coefficients=coefficients)
        for x, y in zip(w, start, strict=True):
            x.copy_(y)
    torch.cuda.synchronize()
    torch.cuda._sleep(SECOND)  # on the stream of before
    blocked = torch.cuda.Event()
    blocked.record()
    with torch.cuda.stream(side):
        every_pass(kept, coefficients=coefficients)
    side.synchronize()
    overtook = not blocked.query()
    torch.cuda.synchronize()
    assert all(map(same_bits, w, expected))
    assert overtook


@pytest.mark.parametrize("steps_are", ["numbers", "counter"])
def test_a_captured_graph_replays_the_passes(steps_are):
    """With the step on the device, each replay takes the next directions."""
    w, other = some_weights(), some_weights()
    kept, coefficients = Weights(w), torch.ones(2, device=DEVICE)
    counter = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run():
        steps = (counter, counter) if steps_are == "counter" else (4, 5)
        every_pass(kept, steps, coefficients)
        counter.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()  # recorded, not run
    for x, y in zip(w, other, strict=True):
        x.copy_(y)
    counter.zero_()
    for step in range(3):
        coefficients.fill_(step + 0.5)
        graph.replay()
        steps = (step, step) if steps_are == "counter" else (4, 5)
        every_pass(other, steps, torch.full((2,), step + 0.5))
    torch.cuda.synchronize()
    assert counter.item() == 3
    assert all(map(same_bits, w, other))


def test_tables_must_be_built_before_a_capture():
    w = [weights((n,), torch.float32).to(DEVICE) for n in (100, 3000)]
    perturb_(w, RADEMACHER, 0.25)  # compiled, but its table is gone
    before = [x.clone() for x in w]
    for tensors in (w, Weights(w)):
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(RuntimeError, match="must be built before a CUDA graph is captured")
        with refused, torch.cuda.graph(graph):
            perturb_(tensors, RADEMACHER, 0.25)
    torch.cuda.synchronize()
    assert all(map(same_bits, w, before))
    kept = Weights(w)
    perturb_(kept, RADEMACHER, 0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        perturb_(kept, RADEMACHER, 0.25)
    graph.replay()
    for index, (x, start) in enumerate(zip(w, before, strict=True)):
        z = noise(x.shape, RADEMACHER, index=index, **ON_GPU)
        assert same_bits(x, start + 0.25 * z + 0.25 * z)


def test_steps_on_the_device_are_as_good_as_numbers():
    results, counter = [], torch.tensor(5, device=DEVICE)
    for steps in ((5, 5), (counter, counter), (counter, counter.clone())):
        w = some_weights()
        every_pass(w, steps)
        perturb_(w, Direction(7, steps[0]), 0.1, recover=Shift(Direction(7, steps[1]), 0.1))
        results.append(w)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


def test_weights_that_move_between_devices():
    p = torch.nn.Parameter(weights((3000,), torch.bfloat16))
    q = torch.nn.Parameter(p.detach().clone())
    kept, stays = Weights([p], [3]), Weights([q], [3])
    for step, device in enumerate(("cpu", DEVICE, DEVICE, "cpu", DEVICE)):
        p.data = p.data.to(device)
        for group in (kept, stays):
            direction = Direction(1, step, 0, "rademacher")
            perturb_(group, direction, 0.1)
            update_(group, [direction], torch.ones(1), 0.01, recover=Shift(direction, 0.1))
        assert p.device.type == device
        assert same_bits(p.detach().cpu(), q.detach())


def test_both_devices_in_one_call():
    tensors = [weights((300, 5), dtype, i) for i, dtype in enumerate(DTYPES)]
    mixed = [w.to(DEVICE if i % 2 else "cpu", copy=True) for i, w in enumerate(tensors)]
    for group in (mixed, tensors):
        perturb_(group, RADEMACHER, 0.1)
        update_(group, [RADEMACHER], torch.ones(1), 0.01, recover=Shift(RADEMACHER, 0.1))
    assert all(same_bits(a.cpu(), b) for a, b in zip(mixed, tensors, strict=True))
    with pytest.raises(ValueError, match=r"backend='triton' serves cuda tensors, got .* cpu"):
        perturb_(mixed[::-1], RADEMACHER, 0.1, backend="triton")
    assert all(same_bits(a.cpu(), b) for a, b in zip(mixed, tensors, strict=True))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = f"cuda:{1 - torch.cuda.current_device()}"
    current, results = torch.cuda.current_device(), []
    for places in ((other, DEVICE), (DEVICE, other), ("cpu", "cpu")):
        w = [weights((9000,), dtype).to(places[i % 2]) for i, dtype in enumerate(DTYPES)]
        perturb_(w, RADEMACHER, 0.1)
        directions = [RADEMACHER, RADEMACHER._replace(sample=1)]
        update_(w, directions, torch.ones(2), 0.01, recover=Shift(RADEMACHER, 0.1))
        w += [noise((100,), RADEMACHER, device=places[0]), perturbed(w[0], RADEMACHER, 0.1)]
        results.append([x.cpu() for x in w])
    assert torch.cuda.current_device() == current
    for some in results[:2]:
        assert all(map(same_bits, some, results[2]))
