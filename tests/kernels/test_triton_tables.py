"""The tables of the Triton backend: what they cover, their launches, and when they are kept."""

import importlib
import math

import pytest
import torch
from arranged import (
    GAUSSIAN,
    HERE,
    PIECE,
    RADEMACHER,
    TENSORS,
    Arranged,
    alike,
    interpreted_kernels,
    of_each,
)
from conftest import same_bits, weights
from hypothesis import given, settings

from zofo_kernels import DTYPES, Shift, Weights, perturb_, perturbed, update_
from zofo_kernels.region import Region

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture(scope="module")
def kernels(interpreted):
    return interpreted_kernels()


@pytest.fixture(scope="module")
def tables(kernels):
    return importlib.import_module("zofo_kernels.triton_tables")


@pytest.fixture
def built(tables, monkeypatch):
    """Lists the tables that are built from now on."""
    build, results = tables._build, []

    def spied(*args):
        results.append(build(*args))
        return results[-1]

    monkeypatch.setattr(tables, "_build", spied)
    return results


@pytest.fixture
def launches(kernels, monkeypatch):
    """Lists the number of programs of each launch of the pass from now on."""
    compiled, programs = kernels.kernels.pass_kernel, []

    class Spied:
        def __getitem__(self, grid):
            programs.append(math.prod(grid))
            return compiled[grid]

    monkeypatch.setattr(kernels.kernels, "pass_kernel", Spied())
    return programs


# Lists of tensors of every kind in one call.


@pytest.mark.parametrize("multiple", [8, 128])
@settings(max_examples=50)
@given(TENSORS, TENSORS)
def test_tables_cover_every_element_once_and_nothing_else(tables, multiple, tensors, others):
    """Counted by byte, for what is written and for what is read."""
    values = [torch.zeros(t["size"], dtype=t["dtype"]) for t in tensors]
    shifts = [*of_each(others, "shift"), *[0] * len(tensors)][: len(tensors)]
    to, source = Arranged(values, of_each(tensors, "shift")), Arranged(values, shifts)
    slots, sources, fields = [], [], []
    for t, a, b in zip(tensors, to.tensors, source.tensors, strict=True):
        if t["size"] > 0:
            slots.append(Region(a, t["index"], t["offset"]))
            sources.append(b)
            fields.append((t["index"], t["offset"]))
    if len(slots) < 2:
        return
    written, read = (torch.zeros(x.memory.numel(), dtype=torch.int64) for x in (to, source))
    seen = set()
    for launch in tables._build(slots, sources, multiple):
        key = (launch.dtype, launch.aligned)
        assert key not in seen  # one launch for all tensors alike
        seen.add(key)
        width = launch.dtype.itemsize
        rows = launch.table.view(-1, 5).tolist()
        for item in launch.items.tolist():
            address, size, offset, index, start = rows[item & 0xFFFFFFFF]
            lead = offset % 128
            if launch.aligned:
                assert (address % 16, start % 16, size % 8, offset % multiple) == (0, 0, 0, 0)
                lead = 0
            begin = (item >> 32) * PIECE - lead
            low, high = max(0, begin), min(size, begin + PIECE)
            assert low < high
            for base, counts in ((address, written), (start, read)):
                at = base - (to if counts is written else source).memory.data_ptr()
                counts[at + low * width : at + high * width] += 1
        for address, _, offset, index, start in rows:  # each row has the noise of its tensor
            (which,) = (
                i
                for i, s in enumerate(slots)
                if 0 <= address - s.tensor.data_ptr() < s.tensor.numel() * width
                and s.tensor.dtype == launch.dtype
            )
            past = address - slots[which].tensor.data_ptr()
            assert start - sources[which].data_ptr() == past
            assert (index, offset - past // width) == fields[which]
    for counts, arranged in ((written, to), (read, source)):
        expected = torch.zeros_like(counts)
        for span in arranged.spans:
            expected[span] = 1
        assert torch.equal(counts, expected)


LAUNCHES = [  # sizes, dtypes, shifts, offsets -> programs of each launch
    ([8, PIECE, 5 * 8], "ddd", None, None, [3]),
    ([PIECE + 8, 3 * PIECE], "ff", None, [128, 2**40], [5]),
    ([PIECE, PIECE + 3], "ff", None, None, [2, 1]),
    ([7, 3], "ff", None, None, [2]),
    ([16, 16], "bb", [1, 0], None, [1, 1]),
    ([16, 16], "bb", [8, 16], None, [2]),
    ([2 * PIECE], "b", None, [64], [2]),
    ([2 * PIECE], "b", None, [68], [3]),  # from 68 elements before its start
    ([PIECE, PIECE, PIECE], "bbb", None, [8, 64, 2**40 + 72], [3]),
    ([2 * PIECE], "b", [3], None, [2]),
    ([PIECE - 100], "h", None, [100], [1]),
    ([16] * 8, "fdbh" * 2, None, None, [2, 2, 2, 2]),
]


@pytest.mark.parametrize(("sizes", "kinds", "shifts", "offsets", "programs"), LAUNCHES)
def test_launches_of_a_pass(launches, sizes, kinds, shifts, offsets, programs):
    """One a dtype for aligned tensors, and one more where tensors are ragged or misaligned."""
    dtypes = dict(zip("fdbh", DTYPES, strict=True))
    values = [torch.zeros(n, dtype=dtypes[kind]) for n, kind in zip(sizes, kinds, strict=True)]
    tensors = Arranged(values, shifts or [0] * len(sizes)).tensors
    perturb_(tensors, GAUSSIAN, 1.0, offsets=offsets, **HERE)
    assert launches == programs
    for recover in (None, Shift(GAUSSIAN, 1.0)):
        options = {"recover": recover, "offsets": offsets} | HERE
        launches.clear()
        perturb_(tensors, GAUSSIAN, 1.0, **options)
        assert len(launches) == len(programs)
        update_(tensors, [GAUSSIAN, RADEMACHER], torch.ones(2), 0.1, **options)
        assert len(launches) == 2 * len(programs)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("offset", [0, 8, 64, 68])
def test_signs_alone_ask_for_offsets_of_128(launches, offset, several):
    """Shards of Gaussian noise that begin at multiples of 8 need no lead; nor does their copy."""
    tensors = [torch.zeros(2 * PIECE, dtype=torch.bfloat16) for _ in range(1 + several)]
    for direction, multiple in ((GAUSSIAN, 8), (RADEMACHER, 128)):
        launches.clear()
        programs = len(tensors) * (2 if offset % multiple == 0 else 3)
        kept = Weights(tensors, offsets=[offset] * len(tensors))
        perturb_(kept, direction, 1.0, **HERE)
        perturb_(kept, GAUSSIAN, 1.0, recover=Shift(direction, 1.0), **HERE)
        update_(kept, [GAUSSIAN, direction], torch.ones(2), 0.1, **HERE)
        assert launches == 3 * [programs]
    launches.clear()
    perturbed(tensors[0], GAUSSIAN, 1.0, offset=offset, **HERE)
    assert launches == [2 if offset % 8 == 0 else 3]


# Tables that are kept.


def three_passes(kept):
    perturb_(kept, RADEMACHER, 0.1, **HERE)
    perturb_(kept, RADEMACHER, -0.1, recover=Shift(RADEMACHER, 0.1), **HERE)
    shift = Shift(RADEMACHER, -0.1)
    update_(kept, [RADEMACHER], torch.ones(1), 0.01, recover=shift, **HERE)


def after_three_passes(tensors):
    expected = [w.detach().clone() for w in tensors]
    shift = Shift(RADEMACHER, 0.1)
    for scale, recover in ((0.1, None), (-0.1, shift)):
        perturb_(expected, RADEMACHER, scale, recover=recover, backend="reference")
    shift = Shift(RADEMACHER, -0.1)
    update_(expected, [RADEMACHER], torch.ones(1), 0.01, recover=shift, backend="reference")
    return expected


def check_three_passes(kept):
    expected = after_three_passes(kept.tensors)
    three_passes(kept)
    assert all(map(alike, (w.detach() for w in kept.tensors), expected))


def test_a_table_is_built_once(built):
    p = [torch.nn.Parameter(weights((n,), torch.float32, n)) for n in (24, 0, 5)]
    kept = Weights(p)
    assert not built
    for _ in range(3):
        check_three_passes(kept)
    assert len(built) == 1
    with torch.no_grad():
        p[0].mul_(2)
        p[2].copy_(torch.ones(5))
    check_three_passes(kept)
    p[0].data = p[0].data.view(4, 6)  # a matrix now, which low rank would see
    check_three_passes(kept)
    assert len(built) == 2
    three_passes(p)  # a plain list keeps nothing
    assert len(built) == 5


def new_storage(p, q):
    p.data = weights((24,), p.dtype, 9)


def new_dtype(p, q):
    p.data = p.data.half()


def same_bytes_of_another_dtype(p, q):
    p.data = p.data.view(torch.float16)


def new_size(p, q):
    p.data = weights((4099,), p.dtype, 9)


def shorter(p, q):
    p.data = p.data[:7]


def misaligned(p, q):
    p.data = p.data[1:]


def emptied(p, q):
    p.data = torch.empty(0, dtype=p.dtype)


def exchanged(p, q):
    p.data, q.data = q.data, p.data


def transposed(p, q):
    p.data = p.data.view(4, 6).t()


def to_double_and_back(p, q):
    p.data = p.data.double()
    p.data = p.data.bfloat16()


@pytest.mark.parametrize(
    "change",
    [
        new_storage,
        new_dtype,
        same_bytes_of_another_dtype,
        new_size,
        shorter,
        misaligned,
        emptied,
        exchanged,
        transposed,
        to_double_and_back,
    ],
)
def test_a_table_is_built_again_where_a_tensor_has_changed(built, change):
    p, q, r = (torch.nn.Parameter(weights((24,), torch.bfloat16, seed)) for seed in (1, 2, 3))
    kept = Weights([p, q, r])
    check_three_passes(kept)
    old, content = p.data, None
    change(p, q)
    if change in (new_storage, new_dtype, new_size, emptied, to_double_and_back):
        content = old.clone()
    check_three_passes(kept)
    assert len(built) == 2  # of the others, where one is strided: its copy needs no table
    check_three_passes(kept)
    assert len(built) == 2
    assert content is None or same_bits(old, content)  # nothing follows the old address


def test_strided_tensors_are_copied_in_each_pass(built):
    """Read anew in each pass, and written back; the table of the others is kept."""
    dense, base = weights((24,), torch.float32), weights((6, 4), torch.bfloat16, 2)
    kept = Weights([dense, base.t()])
    for _ in range(3):
        check_three_passes(kept)
        assert len(built) == 1
        base.mul_(-2)
    check_three_passes(Weights([dense, base]))
