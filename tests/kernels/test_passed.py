"""Weights in pieces that leave as a pass is done with them: to the bit the pass over all."""

import pytest
import torch
from conftest import each_of, same_bits, weights

from zofo_kernels import Direction, Pass, Program, Shift, Weights, perturb_, replay_, update_
from zofo_kernels.dispatch import unavailable_reason

backend = each_of([b for b in ("reference", "cpu") if unavailable_reason(b) is None])
DIRECTIONS = {"full": Direction(1, 2), "low rank": Direction(1, 2, rank=2)}
SHAPES = [(7, 30), (11,), (4, 5, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def update(made, along, backend):
    recover = Shift(along, 1e-3)
    update_(made, [along], torch.ones(1), 0.1, weight_decay=0.1, recover=recover, backend=backend)


def replay(made, along, backend):
    shift = Shift(along, 0.1)
    program = Program([Pass((shift, shift.taken_off()), (along,), (1.0,), 0.1)])
    replay_(made, program, backend=backend)


OPERATIONS = {
    "perturb_": lambda made, along, backend: perturb_(made, along, 0.1, backend=backend),
    "update_": update,
    "replay_": replay,
}


def tensors():
    """One of them is not contiguous."""
    made = [weights(shape, dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
    return [*made, weights((6, 9), torch.float32).t()]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pieces(operation, direction, backend):
    expected, made = tensors(), tensors()
    passed = []

    def leave(piece):
        passed.append((piece.data_ptr(), piece.numel()))
        if operation != "replay_" or direction == "full":  # else it passes more than once
            assert not same_bits(piece, before[piece.data_ptr()])

    whole = Weights(made, [3, 1, 4, 9], [5, 0, 2, 0], shapes=[(70, 30), None, None, None])
    cut = whole.cut([64, None, 100, 20], leave)
    assert [t.numel() for t in cut.tensors] == [64, 64, 64, 18, 11, 100, 20, 54]
    before = {t.data_ptr(): t.clone() for t in cut.tensors}
    OPERATIONS[operation](
        Weights(expected, [3, 1, 4, 9], [5, 0, 2, 0], shapes=[(70, 30), None, None, None]),
        DIRECTIONS[direction],
        backend,
    )
    OPERATIONS[operation](cut, DIRECTIONS[direction], backend)
    assert all(map(same_bits, made, expected))
    assert set(passed) == {(t.data_ptr(), t.numel()) for t in cut.tensors}


def test_the_next_piece_is_as_before_when_one_leaves(backend):
    made = weights((300,), torch.float32)
    before, changed = made.clone(), []
    cut = Weights([made]).cut([50], lambda piece: changed.append(int((made != before).sum())))
    update_(cut, [DIRECTIONS["full"]], torch.ones(1), 0.1, backend=backend)
    assert changed == [50, 100, 150, 200, 250, 300]
