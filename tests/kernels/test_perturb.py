"""perturb_, perturbed and recover: against the formula, in every dtype and memory layout."""

import math

import numpy as np
import pytest
import torch
from conftest import bits, same_bits, shifted, weights
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
    perturbed,
)

LAYOUTS = ("contiguous", "transposed", "strided")
GAUSSIAN, RADEMACHER = Direction(3, 1), Direction(3, 1, 0, "rademacher")

SHAPES = st.one_of(
    st.lists(st.integers(0, 7), max_size=3).map(tuple),
    st.sampled_from([(1,), (127,), (129,), (2049,), (61, 67), (3, 1, 1400)]),
)
OFFSETS = st.one_of(
    st.just(0), st.integers(1, 3000), st.integers(2**32 - 300, 2**32 + 300), st.just(2**62 + 77)
)
SCALES = st.sampled_from([1e-3, -1e-3, 0.37, -2.0])
TENSORS = st.lists(
    st.fixed_dictionaries(
        {
            "shape": SHAPES,
            "dtype": st.sampled_from(DTYPES),
            "layout": st.sampled_from(LAYOUTS),
            "index": st.one_of(st.integers(0, 9), st.just(2**32 - 1)),
            "offset": OFFSETS,
            "poison": st.sampled_from([math.nan, 96.0]),
        }
    ),
    min_size=1,
    max_size=4,
)


def laid_out(values, layout, poison):
    """A view that holds ``values``, and the poisoned memory around and between its elements."""
    size, pad = values.numel(), 65
    memory = torch.full((3 * size + 2 * pad,), poison, dtype=values.dtype)
    inner = memory[pad : pad + 3 * size]
    if layout == "contiguous":
        view = inner[:size].view(values.shape)
    elif layout == "transposed":
        view = inner[:size].view(values.shape[::-1]).permute(tuple(reversed(range(values.ndim))))
    else:
        view = inner.view(*values.shape, 3)[..., 1]
    view.copy_(values)
    return view, memory


def surroundings_are_poison(view, memory, poison):
    """Overwrites the view."""
    view.fill_(poison)
    return bool((memory.isnan() if math.isnan(poison) else memory == poison).all())


def check(result, w, shifts, z_of, place=(0, 0)):
    """``result`` against w + scale z, shift after shift; ``z_of`` gives z in fp64.

    ``place`` is the parameter's index and the offset of its first element.

    Signs: the same bits as one product, one sum and one rounding in torch. Gaussian: half an ulp
    of the dtype, the roundings of fp32, and 5e-6 of z, for each shift.
    """
    compute = torch.float64 if w.dtype == torch.float64 else torch.float32
    signs = all(shift.direction.distribution == "rademacher" for shift in shifts)
    value, error = w.double(), torch.zeros(w.shape, dtype=torch.float64)
    rounded = w
    for shift in shifts:
        direction, scale, _ = shift
        z = torch.from_numpy(z_of(direction)).reshape(w.shape)
        if w.dtype in (torch.bfloat16, torch.float16):
            rounded = shifted(rounded.flatten(), shift, *place).reshape(w.shape)
            wide = direction.version > 1  # one whole number, not a half, where it is coarse
        else:
            step = torch.tensor(scale, dtype=compute) * z.to(compute)
            rounded, wide = (rounded.to(compute) + step).to(w.dtype), False
        value = value + scale * z
        error += torch.finfo(w.dtype).eps / (1 if wide else 2) * (value.abs() + error) + 5e-6 * abs(
            scale
        )
        error += torch.finfo(compute).eps * (w.double().abs() + (scale * z).abs())
        error += 2.0**-25 * (w.dtype == torch.float16)
    assert result.dtype == w.dtype
    assert result.shape == w.shape
    if signs:
        assert same_bits(result, rounded)
    assert ((result.double() - value).abs() <= error).all()


@given(
    TENSORS,
    st.sampled_from(DISTRIBUTIONS),
    SCALES,
    st.sampled_from(NOISE_VERSIONS),
    st.sampled_from(["perturb", "recover", "both", "both, other distribution"]),
)
def test_perturb_is_the_formula(
    backend, element_noise, tensors, distribution, scale, version, mode
):
    direction = Direction(2**64 - 5, 17, 2, distribution, version)
    other = Direction(2**64 - 5, 16, 2, distribution)
    if mode.endswith("other distribution"):  # of the same key
        swapped = DISTRIBUTIONS[1 - DISTRIBUTIONS.index(distribution)]
        other = direction._replace(distribution=swapped)
    recover = None if mode == "perturb" else Shift(other, 0.25)
    shifts = [recover.taken_off()] if recover else []
    shifts += [Shift(direction, scale)] if mode != "recover" else []

    before = [weights(t["shape"], t["dtype"], seed=i) for i, t in enumerate(tensors)]
    placed = [laid_out(w, t["layout"], t["poison"]) for w, t in zip(before, tensors, strict=True)]
    perturb_(
        [view for view, _ in placed],
        None if mode == "recover" else direction,
        scale,
        recover=recover,
        indices=[t["index"] for t in tensors],
        offsets=[t["offset"] for t in tensors],
        backend=backend,
    )
    for w, t, (view, memory) in zip(before, tensors, placed, strict=True):

        def z_of(direction, w=w, t=t):
            return element_noise(direction, t["index"], t["offset"], w.numel())

        check(view.clone(), w, shifts, z_of, (t["index"], t["offset"]))
        assert surroundings_are_poison(view, memory, t["poison"])


@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), OFFSETS, SCALES)
def test_perturbed_is_perturb_on_a_copy(backend, shape, dtype, layout, offset, scale):
    values = weights(shape, dtype)
    view, memory = laid_out(values, layout, 96.0)
    version, content = view._version, memory.clone()
    out = perturbed(view, GAUSSIAN, scale, index=5, offset=offset, backend=backend)
    assert same_bits(memory, content)
    assert view._version == version
    assert out.is_contiguous()
    assert not out.numel() or out.data_ptr() != view.data_ptr()
    perturb_([values], GAUSSIAN, scale, indices=[5], offsets=[offset], backend=backend)
    assert same_bits(out, values)


def test_default_indices_and_offsets(backend):
    tensors = [torch.zeros(5), torch.zeros(0), torch.zeros(2, 3)]
    perturb_(tensors, GAUSSIAN, 1.0, backend=backend)
    assert torch.equal(tensors[0], noise((5,), GAUSSIAN, index=0, backend=backend))
    assert torch.equal(tensors[2], noise((2, 3), GAUSSIAN, index=2, backend=backend))
    out = perturbed(torch.zeros(5), GAUSSIAN, 1.0, backend=backend)
    assert torch.equal(out, tensors[0])
    perturb_([], GAUSSIAN, 1.0, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_give_the_same_bits_in_both_backends(dtype):
    pytest.importorskip("numba")
    shift = Shift(Direction(4, 1, 0, "rademacher"), 7e-3)
    results = []
    for backend in ("reference", "cpu"):
        tensors = [weights((300_001,), dtype, 1, 1.0), weights((70, 99), dtype, 2, 1e-3)]
        for recover, scale in ((None, 1e-2), (Shift(RADEMACHER, 1e-2), 3e-3), (shift, -1e9)):
            place = {"indices": [7, 0], "offsets": [2**40 + 3, 12_800]}
            perturb_(tensors, RADEMACHER, scale, recover=recover, **place, backend=backend)
        results.append(tensors)
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", [GAUSSIAN, RADEMACHER], ids=DISTRIBUTIONS)
def test_threads_change_nothing(threads, dtype, direction):
    sizes, results = (70_001, 3, 90_003, 0, 130_050), []
    for count in (1, 2, 3):
        threads(count)
        tensors = [weights((n,), dtype, n) for n in sizes]
        perturb_(tensors, direction, 0.1, offsets=[5, 0, 128, 0, 2**33])
        perturb_(tensors, direction, 0.2, recover=Shift(direction, 0.1))
        results.append(tensors)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# Recovering.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", [GAUSSIAN, RADEMACHER], ids=DISTRIBUTIONS)
def test_recovering_wide_dtypes_costs_a_few_ulp(backend, dtype, direction):
    w = weights((20_000,), dtype, sigma=0.02)
    there = perturbed(w, direction, 1e-3, backend=backend)
    back = there.clone()
    perturb_([back], None, recover=Shift(direction, 1e-3), backend=backend)
    ulp = torch.finfo(dtype).eps * torch.maximum(w.abs(), there.abs())
    assert ((back - w).abs() <= 2 * ulp).all()
    assert not torch.equal(there, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", [GAUSSIAN, RADEMACHER], ids=DISTRIBUTIONS)
def test_recovering_16_bits_is_exact_where_the_exponent_does_not_grow(backend, dtype, direction):
    w = weights((20_000,), dtype, sigma=0.02)
    there = perturbed(w, direction, 1e-3, backend=backend)
    back = there.clone()
    perturb_([back], None, recover=Shift(direction, 1e-3), backend=backend)

    mantissa, exponent = torch.frexp(w.double())
    grew = torch.frexp(there.double()).exponent > exponent
    # Left out: powers of two, below which the grid is finer, and ties, which may go either way.
    z = noise(w.shape, direction, backend=backend).double()
    ulp = torch.finfo(dtype).eps * 2.0 ** (exponent.double() - 1)
    missed = (there.double() - (w.double() + 1e-3 * z)).abs() / ulp
    kept = ~grew & (mantissa.abs() != 0.5) & (missed < 0.499)
    assert kept.float().mean() > 0.8
    assert torch.equal(back[kept], w[kept])
    # elsewhere within one ulp of the perturbed weight
    bound = 1.01 * torch.finfo(dtype).eps * torch.maximum(there.abs(), w.abs()).double() + 2e-9
    assert ((back.double() - w.double()).abs() <= bound).all()


def test_drift_over_1000_steps_in_bfloat16():
    start, mu = weights((4096,), torch.bfloat16, sigma=0.02), 1e-3
    w, naive = start.clone(), start.clone()
    for step in range(1000):
        direction = Direction(1, step)
        perturb_([w], direction, mu)
        perturb_([w], direction, -mu, recover=Shift(direction, mu))
        perturb_([w], None, recover=Shift(direction, -mu))
        z = noise(naive.shape, direction)
        for scale in (mu, -2 * mu, mu):
            naive = (naive.float() + scale * z).bfloat16()

    def drift(x):
        return (x.double() - start.double()).square().mean().sqrt().item()

    assert drift(w) < 5e-4
    assert drift(naive) > 4 * drift(w)


# What must not get lost.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", [GAUSSIAN, RADEMACHER], ids=DISTRIBUTIONS)
def test_special_values_survive(backend, dtype, direction):
    w = torch.ones(3000, dtype=dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    w[500:503] = w[2100:2103] = special
    perturb_([w], direction, 0.1, backend=backend)
    perturb_([w], direction, -0.1, recover=Shift(direction, 0.1), backend=backend)
    for at in (500, 2100):
        assert w[at].isnan()
        assert torch.equal(w[at + 1 : at + 3], special[1:])
    assert w.isfinite().sum() == 3000 - 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", [GAUSSIAN, RADEMACHER], ids=DISTRIBUTIONS)
def test_every_16_bit_value(backend, dtype, direction):
    """All bit patterns, shifted by 0, by little and by much."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (0.0, 1e-3, 3e4):
        expected = shifted(w, Shift(direction, scale))
        out = perturbed(w, direction, scale, backend=backend)
        number = ~w.isnan()
        assert out[~number].isnan().all()
        if scale == 0 or direction.distribution == "rademacher":
            assert same_bits(out[number], expected[number])
        else:  # a fused multiply-add may change the last bit
            assert (out[number] != expected[number]).float().mean() < 1e-2
            apart = bits(out[number]).int() - bits(expected[number]).int()
            zero = (out[number] == 0) & (expected[number] == 0)
            tiny = (out[number].float() - expected[number].float()).abs() < 5e-6 * scale
            assert ((apart.abs() <= 1) | zero | tiny).all()


def test_autograd_sees_the_change(backend):
    for w in (torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4, 4)).t()):
        version = w._version
        perturb_([w], GAUSSIAN, 0.1, backend=backend)
        assert w._version > version
    x = torch.nn.Parameter(torch.ones(4))
    loss = x.square().sum()
    perturb_([x], GAUSSIAN, 0.1, backend=backend)
    assert x.requires_grad
    assert x.is_leaf
    assert x.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_and_empty_calls(backend):
    with torch.inference_mode():
        w = torch.zeros(9)
        perturb_([w], GAUSSIAN, 1.0, backend=backend)
        assert torch.equal(w, noise((9,), GAUSSIAN, backend=backend))
    w = torch.ones(3)
    perturb_([w], None, backend=backend)
    assert torch.equal(w, torch.ones(3))


@pytest.mark.parametrize("count", [1, 5])
def test_lazily_negated_views(backend, count):
    """The imaginary part of a conjugate: torch stores it with the other sign."""
    number = torch.complex(torch.ones(count), torch.full((count,), 2.0))
    w = number.conj().imag
    assert w.is_neg()
    perturb_([w], RADEMACHER, 0.25, backend=backend)
    z = noise((count,), RADEMACHER, backend=backend)
    assert torch.equal(w, -2 + 0.25 * z)
    assert torch.equal(number.imag, 2 - 0.25 * z)
    assert torch.equal(number.real, torch.ones(count))
    assert torch.equal(perturbed(w, RADEMACHER, 0.25, backend=backend), -2 + 0.5 * z)


# Errors name the argument, and change nothing.

BAD_TENSORS = {
    "int64": (lambda: torch.zeros(3, dtype=torch.int64), TypeError, "int64"),
    "bool": (lambda: torch.zeros(3, dtype=torch.bool), TypeError, "bool"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), TypeError, "complex64"),
    "float8": (lambda: torch.zeros(3).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        TypeError,
        "qint8",
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, "sparse"),
    "numpy": (lambda: np.zeros(3, np.float32), TypeError, "ndarray"),
    "none": (lambda: None, TypeError, "NoneType"),
    "meta": (lambda: torch.zeros(3, device="meta"), ValueError, "meta"),
    "expanded": (lambda: torch.zeros(1).expand(3), ValueError, "share memory"),
    "expanded matrix": (lambda: torch.zeros(3, 1).expand(3, 4), ValueError, "share memory"),
}


@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors(backend, kind):
    make, error, reason = BAD_TENSORS[kind]
    good, strided = torch.ones(5), torch.ones(5, 2)[:, 0]
    bad = make()
    content = bad.clone() if isinstance(bad, torch.Tensor) else None
    with pytest.raises(error, match=rf"tensors\[2\].*{reason}"):
        perturb_([good, strided, bad], GAUSSIAN, 0.1, backend=backend)
    assert good.eq(1).all()
    assert strided.eq(1).all()
    assert good._version == 0
    if kind in ("int64", "bool", "complex", "expanded", "expanded matrix"):
        assert torch.equal(bad, content)
    with pytest.raises(error, match=rf"tensor .*{reason}"):
        perturbed(bad, GAUSSIAN, 0.1, backend=backend)


BAD_ARGUMENTS = [
    ({"scale": math.nan}, ValueError, "scale must be .*nan"),
    ({"scale": -math.inf}, ValueError, "scale must be .*inf"),
    ({"scale": "1"}, ValueError, "scale must be .*'1'"),
    ({"direction": 3}, TypeError, "direction must be .*3"),
    ({"direction": Direction(-1, 0)}, ValueError, "seed must be .*-1"),
    ({"direction": Direction(0, 0, 0, "no")}, ValueError, "distribution must be .*'no'"),
    ({"recover": 0.1}, TypeError, "recover must be .*0.1"),
    ({"recover": (GAUSSIAN, 0.1)}, TypeError, "recover must be"),
    ({"recover": Shift(GAUSSIAN, math.nan)}, ValueError, "recover.scale must be .*nan"),
    ({"recover": Shift(Direction(0, -1), 0.1)}, ValueError, "step must be .*-1"),
    ({"indices": [0]}, ValueError, r"indices must have .*\(2\).* 1"),
    ({"indices": [0, -1]}, ValueError, "indices must be .*-1"),
    ({"indices": [0, 2**32]}, ValueError, "indices must be .*4294967296"),
    ({"offsets": [0, 0, 0]}, ValueError, r"offsets must have .*\(2\).* 3"),
    ({"offsets": [0, -8]}, ValueError, "offsets must be .*-8"),
    ({"offsets": [0, 2**63]}, ValueError, "offsets must be .*9223372036854775808"),
    ({"tensors": torch.ones(2)}, TypeError, r"tensors must be .*pass \[tensor\]"),
    ({"backend": "numba"}, ValueError, "backend must be .*'numba'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(backend, change, error, message):
    tensors = [torch.ones(5), torch.ones(2, 2).t()]
    arguments = {"tensors": tensors, "direction": GAUSSIAN, "scale": 0.1, "backend": backend}
    with pytest.raises(error, match=message):
        perturb_(**(arguments | change))
    assert all(w.eq(1).all() for w in tensors)


def test_offsets_leave_room_for_the_elements(backend):
    w = torch.zeros(129)
    for run in (
        lambda: perturb_([w], GAUSSIAN, 1.0, offsets=[2**63 - 128], backend=backend),
        lambda: perturbed(w, GAUSSIAN, 1.0, offset=2**63 - 128, backend=backend),
        lambda: noise((129,), GAUSSIAN, offset=2**63 - 128, backend=backend),
    ):
        with pytest.raises(ValueError, match=r"offsets must leave room .* below 2\*\*63"):
            run()
    assert w.eq(0).all()
    perturb_([w[:128]], GAUSSIAN, 1.0, offsets=[2**63 - 128], backend=backend)
