"""The CPU backend where memory or threads cannot be had: a pass is done as a whole, or not."""

import pytest
import torch
from conftest import same_bits, weights
from failing import FailAt

from zofo_kernels import Direction, Pass, Program, Shift, perturb_, replay_, update_

cpu = pytest.importorskip("zofo_kernels.cpu")

DIRECTION = Direction(1, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def update(tensors):
    update_(
        tensors, [DIRECTION], torch.ones(1), 0.1, weight_decay=0.1, recover=Shift(DIRECTION, 1e-3)
    )


@pytest.mark.parametrize(
    ("operation", "calls"),
    [
        (lambda tensors: perturb_(tensors, DIRECTION, 0.1, recover=Shift(DIRECTION, 1e-3)), 4),
        (update, 4),
        # numpy alone makes what it needs
        (lambda tensors: replay_(tensors, Program([Pass((), (DIRECTION,), (1.0,), 0.1)])), 0),
    ],
    ids=["perturb_", "update_", "replay_"],
)
def test_no_memory_at_any_torch_call(operation, calls):
    place = 0
    while True:
        place += 1
        made = [weights((300,), dtype) for dtype in DTYPES]
        before = [w.clone() for w in made]
        try:
            with FailAt(place):
                operation(made)
        except torch.OutOfMemoryError:
            for a, b in zip(made, before, strict=True):
                assert same_bits(a, b)
        else:
            break
    assert place > calls
    assert not any(same_bits(a, b) for a, b in zip(made, before, strict=True))


def test_no_threads_to_be_had(monkeypatch, threads):
    threads(4)
    expected, made = weights((400_000,), torch.float32), weights((400_000,), torch.float32)
    update([expected])
    calls = []

    class Pool:
        def submit(self, work):
            calls.append(work)
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(cpu, "_get_pool", lambda size: Pool())
    update([made])
    assert calls
    assert same_bits(made, expected)
