"""The noise: published vectors, golden values, agreement of backends, slices, statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    NOISE_VERSIONS,
    Direction,
    noise,
    perturb_,
    reference,
)
from zofo_kernels.direction import KEY_VERSION, check_direction

# From kat_vectors of Random123, the library of Philox's authors: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

# Noise of versions 1 and 2, which recorded runs rely on: seed, step, sample; key; first normals of
# parameter 3 from elements 0 and 2^36 + 5 on; the signs of 64 elements from 2^36 + 5 on (set bit:
# -1); the rounding bits from element 5 on.
GOLDEN = [
    (
        (0, 0, 0),
        (0x6D8D86C3, 0xB18A02F4),
        [2.4056520, 0.9110449, -1.6508896, -0.8183306, 1.2784365, 0.7556418],
        [1.9494666, -0.5220866, 1.0215515, 0.6004292, -1.1400962, 0.3984222],
        0xCDFF04FD4D5B6688,
        [40448, 10591, 27394, 17582, 28841],
    ),
    (
        (42, 1000, 0),
        (0xDC543137, 0xC0811D5C),
        [0.5326212, 1.0421643, -0.6747615, 0.6345788, 0.4911529, 1.4566711],
        [-1.2344719, 0.4171098, 0.4327556, 0.0442346, -1.0292397, 2.7658401],
        0x5C46AE65EB951004,
        [10811, 50901, 19715, 48576, 56982],
    ),
    (
        (2**64 - 1, 123456789, 7),
        (0xE1526D8A, 0x6CE1346A),
        [-0.1327081, 1.6601663, -0.3562128, -0.4507150, 1.0321769, -1.5244292],
        [-0.5525181, -0.3273072, -0.1059046, -0.3314403, 0.6293395, 0.2418869],
        0xB03302385917A808,
        [2691, 38770, 14395, 7029, 48908],
    ),
]
FAR = 2**36 + 5

# Offsets around the places where a word of the counter or a 32-bit integer would overflow:
# 2^35 and 2^39 are the elements at which the block number needs its high word.
BORDERS = [0, 2**31, 2**32, 2**35, 2**39, 2**62]
OFFSETS = st.builds(lambda b, d: max(b + d, 0), st.sampled_from(BORDERS), st.integers(-2100, 2100))
DIRECTIONS = st.builds(
    Direction,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 9),
    distribution=st.sampled_from(DISTRIBUTIONS),
    version=st.sampled_from(NOISE_VERSIONS),
    rank=st.just(0),
)
INDICES = st.one_of(st.integers(0, 5), st.just(2**32 - 1))


def philox_reference(counter, key):
    words = reference.philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    return [int(word) for word in words]


def philox_cpu(counter, key):
    cpu_random = pytest.importorskip("zofo_kernels.cpu_random")
    words = np.zeros(4, np.uint32)
    block = np.uint64(counter[0] | counter[1] << 32)
    cpu_random.philox(words, 1, block, counter[2], counter[3], *key)
    return words.tolist()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
@pytest.mark.parametrize("compute", [philox_reference, philox_cpu])
def test_philox_known_answers(compute, counter, key, expected):
    assert compute(counter, key) == expected


@pytest.mark.parametrize(("identity", "key", "near", "far", "signs", "bits"), GOLDEN)
def test_golden_values(backend, identity, key, near, far, signs, bits):
    assert KEY_VERSION == 1, "another noise needs golden values of its own"
    direction = Direction(*identity)
    assert direction.key() == key
    assert direction._replace(distribution="rademacher").key() == key

    tolerance = {"rtol": 0, "atol": 1e-6}
    z = noise((6,), direction, index=3, backend=backend)
    torch.testing.assert_close(z, torch.tensor(near), **tolerance)
    z = noise((6,), direction, index=3, offset=FAR, backend=backend)
    torch.testing.assert_close(z, torch.tensor(far), **tolerance)

    direction = direction._replace(distribution="rademacher")
    z = noise((64,), direction, index=3, offset=FAR, backend=backend).tolist()
    assert z == [-1.0 if signs >> i & 1 else 1.0 for i in range(64)]
    assert reference.rounding_values(direction, 3, 5, 5, torch.device("cpu")).tolist() == bits


def test_words_are_the_same_integers_in_both_backends(philox):
    cpu_random = pytest.importorskip("zofo_kernels.cpu_random")
    direction, index, blocks = Direction(5, 6, 7), 2**32 - 1, 1000
    for first in (0, 2**32 - 500, 2**60):
        for stream in (0, 1):
            block = np.uint64(first) + np.arange(blocks, dtype=np.uint64)
            expected = philox(direction, index, stream, block)
            words = np.zeros(4 * blocks, np.uint32)
            cpu_random.philox(words, blocks, np.uint64(first), index, stream, *direction.key())
            np.testing.assert_array_equal(words.reshape(-1, 4).T, expected)
            words = reference.random_words(direction, index, stream, first, blocks, "cpu")
            np.testing.assert_array_equal(words.numpy().T, expected)


def box_muller(words):
    """The definition in fp64: uint32 (n,) -> (2 n,)."""
    k, a = (words & 0x7FFFFF).astype(np.float64), (words >> 23).astype(np.float64)
    radius = np.sqrt(-2 * np.log((2 * k + 1) / 2**24))
    angle = (np.where(a < 256, a, a - 512) + 0.5) * np.pi / 256
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).ravel()


def crafted_words():
    """Extreme radii under every angle, and a sweep through all radii."""
    near_split = []  # the logarithm is split where u = (2k + 1) / 2^24 crosses 2^(e + 1/2)
    for e in range(-22, 1):
        k = int(2**23 * 2 ** (e - 0.5))
        near_split += range(k - 2, k + 3)
    k = np.concatenate([np.arange(600), np.arange(2**23 - 600, 2**23), near_split])
    k = k[(k >= 0) & (k < 2**23)]
    extremes = (k[:, None] | np.arange(512) << 23).ravel()
    k = np.arange(0, 2**23, 5)
    return np.concatenate([extremes, k | k % 512 << 23]).astype(np.uint32)


def test_gaussian_of_crafted_words():
    words = crafted_words()
    expected = box_muller(words)
    of_reference = reference.gaussian_from_words(torch.from_numpy(words.astype(np.int64))[:, None])
    assert np.abs(of_reference.numpy().ravel() - expected).max() < 3e-7
    assert np.abs(expected).max() < 5.8

    cpu_random = pytest.importorskip("zofo_kernels.cpu_random")
    z = np.full(2 * len(words), np.nan, np.float32)
    cpu_random.gaussian(words, len(words), z)
    assert np.abs(z - expected).max() < 5e-6
    assert np.abs(z).max() < 5.8


@given(DIRECTIONS, INDICES, OFFSETS, st.integers(0, 2500), st.integers(0, 2500))
def test_a_slice_has_the_noise_of_its_elements(
    backend, element_noise, direction, index, offset, start, count
):
    whole = noise((start + count + 9,), direction, index=index, offset=offset, backend=backend)
    part = noise((count,), direction, index=index, offset=offset + start, backend=backend)
    assert torch.equal(part, whole[start : start + count])
    expected = element_noise(direction, index, offset + start, count)
    atol = 5e-6 if direction.distribution == "gaussian" else 0
    torch.testing.assert_close(part.double(), torch.from_numpy(expected), rtol=0, atol=atol)


def test_chunks_of_the_reference_join(backend):
    n = 2 * reference.CHUNK + 77
    for distribution in DISTRIBUTIONS:
        direction = Direction(1, 1, distribution=distribution)
        whole = noise((n,), direction, offset=3, backend=backend)
        for start in (reference.CHUNK - 5, 2 * reference.CHUNK - 5):
            part = noise((60,), direction, offset=3 + start, backend=backend)
            assert torch.equal(part, whole[start : start + 60])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_dtype_shape_and_grouping_change_nothing(backend, distribution):
    direction = Direction(11, 12, 13, distribution)
    z = noise((6000,), direction, index=4, offset=5, backend=backend)
    assert z.dtype == torch.float32
    for dtype in DTYPES:
        other = noise((6000,), direction, index=4, offset=5, dtype=dtype, backend=backend)
        assert torch.equal(other, z.to(dtype))
    shaped = noise((3, 40, 50), direction, index=4, offset=5, backend=backend)
    assert shaped.shape == (3, 40, 50)
    assert torch.equal(shaped.flatten(), z)
    assert noise((), direction, index=4, offset=5, backend=backend).item() == z[0].item()
    assert noise((3, 0), direction, backend=backend).shape == (3, 0)

    group = [torch.zeros(100), torch.zeros(6000), torch.zeros(0), torch.zeros(2, 3)]
    place = {"indices": [0, 4, 4, 2**32 - 1], "offsets": [0, 5, 0, 2**40]}
    perturb_(group, direction, 1.0, **place, backend=backend)
    assert torch.equal(group[1], z)
    last = noise((2, 3), direction, index=2**32 - 1, offset=2**40, backend=backend)
    assert torch.equal(group[3], last)


# Statistics: fixed seeds, and bounds of five standard errors of a true N(0, 1) sample.

N = 1 << 22
SE = 1 / math.sqrt(N)


def draw(n=N, index=0, **fields):
    identity = {"seed": 2024, "step": 7, "sample": 1} | fields
    return noise((n,), Direction(**identity), index=index).double().numpy()


@pytest.fixture(scope="module")
def draws():
    return draw()


def test_moments(draws):
    moment = {p: math.prod(range(p - 1, 0, -2)) * (p % 2 == 0) for p in range(1, 13)}
    for p in range(1, 7):
        error = math.sqrt(moment[2 * p] - moment[p] ** 2)
        assert abs(np.mean(draws**p) - moment[p]) < 5 * error * SE, p
    assert abs(stats.kurtosis(draws)) < 5 * math.sqrt(24) * SE


def test_tails(draws):
    size = np.abs(draws)
    for bound in (0.1, 0.5, 1, 2, 3, 4):
        p = 2 * stats.norm.sf(bound)
        assert abs(np.mean(size > bound) - p) < 5 * math.sqrt(p * (1 - p)) * SE, bound
        assert abs(np.mean(draws > bound) - p / 2) < 5 * math.sqrt(p / 2) * SE, bound
    assert 4.7 < size.max() < 5.8


def test_kolmogorov_smirnov(draws):
    critical = 1.63 * SE  # a true sample exceeds it with probability 0.01
    # With 512 angles, P(z > x) is the mean of exp(-x^2 / (2 cos^2)) over the positive cosines.
    cosines = np.cos((np.arange(-128, 128) + 0.5) * np.pi / 256)
    grid = np.unique(np.concatenate([np.linspace(0, 0.1, 2001), np.linspace(0.1, 5.8, 4001)]))
    upper = np.exp(-np.square(grid[:, None] / cosines) / 2).sum(axis=1) / 512

    def exact(x):
        p = np.interp(np.abs(x), grid, upper)
        return np.where(x > 0, 1 - p, p)

    # The cosines end at 0.006, so the density has a dip at |x| < 0.01: its distribution function
    # is off the normal one by 6.6e-4 at |x| = 0.0036, and by less than 2e-7 for |x| > 0.1.
    dip = np.abs(upper - stats.norm.sf(grid))
    assert dip.max() < 7e-4
    assert dip[grid > 0.1].max() < 2e-7
    assert stats.kstest(draws, exact).statistic < critical
    assert stats.kstest(draws, stats.norm.cdf).statistic < critical + 7e-4


def dependence(x, y):
    """The correlations of x with y and of x^2 with y^2, in standard errors."""
    n = math.sqrt(len(x))
    return max(abs(np.dot(x, y)) / n, abs(np.dot(x * x - 1, y * y - 1)) / (2 * n))


def test_elements_are_independent_of_their_neighbours(draws):
    for lag in [*range(1, 17), 128, 2048]:
        assert dependence(draws[:-lag], draws[lag:]) < 5, lag
    # cosine and sine of one word, on their own and by place in the block
    assert dependence(draws[0::2], draws[1::2]) < 5
    blocks = np.ascontiguousarray(draws.reshape(-1, 8).T)
    for i in range(8):
        for j in range(i):
            assert dependence(blocks[i], blocks[j]) < 5, (i, j)


@pytest.mark.parametrize(
    "other",
    [
        {"index": 1},
        {"index": 256},
        {"step": 8},
        {"sample": 0},
        {"sample": 2},
        {"seed": 2025},
        {"seed": 7, "step": 2024},
        {"step": 1, "sample": 7},
    ],
    ids=str,
)
def test_directions_are_independent(draws, other):
    y = draw(**other)
    assert dependence(draws, y) < 5
    for lag in (1, 2, 8):
        assert dependence(draws[lag:], y[:-lag]) < 5
        assert dependence(draws[:-lag], y[lag:]) < 5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("field", ["seed", "step"])
def test_identities_one_bit_apart_are_independent(field, distribution):
    n = 1 << 15
    values = [2024] + [2024 ^ (1 << bit) for bit in range(64)]
    z = np.stack([draw(n, distribution=distribution, **{field: value}) for value in values])
    correlation = z @ z.T / n
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(n)  # the largest of 2080 pairs


def test_keys_do_not_collide():
    keys = {
        Direction(seed, step, sample).key()
        for seed in range(40)
        for step in range(40)
        for sample in range(20)
    }
    assert len(keys) == 40 * 40 * 20


def test_signs_are_balanced_and_independent():
    z = draw(distribution="rademacher")
    assert set(np.unique(z)) == {-1.0, 1.0}
    by_bit = z.reshape(-1, 128)
    n = math.sqrt(len(by_bit))
    assert np.abs(by_bit.mean(axis=0)).max() < 4.5 / n
    correlation = by_bit.T @ by_bit / len(by_bit)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.5 / n  # the largest of 8128 pairs
    for lag in [*range(1, 17), 32, 128]:
        assert abs(np.dot(z[:-lag], z[lag:])) * SE < 5, lag


def test_rounding_bits_are_uniform_and_have_a_stream_of_their_own(element_bits):
    direction = Direction(2024, 7, 1)
    bits = reference.rounding_values(direction, 2, FAR, 1 << 16, torch.device("cpu")).numpy()
    np.testing.assert_array_equal(bits, element_bits(direction, 2, FAR, 1 << 16))
    counts = np.bincount(bits >> 8, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3
    counts = np.bincount(bits & 255, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3
    z = noise((1 << 16,), direction, index=2, offset=FAR).double().numpy()
    assert dependence(z, (bits + 0.5 - 2**15) / (2**16 / math.sqrt(12))) < 5


@pytest.mark.parametrize("field", ["seed", "step", "sample"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)],
)
def test_bad_fields_of_a_direction(field, value, error):
    direction = Direction(0, 0)._replace(**{field: value})
    with pytest.raises(error, match=f"{field} must be .*{value}"):
        noise((3,), direction)
    check_direction(Direction(0, 0)._replace(**{field: 2**64 - 1}))


def test_other_bad_arguments(backend):
    def call(shape=(3,), direction=None, **options):
        return noise(shape, direction or Direction(0, 0), backend=backend, **options)

    with pytest.raises(ValueError, match=r"distribution must be one of .*'uniform'"):
        call(direction=Direction(0, 0, 0, "uniform"))
    with pytest.raises(TypeError, match="direction must be"):
        call(direction=(0, 0, 0, "gaussian"))
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"dtype must be one of .*{dtype}"):
            call(dtype=dtype)
    with pytest.raises(RuntimeError, match="negative dimension"):
        call(shape=(2, -1))
    with pytest.raises(TypeError):
        call(shape=(2.5,))
    with pytest.raises(ValueError, match="meta"):
        call(device="meta")
    for index in (-1, 2**32):
        with pytest.raises(ValueError, match=f"ind.* must be in .*{index}"):
            call(index=index)
    for offset in (-1, 2**63):
        with pytest.raises(ValueError, match=f"offset.* must be in .*{offset}"):
            call(offset=offset)
