"""The reference backend where temporaries cannot be had: the same bits, or whole chunks."""

import random

import pytest
import torch
from conftest import same_bits, weights
from torch.utils._python_dispatch import TorchDispatchMode

from zofo_kernels import DTYPES, Direction, Shift, perturb_, perturbed, reference, update_
from zofo_kernels.region import Region

SMALLEST = reference.SMALLEST
SIZES = (5 * SMALLEST + 77, 1, 3 * SMALLEST)
OFFSETS = (0, 13, 8 * 2**40 + 131)
DIRECTIONS = [Direction(5, 2, s, d) for s, d in enumerate(("gaussian", "rademacher", "gaussian"))]
BACK = Shift(Direction(5, 1), 0.01)


class Scarce(TorchDispatchMode):
    """Refuses temporaries above a number of elements, or those after the n-th; counts all.

    ``kept`` are tensors whose own memory is no temporary.
    """

    def __init__(self, kept, limit=None, refused=(), error=torch.OutOfMemoryError):
        super().__init__()
        self.kept = {t.untyped_storage().data_ptr() for t in kept}
        self.limit, self.refused, self.error, self.made = limit, refused, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if t.untyped_storage().data_ptr() in self.kept | given:
                continue
            self.made += 1
            if self.made in self.refused or (self.limit is not None and t.numel() > self.limit):
                raise self.error("can't allocate memory")
        return out


def perturb(slots, sources):
    reference.perturb(slots, [Shift(BACK.direction, -BACK.scale), Shift(DIRECTIONS[1], 0.02)])


def perturb_copy(slots, sources):
    reference.perturb_copy(slots, sources, Shift(DIRECTIONS[0], 0.02))


def update(slots, sources):
    coefficients, lr = torch.tensor([1.5, -0.3, 0.2]), torch.tensor(0.01)
    reference.update(slots, DIRECTIONS, coefficients, lr, 0.1, BACK, True)


def plain_update(slots, sources):
    reference.update(slots, DIRECTIONS[:1], torch.ones(1), torch.tensor(0.01), 0.0, None, False)


def fill_noise(slots, sources):
    for slot in slots:
        reference.fill_noise(slot, DIRECTIONS[0])


OPERATIONS = [perturb, perturb_copy, update, plain_update, fill_noise]


class Pass:
    """An operation on weights of several sizes and offsets; ``run`` is all of it, once."""

    def __init__(self, operation, dtypes):
        self.operation = operation
        self.sources = [weights((n,), dtypes[i % len(dtypes)], seed=i) for i, n in enumerate(SIZES)]
        self.before = self.sources
        if operation in (perturb_copy, fill_noise):
            self.before = [torch.zeros_like(w) for w in self.sources]
        self.reset()

    def reset(self):
        self.now = [w.clone() for w in self.before]
        return self

    def run(self, **scarcity):
        slots = [Region(w, i, o) for i, (w, o) in enumerate(zip(self.now, OFFSETS, strict=True))]
        mode = Scarce([*self.now, *self.sources], **scarcity)
        with torch.no_grad(), mode:
            self.operation(slots, self.sources)
        return mode

    def equals(self, other):
        return all(same_bits(a, b) for a, b in zip(self.now, other, strict=True))


@pytest.fixture(params=OPERATIONS, ids=lambda operation: operation.__name__)
def operation(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def job(request, operation):
    return Pass(operation, [request.param])


def test_chunks_do_not_show(job, monkeypatch):
    job.run()
    whole = job.now
    for chunk in (SMALLEST, 3 * SMALLEST):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        job.reset().run()
        assert job.equals(whole)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_limit_on_temporaries(job, error):
    job.run()
    whole = job.now
    # noise is made in whole blocks: up to 127 elements more at either end
    for limit in (SMALLEST + 256, 3 * SMALLEST):
        job.reset().run(limit=limit, error=error)
        assert job.equals(whole)


@pytest.mark.parametrize("chunk", [reference.CHUNK, 2 * SMALLEST])
def test_any_one_temporary_refused(job, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", chunk)
    made = job.run().made
    whole = job.now
    complete = 0
    for place in random.Random(0).sample(range(1, made + 1), 15):
        try:
            job.reset().run(refused={place})
        except torch.OutOfMemoryError:  # of a tensor, or the rest of one, that is not halved
            assert_whole_chunks(job, whole)
        else:
            assert job.equals(whole)
            complete += 1
    assert complete > 0


def assert_whole_chunks(job, whole):
    """Every block is done or untouched, and none is done after one that is not."""
    places = [(i, low) for i, n in enumerate(SIZES) for low in range(0, n, SMALLEST)]

    def alike(tensors):
        return [
            same_bits(job.now[i][low : low + SMALLEST], tensors[i][low : low + SMALLEST])
            for i, low in places
        ]

    done, untouched = alike(whole), alike(job.before)
    assert all(untouched[done.index(False) :])


def test_nothing_left_at_all(job):
    """From some point on not even the smallest chunk can be computed."""
    made = job.run().made
    whole = job.now
    with pytest.raises(torch.OutOfMemoryError):
        job.reset().run(limit=8)
    assert job.equals(job.before)
    for place in range(1, made, made // 5):
        with pytest.raises(torch.OutOfMemoryError):
            job.reset().run(refused=range(place, 10**9))
        assert_whole_chunks(job, whole)


def test_several_dtypes(operation):
    job = Pass(operation, [torch.bfloat16, torch.float64, torch.float32])
    job.run()
    whole = job.now
    job.reset().run(limit=2 * SMALLEST)
    assert job.equals(whole)


def test_other_errors_are_not_retried(monkeypatch):
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        raise RuntimeError("something else")

    monkeypatch.setattr(reference, "direction_values", broken)
    w = torch.ones(4 * SMALLEST)
    with pytest.raises(RuntimeError, match="something else"):
        perturb_([w], DIRECTIONS[0], 0.1, backend="reference")
    assert len(calls) == 1
    assert torch.equal(w, torch.ones(4 * SMALLEST))


def test_what_torch_raises_on_the_cpu_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.int8)
    assert reference._out_of_memory(raised.value)
    assert not reference._out_of_memory(RuntimeError("shapes differ"))


def test_the_public_operations():
    """As called by the optimizer, on a tensor that is not contiguous too."""
    base = weights((60, 70), torch.bfloat16)
    arguments = ([DIRECTIONS[0]], torch.ones(1), 0.01)

    def run(*tensors):
        perturb_(tensors, DIRECTIONS[0], 0.1, backend="reference")
        update_(tensors, *arguments, recover=Shift(DIRECTIONS[0], 0.1), backend="reference")
        return perturbed(tensors[0], DIRECTIONS[1], 0.1, backend="reference")

    expected = [base.clone(), base.clone().t()]
    expected.append(run(*expected))
    got = [base.clone(), base.clone().t()]
    with Scarce(got, limit=base.numel()):
        got.append(run(*got))
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
