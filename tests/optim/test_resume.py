"""Checkpoint and resume, to the bit, across processes."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import resumable
import torch
from conftest import same_bits
from resumable import STEPS, Run, options

from zofo_optim import HybridZOFO

SCRIPT = Path(resumable.__file__)
ESTIMATORS = ["one_sided", "two_sided"]


@pytest.mark.parametrize(
    "text", ["two_sided,1,gaussian,in_place", "one_sided,2,rademacher,streamed"]
)
def test_across_processes(text, tmp_path):
    """Cut between steps, and while accumulating: one process makes both cuts, one takes up both."""
    whole = Run(**options(text))
    whole.halves(0, 2 * STEPS)
    first, last = ({cut: tmp_path / f"{name}{cut}.pt" for cut in (6, 7)} for name in "ab")
    for jobs in (
        [(0, cut, "-", first[cut]) for cut in first],
        [(cut, 2 * STEPS, first[cut], last[cut]) for cut in first],
    ):
        command = [sys.executable, str(SCRIPT), text, *(str(word) for job in jobs for word in job)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1])
        assert done.returncode == 0, done.stderr
    for path in last.values():
        found = Run(**options(text))
        found.load(path)
        for a, b in zip(whole.weights(), found.weights(), strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("cut", range(1, 2 * STEPS, 3))
def test_at_every_place(estimator, perturbation, cut, tmp_path):
    text = f"{estimator},2,gaussian,{perturbation}"
    whole = Run(**options(text))
    whole.halves(0, cut)
    whole.save(tmp_path / "cut.pt")
    whole.halves(cut, 2 * STEPS)
    resumed = Run(**options(text))
    resumed.load(tmp_path / "cut.pt")
    resumed.halves(cut, 2 * STEPS)
    for a, b in zip(whole.weights(), resumed.weights(), strict=True):
        assert same_bits(a, b)
    assert (
        resumed.optimizer.state_dict()["param_groups"]
        == whole.optimizer.state_dict()["param_groups"]
    )


def test_a_finished_step_saves_nothing_in_flight():
    run = Run()
    run.halves(0, 1)
    assert "zo_pending" in run.optimizer.state_dict()["param_groups"][0]
    run.halves(1, 2)
    assert "zo_pending" not in run.optimizer.state_dict()["param_groups"][0]


def test_loading_leaves_no_trace_in_the_groups():
    run, other = Run(), Run()
    run.halves(0, 1)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert "zo_pending" not in other.optimizer.param_groups[0]
    other.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="needs a closure"):
        other.optimizer.step()


def test_other_settings_are_told():
    """The step goes on, along other directions."""
    run, other = Run(), Run(distribution="rademacher", num_samples=2)
    run.halves(0, 2)
    state = run.optimizer.state_dict()
    with pytest.warns(UserWarning, match=r"num_samples=1 \(here 2\), distribution='gaussian'"):
        other.optimizer.load_state_dict(state)
    assert "zo_settings" not in other.optimizer.param_groups[0]
    other.halves(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run().optimizer.load_state_dict(state)


def test_accumulated_first_order_gradients_alone():
    """Without zeroth-order groups, too, the step after loading needs no closure."""
    p = torch.nn.Parameter(torch.ones(3))
    twin = torch.nn.Parameter(torch.ones(3))
    optimizer, other = HybridZOFO([p], lr=0.1), HybridZOFO([twin], lr=0.1)
    optimizer.backward(lambda: (p**2).sum())
    other.load_state_dict(optimizer.state_dict())
    twin.grad = p.grad.clone()
    for each in (optimizer, other):
        each.step()
        assert "zo_pending" not in each.param_groups[0]
    assert same_bits(p.detach(), twin.detach())
    assert not same_bits(p.detach(), torch.ones(3))
