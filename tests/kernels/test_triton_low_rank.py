"""Directions of low rank in the Triton backend, in the interpreter."""

import importlib
import math

import pytest
import torch
from arranged import HERE, PIECE, Arranged, agree, interpreted_kernels
from conftest import same_bits, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends import OPERATIONS, check

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    NOISE_VERSION,
    Direction,
    Matrix,
    Region,
    Regions,
    Shift,
    Weights,
    factors,
    matrix_of,
    noise,
    perturb_,
    perturbed,
    reference,
    update_,
)
from zofo_kernels.structure import STREAM_LEFT, STREAM_RIGHT, FactorJob

pytestmark = pytest.mark.usefixtures("interpreted")

SIGNS = Direction(3, 1, 0, "rademacher", rank=1)
NORMAL = Direction(3, 1, 0, rank=2)


@pytest.fixture(scope="module")
def kernels(interpreted):
    return interpreted_kernels()


@pytest.fixture(scope="module")
def tables(kernels):
    return importlib.import_module("zofo_kernels.triton_tables")


@pytest.fixture
def launches(kernels, monkeypatch):
    """Names of the kernels that are launched from now on."""
    names = []
    for module, name in ((kernels.kernels, "pass_kernel"), (kernels.low_rank, "low_rank_kernel")):
        compiled = getattr(module, name)

        class Spied:
            def __getitem__(self, grid, compiled=compiled, name=name):
                names.append(name)
                return compiled[grid]

        monkeypatch.setattr(module, name, Spied())
    return names


directions = st.builds(
    Direction,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 3),
    distribution=st.sampled_from(DISTRIBUTIONS),
    version=st.just(NOISE_VERSION),
    rank=st.sampled_from([1, 1, 2, 3, 4, 5]),
)
matrices = st.builds(
    Matrix, st.sampled_from([2, 3, 64, 2**20]), st.sampled_from([1, 2, 3, 7, 8, 24, 130, 2**17])
)


@st.composite
def places(draw, rows):
    """As of test_backends: rectangles at any place of matrices, stacks of them, and vectors."""
    length = draw(st.sampled_from([1, 7, 8, 129, 256]))
    offset = draw(st.sampled_from([0, 3, 128, 2**35 - 72, 2**35 - 70, 2**39 + 2**17 - 8]))
    matrix = draw(st.one_of(st.none(), matrices, matrices, matrices))
    far = 2**33 if matrix is None or matrix.columns == 2**17 else 128
    gap = draw(st.sampled_from([0, 0, 1, 8, 2**17 - 256, far]))
    place = draw(st.sampled_from([0, 5, 2**32 - 1])), offset, length, length + gap, matrix
    return draw(st.sampled_from(DTYPES)), draw(st.integers(1, rows)), place


def other_parameters(made):
    """Parameters of different matrices."""
    return [(d, rows, (i, *place[1:])) for i, (d, rows, place) in enumerate(made)]


MADE_OF_OTHERS = ("factors", "replay")  # factors is below


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in MADE_OF_OTHERS])
@settings(max_examples=3)
@given(st.lists(places(2), min_size=1, max_size=2), directions, st.booleans(), st.data())
def test_triton_does_as_the_reference(operation, made, direction, keep, data):
    check("triton", operation, other_parameters(made), direction, keep, data)


SHAPES = [(16, 24), (9, 5), (3, 4, 8), (5, 6, 7), (4, 3, 3, 3), (2, 12, 1, 4), (40,), (1, 30)]


@settings(max_examples=4)
@given(
    st.lists(
        st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.integers(0, 9)),
        min_size=1,
        max_size=2,
    ),
    directions,
    st.integers(1, 5),
    st.sampled_from([None, 0, 1]),
    st.sampled_from(["nearest", "stochastic"]),
)
def test_steps_of_lists_anywhere_in_memory(made, direction, samples, recover, rounding):
    """Shift, the way back and to another side, and update; nothing else is written."""
    before = [weights(shape, dtype, i) for i, (shape, dtype, _) in enumerate(made)]
    arranged = Arranged(before, [shift for *_, shift in made])
    expected = [w.clone() for w in before]
    along = [direction._replace(sample=s) for s in range(samples)]
    shifts = [Shift(along[-1], -0.01), Shift(along[-1]._replace(step=7), 0.02)]
    for group, backend in ((arranged.tensors, "triton"), (expected, "reference")):
        perturb_(group, along[0], 0.01, backend=backend)
        perturb_(group, along[-1], -0.01, recover=Shift(along[0], 0.01), backend=backend)
        update_(
            group,
            along,
            weights((samples,), torch.float32, 5, 1.0),
            0.1,
            weight_decay=0.1,
            recover=None if recover is None else shifts[recover],
            rounding=rounding,
            backend=backend,
        )
    for result, wanted in zip(arranged.tensors, expected, strict=True):
        assert agree(result, wanted, direction, roundings=5)
    assert arranged.rest_is_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_the_product_of_the_factors(dtype):
    for shape, rank in (((24, 16), 3), ((9, 5), 2))[: 2 if dtype == torch.float64 else 1]:
        direction = SIGNS._replace(rank=rank)
        ((left, right),) = factors([shape], [direction], **HERE)
        root = torch.tensor(1 / math.sqrt(rank), dtype=torch.float64)
        z = noise(shape, direction, dtype=dtype, **HERE)
        product = (left[0].double().T @ right[0].double()) * root
        torch.testing.assert_close(z.double(), product, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert same_bits(z, noise(shape, direction, dtype=dtype, backend="reference"))


def test_minus_zero_keeps_its_sign_where_it_does_in_the_reference():
    for rank, scale in ((1, -0.0), (3, 0.0)):
        direction = SIGNS._replace(rank=rank)
        w = torch.full((8, 16), -0.0)
        here, there = (perturbed(w, direction, scale, backend=b) for b in ("triton", "reference"))
        assert same_bits(here, there)
        assert here.signbit().any()
        update_([w], [direction], torch.tensor([scale]), 0.1, **HERE)
        assert w.signbit().all()


# Directions of several ranks.


@pytest.mark.parametrize(
    ("ranks", "back", "distribution", "dtype"),
    [
        ((0, 1), None, "gaussian", torch.float64),
        ((0, 1), 2, "rademacher", torch.bfloat16),
        ((2, 0, 1), 2, "gaussian", torch.float32),
        ((2, 0, 1), 0, "rademacher", torch.float32),
        ((1, 3), None, "rademacher", torch.float64),
        ((6, 0), 6, "gaussian", torch.bfloat16),
    ],
)
def test_updates_along_several_ranks(ranks, back, distribution, dtype):
    along = [Direction(7, 8, s, distribution, rank=rank) for s, rank in enumerate(ranks)]
    if len(along) == 3:
        along[1] = along[1]._replace(distribution="rademacher")
    coefficients = weights((len(ranks),), torch.float64, 5, 0.5)
    shift = None if back is None else Shift(along[0]._replace(rank=back, sample=9), 0.25)
    results = []
    for backend in ("triton", "reference"):
        w = [weights(shape, dtype, i) for i, shape in enumerate([(24, 16), (9, 5)])]
        update_(w, along, coefficients, 0.1, recover=shift, backend=backend)
        results.append(w)
    for result, wanted in zip(*results, strict=True):
        assert agree(result, wanted, along[0], roundings=3)


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_moves_between_ranks(ranks):
    first, second = (SIGNS._replace(rank=rank) for rank in ranks)
    results = []
    for backend in ("triton", "reference"):
        w = [weights(shape, torch.bfloat16, i) for i, shape in enumerate([(24, 16), (8,)])]
        perturb_(w, second, 0.125, recover=Shift(first, -0.25), backend=backend)
        update_(w, [first], torch.ones(1), 0.1, recover=Shift(second, 0.125), backend=backend)
        results.append(w)
    assert all(map(same_bits, *results))


def test_full_noise_of_version_1_and_low_rank_of_version_2_mix():
    old, results = Direction(3, 1, 0, "rademacher", 1), []
    for backend in ("triton", "reference"):
        w = [weights((24, 16), torch.bfloat16)]
        update_(w, [old, SIGNS], torch.ones(2), 0.01, recover=Shift(SIGNS, 1e-3), backend=backend)
        results.append(w)
    assert all(map(same_bits, *results))


# Keys and steps.


def test_a_step_on_the_device_is_as_good_as_a_number():
    results = []
    for step in (3, torch.tensor(3)):
        w = [weights((24, 16), torch.bfloat16), weights((9, 5), torch.bfloat16)]
        a, b = NORMAL._replace(step=step), NORMAL._replace(step=step, sample=4)
        perturb_(w, b, -0.1, recover=Shift(a, 0.1), **HERE)
        update_(w, [a, b], torch.ones(2), 0.2, recover=Shift(b, -0.1), **HERE)
        update_(w[:1], [a], torch.ones(1), 0.2, **HERE)
        w += [tensor for pair in factors([(5, 4), (3, 9)], [a, b], **HERE) for tensor in pair]
        results.append(w)
    assert all(map(same_bits, *results))


def test_a_direction_is_made_once(kernels):
    other = SIGNS._replace(sample=1)
    again = SIGNS._replace(seed=3)
    blocks = kernels._Blocks.of([other, SIGNS, other], 1)
    assert (blocks.total, blocks.firsts, blocks.made) == (2, [1, 0, 1], [1, 2])
    blocks = kernels._Blocks.of([SIGNS, again], 2)
    assert (blocks.total, blocks.firsts, blocks.made) == (1, [0, 0], [0])
    along = [SIGNS._replace(sample=s, rank=1 + s // 2, step=s) for s in range(4)]
    blocks = kernels._Blocks.of(along, 1)
    assert blocks.firsts == [5, 0, 1, 3]
    assert list(blocks.alike(along)) == [(1, 1), (2, 2), (0, 1)]
    counter = torch.tensor(1)
    on_device = [SIGNS._replace(step=counter), SIGNS._replace(step=counter.clone())]
    assert kernels._Blocks.of([on_device[0], on_device[0]], 2).total == 1
    assert kernels._Blocks.of(on_device, 2).total == 2  # nothing waits to compare them


# Factors.


@pytest.mark.parametrize(("distribution", "rank"), [("gaussian", 2), ("rademacher", 1)])
def test_factors_are_those_of_the_reference(kernels, distribution, rank):
    """Several and one, from any row on, and in pieces."""
    jobs = [
        FactorJob(4, STREAM_LEFT, 0, 3),
        FactorJob(4, STREAM_RIGHT, 2**33 + 5, 1030),
        FactorJob(2**32 - 1, STREAM_LEFT, 11, 130),
    ]
    along = [Direction(5, 6, sample, distribution, rank=rank) for sample in (0, 7)]
    cpu = torch.device("cpu")
    for some, chosen in ((jobs, along), (jobs[:2], along[:1]), (jobs[1:2], along[:1])):
        made = kernels.factors(some, chosen, cpu)
        wanted = reference.factors(some, chosen, cpu)
        if distribution == "rademacher":
            assert same_bits(made, wanted)
        else:
            torch.testing.assert_close(made, wanted, rtol=0, atol=5e-6)


# Tables.


def test_vectors_have_launches_of_full_noise(launches):
    matrix, vector = weights((24, 16), torch.float32), weights((40,), torch.float32)
    for tensors, names in (
        ([matrix], ["low_rank_kernel"]),
        ([vector], ["pass_kernel"]),
        ([matrix, vector], ["pass_kernel", "low_rank_kernel"]),
        ([vector[:0], matrix, matrix.clone()], ["low_rank_kernel"]),
    ):
        for group in (tensors, Weights(tensors)):
            launches.clear()
            perturb_(group, SIGNS, 0.1, **HERE)
            assert launches == names
    launches.clear()
    perturb_([matrix, vector], SIGNS._replace(rank=0), 0.1, **HERE)
    assert launches == ["pass_kernel"]


def test_tables_are_made_once(tables, monkeypatch):
    build, made = tables._build, []
    monkeypatch.setattr(tables, "_build", lambda *args: made.append(1) or build(*args))
    w = [weights(shape, torch.float32) for shape in ((24, 16), (16, 8), (40,))]
    kept, expected = Weights(w), [x.clone() for x in w]
    for step in range(3):
        direction = SIGNS._replace(step=step)
        perturb_(kept, direction, 0.1, **HERE)
        perturb_(expected, direction, 0.1, backend="reference")
        assert len(made) == 1  # the matrices'; one vector needs none
    assert all(map(same_bits, w, expected))


@pytest.mark.parametrize("room", [1, 200])
def test_factors_of_some_regions_at_a_time(tables, monkeypatch, room):
    """Where all of them would need much memory."""
    monkeypatch.setattr(tables, "ROOM", room)
    sizes, allocate = [], torch.empty

    def empty(*args, **options):
        made = allocate(*args, **options)
        if made.dtype == torch.float32:
            sizes.append(made.numel())
        return made

    shapes = [(24, 16), (9, 5), (40,), (3, 4, 8)]
    w = [weights(shape, torch.float32, i) for i, shape in enumerate(shapes)]
    expected = [x.clone() for x in w]
    shift, other = Shift(SIGNS, 0.1), SIGNS._replace(sample=1)
    perturb_(expected, other, 0.1, recover=shift, backend="reference")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        perturb_(Weights(w), other, 0.1, recover=shift, **HERE)
    assert all(map(same_bits, w, expected))
    # up to two directions, and at least one region, padded
    assert max(sizes) <= max(room, 2 * (12 + 24 + 8)) + 2 * 4 * len(shapes)


def test_rows_of_an_embedding_share_their_columns():
    table = weights((50, 24), torch.float32)
    rows = torch.tensor([[3, 48], [3, 0]])
    for direction in (SIGNS, SIGNS._replace(rank=3)):
        found = perturbed(table, direction, 0.5, rows=rows, **HERE)
        assert same_bits(found, perturbed(table, direction, 0.5, **HERE)[rows])


@given(st.integers(1, 2**30), st.lists(st.integers(0, 2**31 - 1), max_size=20))
def test_divisors(tables, d, xs):
    by = tables.divisor(d)
    factor, shift = by & 0xFFFFFFFF, by >> 32
    assert factor < 1 << 32
    for x in {*xs, 0, d - 1, d, 2 * d - 1, 2**31 - 1, 2**31 // d * d - 1, 2**30}:
        if 0 <= x < 2**31:
            assert 2 * x * factor >> 32 >> shift == x // d


@pytest.mark.parametrize("columns", [24, 7])
def test_long_runs_are_cut(tables, monkeypatch, columns):
    rows = 3 * PIECE // columns
    w = weights((rows, columns), torch.bfloat16)
    expected = perturbed(w, SIGNS, 0.5, **HERE)
    monkeypatch.setattr(tables, "LONGEST", PIECE)
    for offset in (0, columns, 8 * columns):
        region = Region(w.clone(), 0, offset, matrix=Matrix(rows, columns))
        parts = tables.parts([region], None, 1, tables.Multiples(8, 8))
        assert len(parts[0].low_rank) == 3 + (offset % 128 > 0 and columns == 7)
        assert all(launch.programs == 1 for launch in parts[0].low_rank)
    assert same_bits(perturbed(w, SIGNS, 0.5, **HERE), expected)
    two = [w.clone(), w.clone()]
    perturb_(two, SIGNS, 0.5, **HERE)
    assert same_bits(two[0], expected)


@pytest.mark.parametrize("matrix", [Matrix(2, 2**30 + 1), Matrix(2**30 + 1, 2)])
def test_matrices_that_are_too_large_are_refused(kernels, matrix):
    w = torch.ones(16)
    with pytest.raises(ValueError, match=r"at most 1073741824 rows and columns .* for parameter 3"):
        kernels.perturb(Regions([Region(w, 3, matrix=matrix)]), [Shift(SIGNS, 1.0)])
    assert w.eq(1).all()
    kernels.perturb([Region(w, 3, matrix=matrix)], [Shift(SIGNS._replace(rank=0), 1.0)])
    assert not w.eq(1).all()


@pytest.mark.parametrize("columns", [24, 7])
def test_the_most_rows(kernels, columns):
    """At the end of a matrix and in a stack, with numbers of 31 bits."""
    matrix = Matrix(2**30, columns)
    for offset in (2**30 * columns - 2 * columns, 2**30 * columns - 13, 5 * 2**30 * columns - 8):
        results = []
        for backend in (kernels, reference):
            w = torch.zeros(48)
            backend.perturb([Region(w, 3, offset, matrix=matrix)], [Shift(SIGNS, 1.0)])
            results.append(w)
        assert same_bits(*results)


def test_matrix_of_names_the_shapes_above():
    assert [matrix_of(shape) is None for shape in SHAPES] == [False] * 6 + [True] * 2
