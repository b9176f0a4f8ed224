"""Every backend keeps the contract of ``Backend``, and computes what the reference does."""

import importlib
import inspect
import math

import pytest
import torch
from arranged import agree
from conftest import CPU_BACKENDS, same_bits, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_kernels import (
    BACKENDS,
    DISTRIBUTIONS,
    DTYPES,
    NOISE_VERSIONS,
    Backend,
    Direction,
    Pass,
    Program,
    Region,
    Regions,
    Shift,
    backend_for,
    dispatch,
    noise,
    perturb_,
    perturbed,
    reference,
    replay_,
    update_,
)
from zofo_kernels.structure import STREAM_LEFT, STREAM_RIGHT, FactorJob

CPU = torch.device("cpu")
DIRECTION = Direction(5, 3)
MEMBERS = {name: member for name, member in vars(Backend).items() if inspect.isfunction(member)}
OPERATIONS = [name for name in MEMBERS if not name.startswith("_")]


# The contract.


def test_the_contract_names_the_operations():
    """Those that are run below, so that none is left out there."""
    assert list(DRAWN) == OPERATIONS
    assert set(inspect.get_annotations(Backend)) == {"__name__"}


@pytest.mark.parametrize("name", BACKENDS[1:])
def test_a_backend_has_the_members_of_the_contract(name):
    """Names, order, kinds, defaults and annotations of the parameters, and what is returned."""
    try:
        module = importlib.import_module(f"zofo_kernels.{name}")
    except ImportError as error:
        pytest.skip(str(error))
    assert module.__name__.endswith(f".{name}")
    for operation in OPERATIONS:
        provided = getattr(module, operation)
        assert inspect.isfunction(provided)
        signature = inspect.signature(MEMBERS[operation])
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        assert inspect.signature(provided) == signature.replace(parameters=parameters)
        assert f"See :meth:`Backend.{operation}`" in provided.__doc__


def test_the_backend_that_serves_the_cpu_is_the_one_asked_for(backend):
    assert backend_for(CPU, backend) is importlib.import_module(f"zofo_kernels.{backend}")


PUBLIC = {
    "noise": lambda w, backend: noise((3,), DIRECTION, backend=backend),
    "perturb_": lambda w, backend: perturb_([w], DIRECTION, 1.0, backend=backend),
    "perturbed": lambda w, backend: perturbed(w, DIRECTION, 1.0, backend=backend),
    "update_": lambda w, backend: update_([w], [DIRECTION], torch.ones(1), 1.0, backend=backend),
    "replay_": lambda w, backend: replay_(
        [w], Program([Pass((Shift(DIRECTION, 1.0),))]), backend=backend
    ),
}


@pytest.mark.parametrize("name", [name for name in BACKENDS[1:] if name != "reference"])
@pytest.mark.parametrize("operation", PUBLIC)
def test_a_backend_that_is_not_available_says_why(name, operation, monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda backend: f"no {backend} today")
    w = torch.ones(3)
    reason = f"backend='{name}' is not available: no {name} today"
    with pytest.raises(RuntimeError, match=reason):
        PUBLIC[operation](w, name)
    assert w.eq(1).all()


# Lists of regions of every kind, as a backend is given them.

directions = st.builds(
    Direction,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 3),
    distribution=st.sampled_from(DISTRIBUTIONS),
    version=st.sampled_from(NOISE_VERSIONS),
    rank=st.just(0),
)
scales = st.sampled_from([0.125, -0.125, 1e-3, 0.0])
rates = st.sampled_from([0.003, 0.1])


@st.composite
def places(draw, rows, lengths):
    """A region but for its tensor: dtype, rows, and the fields of Region after the tensor."""
    length = draw(st.sampled_from(lengths))
    gap = draw(st.sampled_from([0, 1, 5, 128, 2**33]))
    offset = draw(st.sampled_from([0, 3, 128, 2**35 - 70, 2**39 - 200]))
    parameter = draw(st.sampled_from([0, 5, 2**32 - 1]))
    place = parameter, offset, length, length + gap
    return draw(st.sampled_from(DTYPES)), draw(st.integers(1, rows)), place


def along(direction, count):
    return [direction._replace(sample=direction.sample + s) for s in range(count)]


# Each draws its arguments; what it returns is called with a backend and regions. Then comes how
# often a weight is rounded.


def perturb(draw, direction):
    shifts = [Shift(d, draw(scales)) for d in along(direction, draw(st.integers(0, 5)))]
    return lambda backend, regions: backend.perturb(regions, shifts), max(len(shifts), 1)


def perturb_copy(draw, direction):
    shift = Shift(direction, draw(scales))

    def run(backend, regions):
        sources = [region.tensor.clone() for region in regions]
        kept = [source.clone() for source in sources]
        for region in regions:
            region.tensor.fill_(math.nan)
        backend.perturb_copy(regions, sources, shift)
        assert all(map(same_bits, sources, kept))

    return run, 1


def update(draw, direction):
    chosen = along(direction, draw(st.integers(1, 4)))
    values = [draw(st.sampled_from([0.5, -0.3, 0.0])) for _ in chosen]
    coefficients = torch.tensor(values, dtype=draw(st.sampled_from(DTYPES)))
    lr = torch.tensor(draw(rates), dtype=draw(st.sampled_from(DTYPES)))
    decay = draw(st.sampled_from([0.0, 0.1]))
    recover = draw(st.sampled_from([None, Shift(chosen[-1], 0.125), Shift(direction, -1e-3)]))
    arguments = chosen, coefficients, lr, decay, recover, draw(st.booleans())
    return lambda backend, regions: backend.update(regions, *arguments), 2


def replay(draw, direction):
    first, second = along(direction, 2)
    scale, lr, stochastic = draw(scales), draw(rates), draw(st.booleans())
    program = Program(
        [
            Pass((Shift(second, scale), Shift(second, -scale)), (first,), (0.5,), lr, 0.1),
            Pass((Shift(first, scale),)),
            Pass((Shift(first, -scale),), (first, second), (-0.3, 0.5), lr),
        ]
    )
    return lambda backend, regions: backend.replay(regions, program, stochastic), 6


def fill_noise(draw, direction):
    def run(backend, regions):
        for region in regions:
            region.tensor.fill_(math.nan)
            backend.fill_noise(region, direction)

    return run, 1


def factors(draw, direction):
    """Gives numbers, and writes to no region."""
    chosen = along(direction._replace(version=2, rank=draw(st.integers(1, 3))), 2)
    job = st.builds(
        FactorJob,
        parameter=st.sampled_from([0, 5, 2**32 - 1]),
        stream=st.sampled_from([STREAM_LEFT, STREAM_RIGHT]),
        first=st.sampled_from([0, 7, 2**35 - 3]),
        rows=st.integers(1, 300),
    )
    jobs = draw(st.lists(job, min_size=1, max_size=3))

    def run(backend, regions):
        found = backend.factors(jobs, chosen, CPU)
        assert found.shape == (2, chosen[0].rank, sum(job.rows for job in jobs))
        return list(found)

    return run, 1


DRAWN = {f.__name__: f for f in (perturb, perturb_copy, update, replay, fill_noise, factors)}


@torch.no_grad()
def check(name, operation, made, direction, keep, data):
    """``keep``: as Regions, of which a backend keeps its tables."""
    run, rounded = DRAWN[operation](data.draw, direction)
    results = []
    for backend in (backend_for(CPU, name), reference):
        tensors = [weights((rows, p[2]), dtype, i) for i, (dtype, rows, p) in enumerate(made)]
        regions = [Region(w, *place) for w, (*_, place) in zip(tensors, made, strict=True)]
        found = run(backend, Regions(regions) if keep else regions)
        results.append(tensors if found is None else found)
    for result, expected in zip(*results, strict=True):
        assert agree(result, expected, direction, rounded)


@pytest.mark.parametrize("backend", [b for b in CPU_BACKENDS if b == "cpu"])
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=40)
@given(
    st.lists(places(6, [1, 7, 8, 129, 300, 2048]), min_size=1, max_size=4),
    directions,
    st.booleans(),
    st.data(),
)
def test_a_backend_does_as_the_reference(backend, operation, made, direction, keep, data):
    check(backend, operation, made, direction, keep, data)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=4)
@given(
    st.lists(places(2, [1, 8, 129, 256]), min_size=1, max_size=2),
    directions,
    st.booleans(),
    st.data(),
)
def test_triton_does_as_the_reference(operation, made, direction, keep, data):
    check("triton", operation, made, direction, keep, data)
