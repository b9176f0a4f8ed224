"""What an earlier version computed, to the bit: weights, state dicts, journals."""

import copy

import pytest
import runs
import torch
from conftest import CPU_BACKENDS, same_bits

from zofo_optim import replay
from zofo_optim.journal import read

GOLDEN = torch.load(runs.FILE, weights_only=True)
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
"""Where a machine's Gaussian noise differs from the recorded one by the last bits."""


def on(backends, cases):
    """Parametrise over these cases on each of these backends that is here."""
    pairs = [
        pytest.param(case, backend, id=f"{case.name}-{backend}")
        for backend in CPU_BACKENDS
        for case in cases
        if backend in backends and (backend != "triton" or case in runs.INTERPRETED)
    ]
    return pytest.mark.parametrize(("case", "backend"), pairs, indirect=["backend"])


@pytest.fixture(scope="module")
def exact(backend):
    """By distribution, whether this machine draws the recorded noise."""
    ours, theirs = runs.noise_marks(backend), GOLDEN["noise"][backend]
    return {name: ours[name] == theirs[name] for name in theirs}


def check(case, found, wanted, exact):
    for name, tensor in wanted.items():
        if exact[case.distribution]:
            assert same_bits(found[name], tensor), name
        else:
            size = TOLERANCE[case.dtype]
            torch.testing.assert_close(found[name], tensor, atol=size, rtol=size)


def golden(case, backend):
    return GOLDEN["runs"][f"{case.name}-{runs.recorded_on(case, backend)}"]


def journal(case, backend):
    return runs.JOURNALS / f"{case.name}-{runs.recorded_on(case, backend)}.zofo"


def test_rademacher_noise_is_the_recorded_one(exact):
    assert exact["rademacher"]


@on(("reference", "cpu", "triton"), runs.CASES)
def test_training(case, backend, exact):
    found, wanted = runs.run(case, backend), golden(case, backend)
    check(case, found["weights"], wanted["weights"], exact)
    check(case, found["saved"]["weights"], wanted["saved"]["weights"], exact)
    if exact[case.distribution]:
        check_state(found["saved"]["state"], wanted["saved"]["state"])


def check_state(found, wanted):
    """All that the earlier version saved is saved still, with the same values."""
    assert found["state"].keys() == wanted["state"].keys()
    for key, state in wanted["state"].items():
        for name, value in state.items():
            ours = found["state"][key][name]
            assert same_bits(ours, value) if isinstance(value, torch.Tensor) else ours == value
    for ours, theirs in zip(found["param_groups"], wanted["param_groups"], strict=True):
        for name, value in theirs.items():
            if name == "zo_settings":
                assert {k: ours[name][k] for k in value} == value
            else:
                assert ours[name] == value, name


@on(("reference", "cpu", "triton"), runs.CASES)
def test_training_goes_on_from_a_recorded_state_dict(case, backend, exact):
    wanted = golden(case, backend)
    found = runs.go_on(case, backend, copy.deepcopy(wanted["saved"]))
    check(case, found, wanted["weights"], exact)


@on(("reference", "cpu"), runs.RECORDED)
def test_a_recorded_journal_replays(case, backend, exact):
    weights = runs.start(case.dtype)
    model = {name: weights[name] for name in runs.SHAPES}
    replayed = replay(model, journal(case, backend), backend=backend)
    wanted = golden(case, backend)["weights"]
    check(case, model, {name: wanted[name] for name in model}, exact)
    if exact[case.distribution]:
        assert replayed.verified


@on(("reference", "cpu"), runs.RECORDED)
def test_a_journal_has_the_recorded_bytes(case, backend, exact, tmp_path):
    if not exact[case.distribution]:
        pytest.skip("this machine draws other last bits of Gaussian noise")
    runs.run(case, backend, tmp_path / "run.zofo")
    found, wanted = read(tmp_path / "run.zofo"), read(journal(case, backend))
    # a header names its backend; the rest is recorded once where all agree
    assert found.header == {**wanted.header, "backends": [backend]}
    assert found.steps == wanted.steps
    assert found.closed
    if runs.recorded_on(case, backend) == backend:
        assert found.path.read_bytes() == wanted.path.read_bytes()
