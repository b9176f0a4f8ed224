"""Journals record what the update used, so that replaying needs no rule."""

import copy
import warnings

import pytest
import torch
from conftest import same_bits
from journaled import Job

from zofo_optim import CenteredRank, Clip, Journal, Normalized, Sign, ZScore, replay
from zofo_optim.journal import read
from zofo_optim.journal.cli import main

RULES = [Normalized(), Clip(limit=1.1), Clip(0.5, relative=False), Sign(), ZScore(), CenteredRank()]
every = pytest.mark.parametrize("rule", RULES, ids=repr)


def job(rule, **options):
    return Job(**{**dict(num_samples=3, distribution="rademacher", zo_rule=rule), **options})


FACTORS = {3: float("nan"), 5: torch.tensor(1.0, dtype=torch.float64)}
"""Of losses: one step has no finite one, one has wider ones."""


def steps(job, first, last):
    """One of them accumulates, and one ascends."""
    for step in range(first, last):
        job.optimizer.param_groups[0]["maximize"] = step == 4
        if step == 2:
            job.optimizer.zero_grad()
            for part in range(2):
                job.optimizer.backward(lambda part=part: job.loss(part))
            job.optimizer.step()
        else:
            job.step(step, FACTORS.get(step, 1.0))


def assert_replays(job, path):
    start = {name: p.clone() for name, p in job.base.items()}
    assert replay(start, path).verified
    for name, p in job.weights().items():
        assert same_bits(start[name], p), name


@every
@pytest.mark.parametrize(
    ("dtype", "perturbation"),
    [(torch.float32, "in_place"), (torch.bfloat16, "in_place"), (torch.float64, "streamed")],
)
def test_replays_to_the_bit(rule, dtype, perturbation, tmp_path):
    path = tmp_path / "run.zofo"
    trained, plain = job(rule, dtype=dtype, perturbation=perturbation), job("sgd", dtype=dtype)
    with Journal(path).attach(trained.optimizer):
        steps(trained, 0, 6)
    steps(plain, 0, 6)
    assert any(
        not same_bits(a, b)
        for a, b in zip(trained.weights().values(), plain.weights().values(), strict=True)
    )  # the rule does something
    assert_replays(trained, path)
    assert read(path).header["zo_rule"] == repr(rule)


@every
def test_resumes_to_the_bit_from_a_checkpoint(rule, tmp_path):
    """The run goes on past the checkpoint, is lost, and is taken up from there."""
    path = tmp_path / "run.zofo"
    whole, lost, resumed = job(rule), job(rule), job(rule)
    steps(whole, 0, 7)
    journal = Journal(path).attach(lost.optimizer)
    steps(lost, 0, 3)
    saved = copy.deepcopy((lost.model.state_dict(), lost.optimizer.state_dict()))
    steps(lost, 3, 5)
    journal.flush()
    killed = tmp_path / "killed.zofo"
    killed.write_bytes(path.read_bytes()[:-7])
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Journal(killed, resume=True).attach(resumed.optimizer):
            steps(resumed, 3, 7)
    for a, b in zip(whole.weights().values(), resumed.weights().values(), strict=True):
        assert same_bits(a, b)
    assert_replays(resumed, killed)


@pytest.mark.parametrize(
    ("rule", "named"), [("sgd", "sgd"), ("clip", "Clip(limit=3.0, relative=True, beta=0.99)")]
)
def test_info_names_the_rule(rule, named, tmp_path, capsys):
    """A header without one is of sgd, as all were before."""
    path = tmp_path / "run.zofo"
    trained = job(rule)
    with Journal(path).attach(trained.optimizer):
        steps(trained, 0, 1)
    assert ("zo_rule" in read(path).header) == (rule != "sgd")
    main(["info", str(path)])
    assert f"two_sided, 3 samples, rule {named}\n" in capsys.readouterr().out
