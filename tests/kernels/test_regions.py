"""Rectangles of a matrix have the bits that the full matrix has there, in every operation."""

import math

import pytest
import torch
from arranged import agree
from conftest import CPU_BACKENDS, same_bits, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import fill_noise, perturb, perturb_copy, replay

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    NOISE_VERSIONS,
    ROUNDINGS,
    Direction,
    Region,
    Regions,
    Shift,
    Weights,
    perturb_,
    perturbed,
    update_,
)
from zofo_kernels.region import regions_of_rows

CPU = torch.device("cpu")
UNINTERPRETED = [name for name in CPU_BACKENDS if name != "triton"]


# What is done to weights. Each takes Weights, a direction, the rounding and the backend's name.


def update(w, direction, rounding, backend):
    update_(
        w,
        [direction, direction._replace(sample=direction.sample + 1)],
        torch.tensor([0.75, -0.5]),
        0.003,  # less than a bfloat16's ulp, so that the rounding bits decide
        weight_decay=0.1,
        recover=Shift(direction, 0.125),
        rounding=rounding,
        backend=backend,
    )


ROUNDINGS_OF_EACH = {perturb: 2, perturb_copy: 1, update: 2, replay: 4, fill_noise: 1}

directions = st.builds(
    Direction,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 9),
    distribution=st.sampled_from(DISTRIBUTIONS),
    version=st.sampled_from(NOISE_VERSIONS),
    rank=st.just(0),
)
operations = st.sampled_from(list(ROUNDINGS_OF_EACH))
roundings = st.sampled_from(ROUNDINGS)
dtypes = st.sampled_from(DTYPES)
indices = st.one_of(st.integers(0, 9), st.just(2**32 - 1))
offsets = st.one_of(
    st.integers(0, 3000),
    st.builds(lambda border, d: border + d, st.sampled_from([2**35, 2**39]), st.integers(-99, 99)),
)


@st.composite
def rectangles(draw, rows=9, columns=(1, 3, 7, 8, 9, 40, 127, 128, 130, 300)):
    """A matrix's shape, and the rows and columns of a rectangle of it that is not empty."""
    m, n = draw(st.integers(1, rows)), draw(st.sampled_from(columns))
    bounds = []
    for size in (m, n):
        low = draw(st.integers(0, size - 1))
        bounds.append(slice(low, draw(st.integers(low + 1, size))))
    return (m, n), tuple(bounds)


def placed(tensor, shape, where, index, offset):
    """Weights of the rectangle ``where`` of a matrix of ``shape`` at ``offset``."""
    rows, columns = where
    start = offset + rows.start * shape[1] + columns.start
    rectangle = (columns.stop - columns.start, shape[1])
    return Weights([tensor], [index], [start], [rectangle])


def check_rectangle(backend, operation, case, dtype, direction, rounding, index, offset):
    """Contiguous, and as a view of the matrix; the matrix's other elements stay as they are."""
    shape, where = case
    before = weights(shape, dtype)
    whole = before.clone()
    operation(Weights([whole], [index], [offset]), direction, rounding, backend)
    place = shape, where, index, offset

    local = before[where].clone()
    operation(placed(local, *place), direction, rounding, backend)
    assert same_bits(local, whole[where])

    matrix, expected = before.clone(), before.clone()
    operation(placed(matrix[where], *place), direction, rounding, backend)
    expected[where] = whole[where]
    assert same_bits(matrix, expected)

    by_reference = before[where].clone()
    operation(placed(by_reference, *place), direction, rounding, "reference")
    assert agree(local, by_reference, direction, ROUNDINGS_OF_EACH[operation])


@pytest.mark.parametrize("backend", UNINTERPRETED)
@settings(max_examples=150)
@given(operations, rectangles(), dtypes, directions, roundings, indices, offsets)
def test_a_rectangle_is_that_of_the_whole(
    backend, operation, case, dtype, direction, rounding, index, offset
):
    check_rectangle(backend, operation, case, dtype, direction, rounding, index, offset)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("operation", ROUNDINGS_OF_EACH, ids=lambda operation: operation.__name__)
@settings(max_examples=4)
@given(rectangles(3, (3, 8, 130, 256)), dtypes, directions, roundings, indices, offsets)
def test_a_rectangle_is_that_of_the_whole_under_the_interpreter(
    operation, case, dtype, direction, rounding, index, offset
):
    check_rectangle("triton", operation, case, dtype, direction, rounding, index, offset)


@pytest.mark.parametrize("operation", ROUNDINGS_OF_EACH, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("backend", UNINTERPRETED)
def test_each_combination_once(backend, operation, dtype, distribution, rounding):
    case = (5, 301), (slice(1, 4), slice(3, 140))
    direction = Direction(7, 2, 0, distribution)
    check_rectangle(backend, operation, case, dtype, direction, rounding, 4, 2**35 - 501)


def test_the_rounding_bits_matter():
    """Else the tests above would not see bits of the wrong elements."""
    where = slice(0, 4), slice(3, 140)
    right, wrong = weights((4, 137), torch.bfloat16), weights((4, 137), torch.bfloat16)
    direction, still = Direction(7, 2), torch.zeros(1)
    for w, shape in ((right, (5, 301)), (wrong, (5, 302))):
        # no step along the direction; the decay is rounded by the element's bits
        update_(placed(w, shape, where, 0, 0), [direction], still, 0.003, weight_decay=0.1)
    assert same_bits(right[0], wrong[0])
    assert not same_bits(right[1], wrong[1])


# Several rectangles, and far ones.


def sharded(tensor, dim, parts, index, offset):
    """Weights of a tensor's shards along one dimension, as FSDP cuts them."""
    inner = math.prod(tensor.shape[dim + 1 :])
    stride = tensor.shape[dim] * inner
    pieces = [piece.clone() for piece in tensor.chunk(parts, dim)]
    lengths = [piece.shape[dim] * inner for piece in pieces]
    starts = [offset + sum(lengths[:i]) for i in range(len(pieces))]
    shapes = [(length, stride) for length in lengths]
    return pieces, Weights(pieces, [index] * len(pieces), starts, shapes)


@pytest.mark.parametrize("backend", UNINTERPRETED)
@settings(max_examples=40)
@given(
    operations,
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.data(),
    dtypes,
    directions,
    roundings,
    offsets,
)
def test_shards_make_up_the_whole(
    backend, operation, shape, data, dtype, direction, rounding, offset
):
    dim, parts = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 4))
    whole = weights(shape, dtype)
    pieces, shards = sharded(whole, dim, parts, 3, offset)
    operation(Weights([whole], [3], [offset]), direction, rounding, backend)
    operation(shards, direction, rounding, backend)
    assert same_bits(torch.cat(pieces, dim), whole)


@pytest.mark.parametrize("operation", ROUNDINGS_OF_EACH, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("stride", [2**32 + 5, 2**60])
def test_rows_far_apart_are_those_one_by_one(backend, operation, stride):
    """Where the counter of the noise needs more than 32 bits between one row and the next."""
    for distribution in DISTRIBUTIONS:
        direction = Direction(7, 2, 0, distribution)
        together = weights((3, 21), torch.bfloat16)
        alone = list(together.clone())
        starts = [11 + r * stride for r in range(3)]
        operation(Weights([together], [2], [11], [(21, stride)]), direction, "stochastic", backend)
        operation(Weights(alone, [2] * 3, starts), direction, "stochastic", backend)
        assert same_bits(together, torch.stack(alone))


def test_threads_change_nothing(threads):
    """Rows that lie across the borders of the threads' pieces."""
    results = []
    for count in (1, 2, 3):
        threads(count)
        w = weights((701, 333), torch.bfloat16)
        update(Weights([w], [2], [77], [(333, 1001)]), Direction(7, 2), "stochastic", "auto")
        results.append(w)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


# Which elements a region has.


def elements(region):
    """Of a region: the index in the full parameter of each of its elements."""
    found = torch.full((region.tensor.numel(),), -1)
    for start, size, first in region.runs():
        assert (found[start : start + size] == -1).all()
        found[start : start + size] = torch.arange(first, first + size)
    return found


@given(rectangles(rows=5), st.integers(0, 2**40))
def test_runs_number_the_elements_of_the_rectangle(case, offset):
    (m, n), (rows, columns) = case
    wanted = (offset + torch.arange(m * n).view(m, n))[rows, columns]
    start = offset + rows.start * n + columns.start
    region = Region(torch.empty(wanted.shape), 0, start, wanted.shape[1], n)
    assert torch.equal(elements(region), wanted.flatten())
    if wanted.shape[1] == n:
        assert len(region.runs()) == 1
        assert torch.equal(elements(Region(region.tensor, 0, start)), wanted.flatten())


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**40), st.data())
def test_rows_are_regions_with_the_elements_of_the_matrix(m, n, offset, data):
    numbers = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=6))
    copies = torch.arange(float(len(numbers) * n)).view(-1, n)
    found = Regions(regions_of_rows(copies, numbers, 5, offset))
    matrix = offset + torch.arange(m * n).view(m, n)
    for region, copy, number in zip(found, copies, numbers, strict=True):
        assert region.parameter == 5
        assert torch.equal(elements(region), matrix[number])
        assert region.tensor.data_ptr() == copy.data_ptr()
        assert torch.equal(region.tensor, copy)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_perturbed_rows_are_those_of_the_whole(backend, distribution):
    w, direction = weights((9, 21), torch.bfloat16), Direction(7, 2, 0, distribution)
    options = {"index": 3, "offset": 2**35 - 70, "backend": backend}
    whole = perturbed(w, direction, 0.25, **options)
    for ids in (torch.tensor(4), torch.tensor([[8, 0, 4], [4, 5, 4]]), torch.tensor([], dtype=int)):
        assert same_bits(perturbed(w, direction, 0.25, rows=ids, **options), whole[ids])
        empty = perturbed(w[:, :0], direction, 0.25, rows=ids, **options)
        assert empty.shape == (*ids.shape, 0)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_perturbed_rectangles_are_those_of_the_whole(backend, distribution, rank):
    w, direction = weights((9, 21), torch.bfloat16), Direction(7, 2, 0, distribution, rank=rank)
    whole = perturbed(w, direction, 0.25, index=3, backend=backend)
    for rows, columns in ((slice(0, 9), slice(0, 21)), (slice(2, 7), slice(5, 12))):
        length = columns.stop - columns.start
        part = perturbed(
            w[rows, columns],
            direction,
            0.25,
            index=3,
            offset=rows.start * 21 + columns.start,
            rectangle=(length, 21),
            full_shape=(9, 21),
            backend=backend,
        )
        assert same_bits(part, whole[rows, columns])


def test_perturbed_rows_have_no_rectangle():
    ids = torch.tensor([0])
    with pytest.raises(ValueError, match=r"rectangle must be None where rows are given, got \(2,"):
        perturbed(torch.zeros(4, 2), Direction(1, 1), 1.0, rows=ids, rectangle=(2, 3))
    with pytest.raises(ValueError, match=r"rectangles\[0\] must have rows that do not overlap"):
        perturbed(torch.zeros(4, 2), Direction(1, 1), 1.0, rectangle=(3, 4))


# What cannot be: the argument, the rule and the value are named.

ROWS = "must have rows that do not overlap, 1 <= row length <= row stride, and whole ones only, got"
BAD_RECTANGLES = [
    ([None, (7, 5)], ValueError, rf"rectangles\[1\] {ROWS} row length 7 and row stride 5 for 21"),
    ([None, (4, 9)], ValueError, rf"rectangles\[1\] {ROWS} row length 4 and row stride 9 for 21"),
    ([None, (42, 42)], ValueError, rf"rectangles\[1\] {ROWS} row length 42 .* for 21 elements"),
    ([(0, 9), None], ValueError, rf"rectangles\[0\] {ROWS} row length 0"),
    ([None, (-7, 9)], ValueError, rf"rectangles\[1\] {ROWS} row length -7"),
    ([None, (7, 2**62)], ValueError, rf"offsets must leave room .* below 2\*\*63.* {2**63 + 7} of"),
    ([None], ValueError, r"rectangles must have one entry a tensor \(2\), got 1"),
    ([None, (7,)], TypeError, r"rectangles must hold None or .*got \(7,\)"),
    ([None, (7, 9, 1)], TypeError, r"rectangles must hold None or .*got \(7, 9, 1\)"),
    ([None, (7.0, 9)], TypeError, r"rectangles must hold None or .*got \(7\.0, 9\)"),
    ([True, None], TypeError, r"rectangles must hold None or .*got True"),
    ([(True, 9), None], TypeError, r"rectangles must hold None or .*got \(True, 9\)"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_RECTANGLES)
def test_bad_rectangles(bad, error, message):
    with pytest.raises(error, match=message):
        Weights([torch.zeros(5), torch.zeros(3, 7)], rectangles=bad)


def test_a_rectangle_may_end_with_the_last_element():
    """Two rows of 3 at a distance of 10 span 13 elements."""
    w = torch.zeros(2, 3)
    perturb_(Weights([w], [0], [2**63 - 13], [(3, 10)]), Direction(1, 1), 1.0)
    assert w.ne(0).all()
    with pytest.raises(ValueError, match=rf"below 2\*\*63, got {2**63 - 12} for .* span 13 of"):
        Weights([w], [0], [2**63 - 12], [(3, 10)])


def test_a_rectangle_that_no_longer_fits_its_tensor(backend):
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    kept = Weights([parameter], rectangles=[(3, 10)])
    perturb_(kept, Direction(1, 1), 1.0, backend=backend)
    parameter.data = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=rf"regions\[0\] {ROWS} row length 3 .* for 8 elements"):
        perturb_(kept, Direction(1, 1), 1.0, backend=backend)
    assert parameter.eq(0).all()


W = torch.zeros(3, 7)
BAD_REGIONS = [
    ([], ValueError, "regions must hold at least one region, got none"),
    ([W], TypeError, r"regions\[0\] must be a zofo_kernels.Region, got Tensor"),
    ([Region(W, 0), (W, 1)], TypeError, r"regions\[1\] must be .*Region, got tuple"),
    ([Region(W, 0), Region(W.to("meta"), 1)], ValueError, "on one device, got cpu, meta"),
    ([Region(W.t(), 0)], ValueError, r"regions\[0\] must be contiguous .*\(7, 3\).*\(1, 7\)"),
    ([Region(W[:0], 0)], ValueError, r"regions\[0\] must be .* not empty, got shape \(0, 7\)"),
    ([Region(W, -1)], ValueError, r"regions\[0\] must have a parameter in \[0, 2\*\*32\).* -1"),
    ([Region(W, 2**32)], ValueError, rf"regions\[0\] must have a parameter .*{2**32}"),
    ([Region(W, 0, -1)], ValueError, r"regions\[0\] .* elements in \[0, 2\*\*63\).*\[-1, 20\)"),
    ([Region(W, 0, 2**63 - 20)], ValueError, rf"regions\[0\] .* elements .*{2**63 + 1}\)"),
    ([Region(W, 0), Region(W, 0, 0, 7, 2**62)], ValueError, rf"regions\[1\] .*{2**63 + 7}\)"),
    ([Region(W, 0, 0, 7, 6)], ValueError, rf"regions\[0\] {ROWS} row length 7 and row stride 6"),
    ([Region(W, 0, 0, 6, 7)], ValueError, rf"regions\[0\] {ROWS} .* for 21 elements"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_REGIONS)
def test_bad_regions(bad, error, message):
    with pytest.raises(error, match=message):
        Regions(bad)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 3, torch.float32), (2, 5, torch.float32), (7, 12, torch.float32), (4, 6, torch.bfloat16)],
)
def test_tensors_that_share_memory_are_refused(backend, low, high, dtype):
    """Two threads would write the shared elements at once."""
    memory, apart = torch.zeros(20), torch.zeros(4)
    tensors = [memory[10:], apart, memory[2:8], torch.zeros(0), memory[low:high].view(dtype)]
    with pytest.raises(ValueError, match=r"tensors\[4\] must not share memory with tensors\[[02]"):
        perturb_(tensors, Direction(1, 1), 1.0, backend=backend)
    assert memory.eq(0).all()
    assert apart.eq(0).all()


def test_neighbours_in_memory_do_not_share_it(backend):
    memory = torch.zeros(20)
    parts = [memory[8:], memory[:3], memory[3:8], memory[5:5]]
    perturb_(parts, Direction(1, 1), 1.0, backend=backend)
    assert memory.ne(0).all()


def test_an_empty_shard_is_skipped(backend):
    """As the last rank has of an uneven Shard(1)."""
    direction = Direction(1, 2, 3, "gaussian")
    alone, beside = torch.ones(4, 3), torch.ones(4, 3)
    perturb_([alone], direction, 0.5, backend=backend)
    weights = Weights([torch.zeros(4, 0), beside], [5, 0], rectangles=[(0, 3), None])
    perturb_(weights, direction, 0.5, backend=backend)
    assert same_bits(alone, beside)
