"""Directions of low rank: their definition, written out, and every operation along them."""

import math

import pytest
import torch
from conftest import CPU_BACKENDS, element_bits, element_noise, same_bits, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import fill_noise, perturb, perturb_copy, replay

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    LARGEST_RANK,
    ROUNDINGS,
    Direction,
    Pass,
    Program,
    Region,
    Regions,
    Shift,
    Weights,
    factors,
    matrix_of,
    noise,
    perturb_,
    perturbed,
    replay_,
    update_,
)

HERE = [name for name in CPU_BACKENDS if name != "triton"]
MATRICES = [(6, 5), (2, 300), (130, 3), (3, 4, 5), (1, 4, 5), (4, 2, 3, 3), (2, 2, 1, 1, 3)]
VECTORS = [(7,), (1, 7), (7, 1), (3, 1, 5), (3, 5, 1), (1, 2, 3, 3), (5, 1, 1, 1), (), (1, 1)]
backends = pytest.mark.parametrize("backend", HERE)


def along(distribution="rademacher", rank=2, sample=0):
    return Direction(7, 2, sample, distribution, rank=rank)


def definition(direction, index, shape):
    """z = U V^T / sqrt(r) of each matrix of the stack, in float64, from numpy's philox."""
    if len(shape) == 3:
        stack, m, n = shape
    else:
        stack, m, n = 1, shape[0], math.prod(shape[1:])
    r = direction.rank
    u = element_noise(direction, index, 0, stack * m * r, stream=3).reshape(stack, m, r)
    v = element_noise(direction, index, 0, stack * n * r, stream=4).reshape(stack, n, r)
    return torch.from_numpy(u @ v.transpose(0, 2, 1) / math.sqrt(r)).reshape(shape)


@backends
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_the_definition(backend, distribution, rank, shape):
    direction = along(distribution, rank)
    found = noise(shape, direction, index=3, backend=backend)
    wanted = definition(direction, 3, shape)
    if distribution == "rademacher" and rank == 1:
        assert torch.equal(found.double(), wanted)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-4)
    assert (found.double() - wanted).square().mean() < 2e-5**2


@backends
@pytest.mark.parametrize("shape", VECTORS, ids=str)
def test_what_is_no_matrix_has_full_noise(backend, shape):
    assert matrix_of(shape) is None
    for distribution in DISTRIBUTIONS:
        direction = along(distribution, 3)
        found = noise(shape, direction, index=3, backend=backend)
        full = noise(shape, direction._replace(rank=0), index=3, backend=backend)
        assert same_bits(found, full)


@backends
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 3])
def test_float64_is_the_product_of_the_factors(backend, distribution, rank):
    shapes = [(6, 5), (9, 4), (3, 4, 5), (4, 2, 3, 3)]
    some = [along(distribution, rank, s) for s in range(3)]
    found = factors(shapes, some, indices=[5, 0, 7, 2], backend=backend)
    for shape, index, (left, right) in zip(shapes, [5, 0, 7, 2], found, strict=True):
        stack, rows, columns = shape if len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
        assert left.shape == (3, rank, stack * rows)
        assert right.shape == (3, rank, stack * columns)
        assert left.dtype == right.dtype == torch.float32
        u = left.double().unflatten(2, (stack, rows))
        v = right.double().unflatten(2, (stack, columns))
        z = torch.einsum("skei,skej->seij", u, v) / math.sqrt(rank)
        for s, direction in enumerate(some):
            full = noise(shape, direction, index=index, dtype=torch.float64, backend=backend)
            torch.testing.assert_close(full, z[s].reshape(shape), rtol=1e-15, atol=1e-14)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rank", [1, 4])
def test_moments(distribution, rank):
    """E z = 0, E z_i z_j = 1 where i = j, else 0. E z^4 <= 9, so means of n are 3/sqrt(n) off."""
    n = 4000
    some = [Direction(11, s, 0, distribution, rank=rank) for s in range(n)]
    ((u, v),) = factors([(4, 3)], some)
    z = (torch.einsum("ski,skj->sij", u, v) / math.sqrt(rank)).flatten(1).double()
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(n)
    second = z.T @ z / n
    assert (second - torch.eye(12)).abs().max() < 4.5 * 3 / math.sqrt(n)


# ---- operations on weights: shards are parts of the whole, backends agree --------------------


def update(w, direction, rounding, backend):
    """Along directions of several ranks, full among them; less than a bfloat16's ulp."""
    others = [direction._replace(sample=1 + s, rank=r) for s, r in enumerate((3, 0, 1))]
    update_(
        w,
        [direction, *others],
        torch.tensor([0.75, -0.5, 0.3, 0.9]),
        0.003,
        weight_decay=0.1,
        recover=Shift(direction, 0.125),
        rounding=rounding,
        backend=backend,
    )


OPERATIONS = [perturb, perturb_copy, update, replay, fill_noise]
operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.__name__)
directions = st.builds(
    Direction,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 9),
    distribution=st.sampled_from(DISTRIBUTIONS),
    version=st.just(2),
    rank=st.integers(1, 4),
)
shapes = st.sampled_from([(5, 7), (9, 2), (2, 130), (40, 129), (3, 4, 5), (4, 2, 3, 2), (1, 9)])


def agree(found, wanted, direction):
    """The same bits along signs. Gaussian factors are off by 1e-5, their products by 1e-4."""
    if direction.distribution == "rademacher":
        return same_bits(found, wanted)
    eps = max(torch.finfo(wanted.dtype).eps, 1e-6)
    bound = 4 * eps * (wanted.double().abs() + 3) + 2e-4
    return bool(((found.double() - wanted.double()).abs() <= bound).all())


def shards(tensor, dim, parts, index):
    """Copies of the shards along a dimension, and their Weights."""
    inner = math.prod(tensor.shape[dim + 1 :])
    pieces = [piece.clone() for piece in tensor.chunk(parts, dim)]
    lengths = [piece.shape[dim] * inner for piece in pieces]
    starts = [sum(lengths[:i]) for i in range(len(pieces))]
    rectangles = [(length, tensor.shape[dim] * inner) for length in lengths]
    places = [index] * len(pieces), starts, rectangles, [tensor.shape] * len(pieces)
    return pieces, Weights(pieces, *places)


@backends
@settings(max_examples=25)
@given(
    st.sampled_from(OPERATIONS),
    shapes,
    st.sampled_from(DTYPES),
    directions,
    st.sampled_from(ROUNDINGS),
    st.sampled_from([0, 4, 2**32 - 1]),
    st.data(),
)
def test_shards_make_up_the_whole(
    backend, operation, shape, dtype, direction, rounding, index, data
):
    """Shards along any dimension; and pieces of the flat parameter, as replays cut them."""
    before = weights(shape, dtype)
    whole, by_reference = before.clone(), before.clone()
    operation(Weights([whole], [index]), direction, rounding, backend)
    operation(Weights([by_reference], [index]), direction, rounding, "reference")
    assert agree(whole, by_reference, direction)

    dim, parts = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(2, 4))
    pieces, cut = shards(before, dim, parts, index)
    operation(cut, direction, rounding, backend)
    assert same_bits(torch.cat(pieces, dim), whole)

    flat = before.clone().view(-1)
    size = data.draw(st.integers(-(-len(flat) // 6), len(flat)))
    views = flat.split(size)
    starts = [size * i for i in range(len(views))]
    places = [index] * len(views), starts, None, [shape] * len(views)
    operation(Weights(views, *places), direction, rounding, backend)
    assert same_bits(flat.view(shape), whole)

    strided = torch.stack([before, before], -1)[..., 0]
    operation(Weights([strided], [index]), direction, rounding, backend)
    assert same_bits(strided.contiguous(), whole)


@backends
@operations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_signs_are_bit_equal_on_all_backends(backend, operation, dtype, rounding):
    """Also coarse weights, which a shift rounds stochastically; several tensors at a time."""
    made = [weights(s, dtype, i, 30.0) for i, s in enumerate([(41, 130), (9,), (3, 4, 5), (2, 9)])]
    wanted = [w.clone() for w in made]
    for rank in (1, 3):
        operation(Weights(made), along(rank=rank), rounding, backend)
        operation(Weights(wanted), along(rank=rank), rounding, "reference")
        for a, b in zip(made, wanted, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("rank", [1, 3])
def test_an_update_written_out(rank):
    """w - lr (sum_s c_s z_s + d w), stochastic bits as for full directions."""
    some = [along("rademacher", rank, s) for s in range(3)]
    c, lr, decay = [0.5, -0.25, 0.125], 2.0**-9, 0.25
    w = weights((5, 9), torch.float64)
    after = w.clone()
    update_([after], some, torch.tensor(c), lr, weight_decay=decay, indices=[4])
    z = sum(number * definition(d, 4, (5, 9)) for number, d in zip(c, some, strict=True))
    torch.testing.assert_close(after, w - lr * (z + decay * w), rtol=1e-14, atol=1e-15)

    w = weights((5, 9), torch.bfloat16)
    after = w.clone()
    update_([after], some, torch.tensor(c), lr, weight_decay=decay, indices=[4])
    exact = (w.double() - lr * (z + decay * w.double())).float()
    bits = torch.from_numpy(element_bits(some[0], 4, 0, 45)).view(5, 9).int()
    rounded = (((exact.view(torch.int32) + bits) >> 16) << 16).view(torch.float32)
    differs = rounded != after.float()  # where fp32's own rounding decides
    assert differs.sum() <= 1
    assert not torch.equal(after, w)


@backends
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perturbed_rows_and_parts(backend, distribution, dtype):
    w, direction = weights((9, 21), dtype), along(distribution)
    options = {"index": 3, "backend": backend}
    whole = perturbed(w, direction, 0.25, **options)
    for ids in (torch.tensor(4), torch.tensor([[8, 0, 4], [4, 5, 4]]), torch.tensor([], dtype=int)):
        assert same_bits(perturbed(w, direction, 0.25, rows=ids, **options), whole[ids])
    part = perturbed(w[3:5], direction, 0.25, offset=63, full_shape=(9, 21), **options)
    assert same_bits(part, whole[3:5])
    alone = noise((2, 21), direction, index=3, offset=63, full_shape=(9, 21), backend=backend)
    assert same_bits(alone, noise((9, 21), direction, index=3, backend=backend)[3:5])

    stack = weights((3, 4, 5), dtype)
    whole = perturbed(stack, direction, 0.25, **options)
    expert = perturbed(stack[1], direction, 0.25, offset=20, full_shape=(3, 4, 5), **options)
    assert same_bits(expert, whole[1])


@backends
def test_there_and_back(backend):
    """Signs, and numbers that are far from powers of two: recovered to the bit."""
    for dtype in DTYPES:
        w = torch.linspace(1.2, 1.8, 60).view(5, 12).to(dtype)
        before, direction = w.clone(), along(rank=1)
        perturb_([w], direction, 2.0**-6, backend=backend)
        assert not torch.equal(w, before)
        perturb_([w], None, recover=Shift(direction, 2.0**-6), backend=backend)
        assert same_bits(w, before)


@backends
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_replay_is_pass_after_pass(backend, distribution):
    some = [along(distribution, 2, s) for s in range(2)]
    full = Direction(7, 3, 0, distribution)
    passes = [
        Pass((Shift(some[0], 0.25), Shift(some[0], -0.25, back=True)), (some[0],), (0.5,), 0.1),
        Pass((Shift(full, 0.25),), (full, some[1]), (0.5, -1.0), 0.1, 0.25),
    ]
    for dtype in DTYPES:
        made = [weights(shape, dtype) for shape in ((9, 14), (9,))]
        twins = [w.clone() for w in made]
        replay_(made, Program(passes), backend=backend)
        for one in passes:
            for shift in one.shifts:
                taken = shift._replace(scale=-shift.scale)
                if shift.back:
                    perturb_(twins, None, recover=taken, backend=backend)
                else:
                    perturb_(twins, shift.direction, shift.scale, backend=backend)
            numbers = torch.tensor(one.coefficients, dtype=torch.float64)
            options = dict(weight_decay=one.weight_decay, backend=backend)
            update_(twins, one.directions, numbers, one.lr, **options)
        for a, b in zip(made, twins, strict=True):
            assert same_bits(a, b)


# ---- the CPU backend: parts and threads --------------------------------------------------------

needs_cpu = pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="needs numba")


@needs_cpu
@operations
def test_factors_in_parts_change_nothing(monkeypatch, operation):
    from zofo_kernels import cpu_tables

    shapes = [(41, 13), (9,), (3, 4, 5), (2, 90), (30, 30)]
    dtypes = [torch.float32, torch.bfloat16]
    whole = [weights(s, d, i) for i, s in enumerate(shapes) for d in dtypes]
    parts = [w.clone() for w in whole]
    operation(Weights(whole), along("gaussian"), "stochastic", "cpu")
    monkeypatch.setattr(cpu_tables, "_ROOM", 100)
    split, asked = cpu_tables.split, []
    monkeypatch.setattr(cpu_tables, "split", lambda *a: asked.append(split(*a)) or asked[-1])
    operation(Weights(parts), along("gaussian"), "stochastic", "cpu")
    assert max(map(len, asked)) > 1 or operation is fill_noise
    for a, b in zip(parts, whole, strict=True):
        assert same_bits(a, b)


@needs_cpu
@pytest.mark.parametrize("rank", [1, 3])
def test_threads_change_nothing(threads, rank):
    """Pieces of the weights, and of the factors of many directions."""
    some = [along("gaussian", rank, s) for s in range(70)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        made = [weights((301, 333), torch.bfloat16), weights((17, 5, 300), torch.float32)]
        perturb_(made, some[0], 1e-2)
        update_(made, some[:5], torch.ones(5), 1e-3, recover=Shift(some[0], 1e-2))
        found = factors([(301, 333), (1000, 20)], some)
        results.append([*made, *(factor for pair in found for factor in pair)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a.contiguous(), b.contiguous())


# ---- what cannot be ---------------------------------------------------------------------------

W = torch.zeros(3, 7)
LOW = along()
CALLS = [
    (lambda: perturb_([W], LOW._replace(rank=-1), 1.0), ValueError, "rank must be in .*got -1"),
    (lambda: perturb_([W], LOW._replace(rank=1.0), 1.0), TypeError, "rank must be an int, got 1.0"),
    (lambda: perturb_([W], LOW._replace(rank=True), 1.0), TypeError, "rank must be an int.*True"),
    (
        lambda: perturb_([W], LOW._replace(rank=LARGEST_RANK + 1), 1.0),
        ValueError,
        rf"rank must be in \[0, {LARGEST_RANK}\].*got {LARGEST_RANK + 1}",
    ),
    (
        lambda: update_([W], [LOW._replace(version=1)], torch.ones(1), 0.1),
        ValueError,
        "0 where version is 1, got 2 in version 1",
    ),
    (lambda: factors([(3, 4)], []), ValueError, "directions must hold at least one.*got none"),
    (lambda: factors([(3, 4)], [Direction(1, 1)]), ValueError, r"of one rank, at least 1.*\[0\]"),
    (lambda: factors([(3, 4)], [along(rank=1), LOW]), ValueError, r"of one rank.*ranks \[1, 2\]"),
    (
        lambda: factors([(3, 4), (3,)], [LOW]),
        ValueError,
        r"shapes\[1\] must be of a matrix.*\(3,\)",
    ),
    (
        lambda: factors([(3, 4)], [LOW], indices=[1, 2]),
        ValueError,
        r"indices must have one .*\(1\)",
    ),
    (
        lambda: Weights([W], shapes=[]),
        ValueError,
        r"shapes must have one entry a tensor \(1\), got 0",
    ),
    (
        lambda: Regions([Region(W, 0, matrix=(0, 3))]),
        ValueError,
        r"regions\[0\] must have a matrix with elements: \(0, 3\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_what_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert W.eq(0).all()


def test_no_parameters_have_no_factors():
    assert factors([], [LOW]) == []


@backends
def test_tensors_of_no_elements(backend):
    empty, w = torch.zeros(0, 5), torch.ones(4, 5)
    beside = torch.ones(4, 5)
    perturb_([empty, w], LOW, 0.5, backend=backend)
    perturb_([beside], LOW, 0.5, indices=[1], backend=backend)
    assert same_bits(w, beside)
