"""Moves since the last update: exact, however often they repeat, and kept in little memory."""

import pickle

import pytest
import torch
from toys import Toy

from zofo_optim import Journal, replay
from zofo_optim.listeners import Move
from zofo_optim.moves import Moves

UP, DOWN, BACK = Move(0, (0.5, 1.0)), Move(0, (-0.5, -1.0)), Move(0, (0.0, 0.0))


@pytest.mark.parametrize(
    "moves",
    [
        [],
        [UP, DOWN],
        [UP, DOWN, BACK],
        [UP, DOWN, BACK] * 5,
        [UP, BACK] * 3 + [DOWN, BACK] * 2 + [UP, BACK],
        [UP, DOWN, BACK] * 3 + [UP],
    ],
)
def test_the_sequence_is_what_was_appended(moves):
    kept = Moves(moves)
    loaded = Moves.loaded(kept.saved())
    for found in (kept, loaded, pickle.loads(pickle.dumps(kept))):
        assert list(found) == moves
        assert len(found) == len(moves)
        found.append(UP)
        found.append(BACK)
        assert list(found) == [*moves, UP, BACK]
        found.clear()
        assert list(found) == []


def test_state_dicts_of_before_load():
    moves = [UP, DOWN, BACK] * 2
    assert list(Moves.loaded([[m.sample, list(m.scales)] for m in moves])) == moves


def test_estimates_that_are_dropped_take_no_memory():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    sizes = []
    for _ in range(50):
        optimizer.backward(toy)
        optimizer.zero_grad()
        sizes.append(len(pickle.dumps(optimizer.state_dict()["param_groups"])))
    assert max(sizes[2:]) - min(sizes[2:]) < 8  # the number of times
    assert len(optimizer.moves) == 150


def test_training_goes_on_to_the_bit_after_them(tmp_path):
    """In 32 bits moves round; the journal replays each of them."""
    toy, other = Toy(torch.float32), Toy(torch.float32)
    optimizer, resumed = toy.optimizer("hybrid"), other.optimizer("hybrid")
    with Journal(tmp_path / "a.zofo").attach(optimizer):
        for _ in range(7):
            optimizer.backward(toy)
            optimizer.zero_grad()
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.moves == optimizer.moves
        optimizer.step(toy)
    start = Toy(torch.float32)
    replay({"0": start.x}, tmp_path / "a.zofo")
    assert torch.equal(start.x, toy.x)
