"""The Triton backend in the interpreter: tables, launches, keys, and tables that are kept.

What the operations compute is tested on every backend, this one too, in test_noise, test_perturb
and test_update.
"""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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
from zofo_kernels.table import Slot

pytestmark = pytest.mark.usefixtures("interpreted")

NARROW = (torch.bfloat16, torch.float16)
GAUSSIAN, RADEMACHER = Direction(3, 1), Direction(3, 1, 0, "rademacher")
PIECE, GUARD = 4096, 1040  # elements of a program; bytes, more than a program's lead of 127 fp64
HERE = {"backend": "triton"}


@pytest.fixture(scope="module")
def kernels(interpreted):
    module = importlib.import_module("zofo_kernels.triton")
    assert module.INTERPRETED
    assert 8 * module.VECTORS == PIECE
    return module


@pytest.fixture
def built(kernels, monkeypatch):
    """Lists the tables that are built from now on."""
    build, results = kernels._build, []

    def spied(*args):
        results.append(build(*args))
        return results[-1]

    monkeypatch.setattr(kernels, "_build", spied)
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


class Arranged:
    """Tensors in one buffer, otherwise of bytes 0xFF, which are NaN in each dtype.

    Args:
        values: what the tensors hold.
        shifts: how many elements past a multiple of 16 bytes each of them starts.
    """

    def __init__(self, values, shifts, device="cpu"):
        spans, end = [], GUARD
        for w, shift in zip(values, shifts, strict=True):
            start = -(-end // 16) * 16 + shift * w.element_size()
            spans.append(slice(start, start + w.numel() * w.element_size()))
            end = spans[-1].stop + GUARD
        self.spans = spans
        self.memory = torch.full((end,), 0xFF, dtype=torch.uint8, device=device)
        assert self.memory.data_ptr() % 16 == 0
        self.tensors = [
            self.memory[span].view(w.dtype).view(w.shape)
            for w, span in zip(values, spans, strict=True)
        ]
        for view, w in zip(self.tensors, values, strict=True):
            view.copy_(w)

    def rest_is_untouched(self):
        rest = self.memory.clone()
        for span in self.spans:
            rest[span] = 0xFF
        return bool((rest == 0xFF).all())


def alike(a, b):
    """The same bits, but that any NaN is as good as another."""
    number = ~b.isnan()
    return torch.equal(~a.isnan(), number) and same_bits(a[number], b[number])


def z_of(element_noise, direction, index, offset, size):
    return torch.from_numpy(element_noise(direction, index, offset, size))


SIZES = st.one_of(
    st.integers(0, 40),
    st.sampled_from([127, 128, 129, 1000, PIECE - 8, PIECE, 2 * PIECE]),
    st.sampled_from([PIECE - 1, PIECE + 1, 2 * PIECE - 3, 2 * PIECE + 8, 2 * PIECE + 127]),
)
OFFSETS = st.one_of(
    st.sampled_from([0, 128, 2**35 - 128, 2**39 - 2048, 2**62]),
    st.sampled_from([1, 8, 64, 127, 2**32 - 5, 2**35 - 1001, 2**39 - 999, 2**62 + 77]),
    st.integers(0, 3000),
)
TENSORS = st.lists(
    st.fixed_dictionaries(
        {
            "size": SIZES,
            "dtype": st.sampled_from(DTYPES),
            "shift": st.one_of(st.just(0), st.integers(0, 9)),
            "index": st.one_of(st.integers(0, 9), st.sampled_from([2**31, 2**32 - 1])),
            "offset": OFFSETS,
        }
    ),
    min_size=1,
    max_size=5,
)
DIRECTIONS = st.builds(
    Direction,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    sample=st.one_of(st.integers(0, 9), st.just(2**64 - 1)),
    distribution=st.sampled_from(DISTRIBUTIONS),
)


def of_each(tensors, name):
    return [t[name] for t in tensors]


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


@settings(max_examples=100)
@given(TENSORS, TENSORS)
def test_tables_cover_every_element_once_and_nothing_else(kernels, tensors, others):
    """Counted by byte, for what is written and for what is read."""
    values = [torch.zeros(t["size"], dtype=t["dtype"]) for t in tensors]
    shifts = [*of_each(others, "shift"), *[0] * len(tensors)][: len(tensors)]
    to, source = Arranged(values, of_each(tensors, "shift")), Arranged(values, shifts)
    slots, sources, fields = [], [], []
    for t, a, b in zip(tensors, to.tensors, source.tensors, strict=True):
        if t["size"] > 0:
            slots.append(Slot(a, t["index"], t["offset"]))
            sources.append(b)
            fields.append((t["index"], t["offset"]))
    if len(slots) < 2:
        return
    written, read = (torch.zeros(x.memory.numel(), dtype=torch.int64) for x in (to, source))
    seen = set()
    for launch in kernels._build(slots, sources):
        key = (launch.dtype, launch.aligned)
        assert key not in seen  # one launch for all tensors alike
        seen.add(key)
        width = launch.dtype.itemsize
        rows = launch.table.view(-1, 5).tolist()
        for item in launch.items.tolist():
            address, size, offset, index, start = rows[item & 0xFFFFFFFF]
            lead = offset % 128
            if launch.aligned:
                assert (address % 16, start % 16, size % 8, lead) == (0, 0, 0, 0)
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
    ([2 * PIECE], "b", None, [64], [3]),  # from 64 elements before its start
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

BIG = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**31, 2**63, 2**64 - 1]))
RUNS = st.lists(
    st.tuples(
        BIG,
        st.one_of(BIG, st.integers(0, 2**63 - 1).map(torch.tensor)),
        st.one_of(st.integers(0, 100), st.sampled_from([2**32 - 3, 2**63 - 3, 2**64 - 200])),
        st.sampled_from(DISTRIBUTIONS),
        st.sampled_from([1, 2, 3, 63, 64, 65, 150]),
    ),
    min_size=1,
    max_size=4,
)


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
    p[0].data = p[0].data.view(4, 6)
    check_three_passes(kept)
    assert len(built) == 1
    three_passes(p)  # a plain list keeps nothing
    assert len(built) == 4


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
    assert len(built) == (4 if change is transposed else 2)  # tables of copies are not kept
    check_three_passes(kept)
    assert len(built) == (7 if change is transposed else 2)
    assert content is None or same_bits(old, content)  # nothing follows the old address


def test_tables_of_copies_are_not_kept(built):
    """A tensor that is not contiguous is read anew in each pass, and written back."""
    dense, base = weights((24,), torch.float32), weights((6, 4), torch.bfloat16, 2)
    kept = Weights([dense, base.t()])
    for passes in (3, 6, 9):
        check_three_passes(kept)
        assert len(built) == passes
        base.mul_(-2)
    check_three_passes(Weights([dense, base]))


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
        slots = [Slot(w, i, offset) for i, w in enumerate(to.tensors)]
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
        kernels.fill_noise(Slot(out.tensors[0], 3, offset), direction)
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


# Where the interpreter is asked for, and where it is not.

ROOT = Path(__file__).parents[2]
COMPILED = """
import os, torch
from zofo_kernels import Direction, perturb_

def refused():
    w = torch.ones(3)
    try:
        perturb_([w], Direction(0, 0), 1.0, backend="triton")
    except RuntimeError as error:
        assert w.eq(1).all()
        return error

print(refused())
os.environ["TRITON_INTERPRET"] = "1"
print(refused())
"""
INTERPRETED = """
import torch
from zofo_kernels import Direction, noise, perturb_
w = torch.ones(11)
perturb_([w], Direction(1, 2, 0, "rademacher"), 0.25, backend="triton")
expected = 1 + 0.25 * noise((11,), Direction(1, 2, 0, "rademacher"), backend="reference")
print(torch.equal(w, expected))
"""


def python(code, **variables):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": path} | variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_gpu_and_without_the_interpreter(monkeypatch):
    w = torch.ones(3)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="'triton' is not available: torch sees no CUDA device"):
        perturb_([w], GAUSSIAN, 1.0, **HERE)
    assert w.eq(1).all()


def test_the_interpreter_must_be_asked_for_before_triton_is_imported():
    unset, late = python(COMPILED)
    assert unset == "backend='triton' is not available: torch sees no CUDA device"
    assert late.startswith("backend='triton' is not available: TRITON_INTERPRET must be set before")


def test_the_interpreter_as_users_ask_for_it():
    assert python(INTERPRETED, TRITON_INTERPRET="1") == ["True"]
