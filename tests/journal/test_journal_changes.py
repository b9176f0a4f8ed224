"""Parameters that change shape or dtype under a journal: the next step or stamp says so."""

import warnings

import pytest
import torch
from conftest import same_bits
from torch.nn import Parameter

from zofo_optim import HybridZOFO, Journal, replay
from zofo_optim.journal import JournalError


def narrow(p):
    p.data = torch.zeros(3, dtype=p.dtype)


def half(p):
    p.data = p.data.half()


CHANGES = {
    "shape": (narrow, r"shape \(8,\) and dtype torch.float32, and has shape \(3,\) and dtype"),
    "dtype": (half, r"shape \(8,\) and dtype torch.float32, and has .* torch.float16 now"),
}
ENDS = r" is not closed and ends at step 2, .*close\(\) before such a change"


class Run:
    def __init__(self, path, perturbation="in_place"):
        self.weights = [Parameter(torch.ones(4), False), Parameter(torch.ones(8), False)]
        named = [("first", self.weights[0]), ("second", self.weights[1])]
        self.optimizer = HybridZOFO(
            [dict(params=named, mode="zo", lr=1e-2)], perturbation=perturbation
        )
        self.journal = Journal(path).attach(self.optimizer)
        self.path = path
        for _ in range(2):
            self.step()
        self.before = [p.detach().clone() for p in self.weights]

    def loss(self):
        return sum(p.float().square().sum() for p in self.weights)

    def step(self):
        self.optimizer.step(self.loss)

    def assert_ended(self):
        """Two steps are there and replay; the lock is gone, and closing again does nothing."""
        assert self.journal not in self.optimizer.listeners
        self.journal.close()
        base = {"first": torch.ones(4), "second": torch.ones(8)}
        with pytest.raises(JournalError, match="was not closed and ends at step 2"):
            replay(base, self.path)
        replay(base, self.path, stop=2)
        assert all(map(same_bits, base.values(), self.before))


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("change", CHANGES)
def test_before_a_step(change, perturbation, tmp_path):
    act, message = CHANGES[change]
    run = Run(tmp_path / "run", perturbation)
    act(run.weights[1])
    content = [p.detach().clone() for p in run.weights]
    with pytest.raises(JournalError, match=f"parameter 'second' had {message}.*{ENDS}"):
        run.step()
    for p, kept in zip(run.weights, content, strict=True):  # not updated; moves may round
        torch.testing.assert_close(
            p.data, kept, atol=0 if perturbation == "streamed" else 1e-6, rtol=0
        )
    run.assert_ended()
    run.step()  # without a journal it goes on


@pytest.mark.parametrize("change", CHANGES)
def test_between_backward_and_step(change, tmp_path):
    act, message = CHANGES[change]
    run = Run(tmp_path / "run", "streamed")
    run.optimizer.backward(run.loss)
    act(run.weights[1])
    with pytest.raises(JournalError, match=f"parameter 'second' had {message}"):
        run.optimizer.step()
    run.assert_ended()


@pytest.mark.parametrize("ending", ["stamp", "close", "flush"])
@pytest.mark.parametrize("change", CHANGES)
def test_at_its_end(change, ending, tmp_path):
    act, message = CHANGES[change]
    run = Run(tmp_path / "run")
    act(run.weights[1])
    with pytest.raises(JournalError, match=f"parameter 'second' had {message}.*{ENDS}"):
        getattr(run.journal, ending)()
    run.assert_ended()


def test_a_with_block_raises_what_came_first(tmp_path):
    def trained(error):
        run = Run(tmp_path / error.__name__)
        with run.journal:
            half(run.weights[0])
            raise error("first")

    with (
        pytest.warns(UserWarning, match="parameter 'first' had shape"),
        pytest.raises(KeyError, match="first"),
    ):
        trained(KeyError)
    run = Run(tmp_path / "alone")
    with pytest.raises(JournalError, match="parameter 'first' had"), run.journal:
        half(run.weights[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(tmp_path / "step")
        half(run.weights[0])
        with pytest.raises(JournalError, match="parameter 'first' had"), run.journal:
            run.step()


def test_a_parameter_that_left(tmp_path):
    run = Run(tmp_path / "run")
    group = run.optimizer.param_groups[0]
    group["params"], group["param_names"] = group["params"][:1], group["param_names"][:1]
    with pytest.raises(JournalError, match="there were 2 zeroth-order parameters, and are 1 now"):
        run.step()
    run.assert_ended()


def test_what_is_no_change(tmp_path):
    """Other storage, the same shape and dtype."""
    run = Run(tmp_path / "run")
    for p in run.weights:
        p.data = p.data.clone()
    run.step()
    run.journal.close()
    assert replay({"first": torch.ones(4), "second": torch.ones(8)}, tmp_path / "run").verified
