"""Strided weights: copied a few at a time, read anew in each pass, written back."""

import itertools

import pytest
import torch
from conftest import same_bits, weights
from torch.utils._python_dispatch import TorchDispatchMode

from zofo_kernels import (
    Direction,
    Pass,
    Program,
    Shift,
    Weights,
    noise,
    perturb_,
    replay_,
    update_,
)

ALONG = Direction(1, 2, 0, "rademacher")
SHIFT = Shift(ALONG, 0.25)
PASSES = {
    "perturb_": lambda w, **how: perturb_(w, ALONG, 0.5, **how),
    "recover": lambda w, **how: perturb_(w, ALONG, 0.5, recover=SHIFT, **how),
    "update_": lambda w, **how: update_(w, [ALONG], torch.ones(1), 0.1, recover=SHIFT, **how),
    "replay_": lambda w, **how: replay_(w, Program([Pass((SHIFT,), (ALONG,), (1.0,), 0.1)]), **how),
}


class Allocations(TorchDispatchMode):
    """Bytes of new storages, of at least ``least`` bytes, that operations return."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in inputs and storage.nbytes() >= self.least:
                self.found.append(storage.nbytes())
        return result


@pytest.mark.parametrize("name", PASSES)
def test_strided_weights_take_the_memory_of_the_largest(name):
    sizes = [(640, 320), (640, 640), (80, 640), (80, 640), (640, 639), (4, 4)]
    kept = Weights([torch.ones(m, n).T for m, n in sizes] + [torch.ones(640, 640)])
    for _ in range(2):
        with Allocations(least=1024) as allocations:
            PASSES[name](kept, backend="cpu")
        assert allocations.found == [640 * 640 * 4]


def arranged(shape, strides, dtype, seed):
    """Random numbers of that shape in memory of those strides, with poison around."""
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = torch.full((last + 8,), 77.0, dtype=dtype)
    tensor = memory.as_strided(shape, strides, 3)
    return tensor.copy_(weights(shape, dtype, seed)), memory


LAYOUTS = [
    ((5, 7), (1, 5)),
    ((33, 129), (131, 1)),
    ((2, 3, 4, 5), (60, 1, 15, 3)),
    ((300,), (2,)),
    ((1,), (9,)),
    ((40, 50), (1, 40)),
]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_strided_weights_are_moved_as_contiguous_ones_and_nothing_else_is(backend, name, dtype):
    strided, memories, dense = [], [], []
    for seed, (shape, strides) in enumerate(LAYOUTS):
        tensor, memory = arranged(shape, strides, dtype, seed)
        strided.append(tensor)
        memories.append(memory)
        dense.append(tensor.clone(memory_format=torch.contiguous_format))
    kept = Weights(strided)
    for turn in range(3):
        PASSES[name](kept, backend=backend)
        PASSES[name](dense, backend=backend)
        for ours, wanted, memory in zip(strided, dense, memories, strict=True):
            assert same_bits(ours.contiguous(), wanted)
            assert int(memory.eq(77).sum()) == memory.numel() - ours.numel()
        for tensor in itertools.chain(strided, dense):  # the next pass reads what is there then
            tensor.mul_(-1 - turn)


def test_other_strides_of_the_same_memory_are_noticed():
    memory = torch.zeros(24)
    tensor = memory.view(4, 6).T
    kept = Weights([tensor])
    perturb_(kept, ALONG, 1.0)
    tensor.data = memory.view(3, 8).T
    memory.zero_()
    perturb_(kept, ALONG, 1.0)
    assert torch.equal(tensor, noise((8, 3), ALONG))


def test_lack_of_memory_for_copies_moves_nothing(monkeypatch):
    tensors = [torch.ones(8), torch.ones(4, 4).T, torch.ones(40, 40).T]

    def lacking(*size, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lacking)
        with pytest.raises(MemoryError):
            perturb_(Weights(tensors), ALONG, 1.0)
    assert all(t.eq(1).all() for t in tensors)


def test_strided_inference_tensors_are_written_outside_inference_mode():
    with torch.inference_mode():
        tensor = torch.zeros(4, 6).T
    perturb_([tensor], ALONG, 1.0)
    assert torch.equal(tensor, noise((6, 4), ALONG))
    with torch.inference_mode():
        plain = torch.zeros(4, 6).T
        perturb_([plain], ALONG, 1.0)
        assert torch.equal(plain, noise((6, 4), ALONG))


def test_lazily_negated_weights():
    base = torch.ones(8, dtype=torch.complex64)
    negated = base.conj().imag  # a view whose numbers are the negatives of what memory holds
    assert negated.is_neg()
    perturb_([negated], ALONG, 0.5)
    assert torch.equal(negated.resolve_neg(), noise((8,), ALONG) * 0.5)
    assert base.real.eq(1).all()
