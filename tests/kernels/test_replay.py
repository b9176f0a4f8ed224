"""replay_: many passes, bit for bit as one after the other."""

import pytest
import torch
from conftest import same_bits, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_kernels import DTYPES, Direction, Pass, Program, Shift, perturb_, replay_, update_

distribution = st.sampled_from(["gaussian", "rademacher"])
scale = st.sampled_from([1e-3, -1e-3, 0.25, -0.25, 0.0])


@st.composite
def one_pass(draw):
    """Moves and their recoveries along few directions, so that some repeat; an update or none."""
    kind, step = draw(distribution), draw(st.integers(0, 2))

    def direction():
        return Direction(7, step, draw(st.integers(0, 2)), kind)

    shifts = tuple(Shift(direction(), draw(scale)) for _ in range(draw(st.integers(0, 4))))
    samples = draw(st.integers(0, 3))
    return Pass(
        shifts,
        tuple(Direction(7, step, s, kind) for s in range(samples)),
        tuple(draw(st.sampled_from([0.5, -3.0, 0.0])) for _ in range(samples)),
        draw(st.sampled_from([0.1, 0.0])),
        draw(st.sampled_from([0.0, 0.25])),
    )


def in_turn(tensors, passes, **options):
    rounding = options.pop("rounding")
    for one in passes:
        for shift in one.shifts:
            perturb_(tensors, shift.direction, shift.scale, **options)
        if one.directions:
            update_(
                tensors,
                one.directions,
                torch.tensor(one.coefficients, dtype=torch.float64),
                one.lr,
                weight_decay=one.weight_decay,
                rounding=rounding,
                **options,
            )


@settings(max_examples=20)
@given(
    st.lists(one_pass(), max_size=4),
    st.lists(st.tuples(st.integers(0, 500), st.sampled_from(DTYPES)), max_size=3),
    st.sampled_from(["stochastic", "nearest"]),
    st.data(),
)
def test_as_one_after_the_other(backend, passes, tensors, rounding, data):
    made = [weights((size,), dtype, seed=i) for i, (size, dtype) in enumerate(tensors)]
    twins = [t.clone() for t in made]
    options = dict(
        rounding=rounding,
        indices=[data.draw(st.integers(0, 2**32 - 1)) for _ in made],
        offsets=[data.draw(st.integers(0, 2**40)) for _ in made],
        backend=backend,
    )
    replay_(made, Program(passes), **options)
    in_turn(twins, passes, **options)
    for a, b in zip(made, twins, strict=True):
        assert same_bits(a, b)


def test_many_chunks_and_threads(threads):
    """More than one chunk and one thread; lengths that are no multiple of anything."""
    directions = [Direction(1, step, 0, "gaussian") for step in range(3)]
    program = Program(
        Pass((Shift(d, 1e-3), Shift(d, -1e-3)), (d,), (0.5,), 0.1, 0.1) for d in directions
    )
    for count in (1, 2):
        threads(count)
        for dtype in DTYPES:
            ours = [weights((n,), dtype, seed=n) for n in (200_003, 5, 70_001)]
            twins = [t.clone() for t in ours]
            places = dict(offsets=[3, 0, 127], rounding="stochastic")
            replay_(ours, program, **places)
            in_turn(twins, program.passes, **places)
            for a, b in zip(ours, twins, strict=True):
                assert same_bits(a, b)


def test_what_cannot_be_used():
    w = torch.ones(3)
    with pytest.raises(TypeError, match=r"program must be a zofo_kernels\.Program, got list"):
        replay_([w], [])
    with pytest.raises(ValueError, match="rounding must be one of"):
        replay_([w], Program([]), rounding="up")
    assert torch.equal(w, torch.ones(3))
