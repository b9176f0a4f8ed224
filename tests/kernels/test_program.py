"""Pass and Program: what they refuse, that they stay as they are, and what running one does."""

import copy
import dataclasses
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
from arranged import agree, alike
from conftest import same_bits, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    ROUNDINGS,
    Direction,
    Pass,
    Program,
    Shift,
    perturb_,
    replay_,
    update_,
)

GAUSSIAN, RADEMACHER = Direction(3, 1), Direction(3, 1, 0, "rademacher")
SHIFT = Shift(GAUSSIAN, 0.25)
PASS = Pass((SHIFT,), (GAUSSIAN, RADEMACHER), (0.5, -1.0), 0.1, 0.01)


# What cannot be used: the field, the rule and the value are named.

BAD_PASSES = [
    ({"shifts": [SHIFT]}, TypeError, r"shifts must be a tuple, got \[Shift"),
    ({"shifts": None}, TypeError, "shifts must be a tuple, got None"),
    ({"directions": [GAUSSIAN]}, TypeError, r"directions must be a tuple, got \[Direction"),
    ({"coefficients": [0.5, 1.0]}, TypeError, r"coefficients must be a tuple, got \[0\.5, 1\.0\]"),
    ({"coefficients": torch.ones(2)}, TypeError, "coefficients must be a tuple, got tensor"),
    ({"shifts": (GAUSSIAN,)}, TypeError, r"shifts must be a zofo_kernels\.Shift, got Direction"),
    ({"shifts": (Shift(GAUSSIAN, math.nan),)}, ValueError, r"shifts\.scale must be a finite.* nan"),
    ({"shifts": (Shift(GAUSSIAN, 1e39),)}, ValueError, r"shifts\.scale must be a finite.* 1e\+39"),
    ({"shifts": (Shift("v", 1.0),)}, TypeError, r"direction must be a zofo_kernels\.Direction"),
    ({"shifts": (Shift(Direction(-1, 0), 1.0),)}, ValueError, r"seed must be in .*got -1"),
    ({"directions": (GAUSSIAN, SHIFT)}, TypeError, r"direction must be .*Direction, got Shift"),
    ({"directions": (GAUSSIAN, Direction(0, 2**64))}, ValueError, rf"step must be in .*{2**64}"),
    ({"directions": (GAUSSIAN, Direction(0, 0, 0, "no"))}, ValueError, "distribution .*'no'"),
    ({"directions": (GAUSSIAN,)}, ValueError, r"coefficients must be as many .*\(1\), got 2"),
    ({"directions": ()}, ValueError, r"coefficients must be as many as directions \(0\), got 2"),
    ({"coefficients": (0.5,)}, ValueError, r"coefficients must be as many .*\(2\), got 1"),
    ({"coefficients": (0.5, None)}, TypeError, "coefficients must be numbers, got None"),
    ({"coefficients": (0.5, torch.ones(1))}, TypeError, "coefficients must be numbers, got tensor"),
    ({"lr": "0.1"}, TypeError, "lr must be numbers, got '0.1'"),
    ({"lr": torch.tensor(0.1)}, TypeError, "lr must be numbers, got tensor"),
    ({"weight_decay": math.inf}, ValueError, "weight_decay must be a finite .*got inf"),
    ({"weight_decay": None}, ValueError, "weight_decay must be a finite .*got None"),
    (
        {"shifts": (Shift(Direction(0, torch.tensor(5)), 1.0),)},
        TypeError,
        r"step must be an int in a Pass.*tensor\(5\)",
    ),
    (
        {"directions": (GAUSSIAN, Direction(0, torch.tensor(5)))},
        TypeError,
        r"step must be an int in a Pass.*tensor\(5\)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_PASSES)
def test_a_pass_refuses(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(PASS, **change)


@pytest.mark.parametrize("other", [SHIFT, None, dataclasses.astuple(PASS)], ids=["shift", "", "()"])
def test_a_program_refuses_what_is_no_pass(other):
    with pytest.raises(TypeError, match=r"passes must hold zofo_kernels\.Pass, got"):
        Program([PASS, other])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_a_run_did_need_not_be_finite(backend, dtype, value):
    for change in ({"lr": value}, {"coefficients": (value, -1.0)}):
        for decay in (0.0, 0.1):
            one = dataclasses.replace(PASS, shifts=(), weight_decay=decay, **change)
            w, other, expected = (weights((50,), dtype) for _ in range(3))
            with warnings.catch_warnings():  # the interpreter computes in numpy, which warns
                warnings.simplefilter("ignore" if backend == "triton" else "error")
                replay_([w], Program([one]), rounding="nearest", backend=backend)
            for tensor, name in ((other, backend), (expected, "reference")):
                update_(
                    [tensor],
                    one.directions,
                    torch.tensor(one.coefficients),
                    torch.tensor(one.lr),  # such a rate is taken from a device only
                    weight_decay=decay,
                    rounding="nearest",
                    backend=name,
                )
            assert alike(w, expected)
            assert alike(other, expected)
            assert not w.isfinite().any()


# Frozen, and what is equal.


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Pass)])
def test_a_pass_stays_as_it_is(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(PASS, name, getattr(PASS, name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(PASS, name)


def test_a_program_stays_as_it_is():
    passes = [PASS]
    program = Program(passes)
    passes.append(PASS)
    assert program.passes == (PASS,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.passes = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        del program.passes


CHANGES = {
    "shifts": (Shift(GAUSSIAN, 0.5),),
    "directions": (RADEMACHER, GAUSSIAN),
    "coefficients": (0.5, 1.0),
    "lr": 0.2,
    "weight_decay": 0.0,
}


def test_passes_are_equal_by_their_fields():
    twin = Pass(**{field.name: getattr(PASS, field.name) for field in dataclasses.fields(Pass)})
    assert twin == PASS
    assert hash(twin) == hash(PASS)
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(Pass)}
    for name, value in CHANGES.items():
        assert dataclasses.replace(PASS, **{name: value}) != PASS
    assert pickle.loads(pickle.dumps(PASS)) == PASS


def test_programs_are_told_apart_by_identity():
    """Backends keep what they make of one; to compare many passes would cost as much as that."""
    program, twin = Program([PASS]), Program([PASS])
    assert program == program
    assert program != twin
    assert len({program, twin, program}) == 2
    for other in (copy.copy(program), copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert other.passes == program.passes
        assert other != program


def test_any_iterable_of_passes_is_a_program():
    assert Program(PASS for _ in range(3)).passes == (PASS, PASS, PASS)
    assert Program([]).passes == ()


# Running one.

STEPS = st.integers(0, 2)
SCALES = st.sampled_from([0.0, 1e-3, -1e-3, 0.125, -0.125])


@st.composite
def programs(draw):
    kind = draw(st.sampled_from(DISTRIBUTIONS))

    def direction():
        return Direction(2**64 - 3, draw(STEPS), draw(st.integers(0, 2)), kind)

    def one():
        shifts = tuple(Shift(direction(), draw(SCALES)) for _ in range(draw(st.integers(0, 3))))
        along = tuple(direction() for _ in range(draw(st.integers(0, 2))))
        coefficients = tuple(draw(st.sampled_from([0.5, -2.0, 0.0])) for _ in along)
        lr, decay = draw(st.sampled_from([0.01, 1e-3, 0.0])), draw(st.sampled_from([0.0, 0.1]))
        return Pass(shifts, along, coefficients, lr, decay)

    return kind, [one() for _ in range(draw(st.integers(0, 3)))]


def in_turn(w, passes, rounding, **place):
    """The passes by perturb_ and update_ of the reference; returns how often w was rounded."""
    rounded = 0
    for one in passes:
        for shift in one.shifts:
            perturb_([w], shift.direction, shift.scale, **place, backend="reference")
        if one.directions:
            coefficients = torch.tensor(one.coefficients, dtype=torch.float64)
            update_(
                [w],
                one.directions,
                coefficients,
                one.lr,
                weight_decay=one.weight_decay,
                rounding=rounding,
                **place,
                backend="reference",
            )
        rounded += len(one.shifts) + bool(one.directions)
    return rounded


@settings(max_examples=8)
@given(programs(), st.integers(1, 300), st.integers(0, 2**40), st.sampled_from(ROUNDINGS))
def test_a_program_is_its_passes_by_the_reference(backend, made, size, offset, rounding):
    """One object for all dtypes: what a backend keeps of it is of the dtype that it computes in."""
    kind, passes = made
    program, place = Program(passes), {"indices": [7], "offsets": [offset]}
    for dtype in (*DTYPES, DTYPES[0]):
        w = weights((size,), dtype)
        expected = w.clone()
        rounded = in_turn(expected, passes, rounding, **place)
        replay_([w], program, rounding=rounding, **place, backend=backend)
        assert agree(w, expected, Direction(0, 0, 0, kind), max(rounded, 1))


def test_what_backends_keep_does_not_keep_a_program(backend):
    program = Program([PASS])
    gone = weakref.ref(program)
    w = torch.ones(5)
    replay_([w], program, backend=backend)
    replay_([w.double()], program, backend=backend)
    del program
    gc.collect()
    assert gone() is None
    # one at the same address, maybe, is another program
    other = torch.ones(5)
    replay_([other], Program([Pass((SHIFT,))]), backend=backend)
    expected = torch.ones(5)
    perturb_([expected], SHIFT.direction, SHIFT.scale, backend=backend)
    assert same_bits(other, expected)
