"""Journals across processes, kills and loaded states."""

import os
from pathlib import Path

import journaled
import pytest
import torch
from conftest import same_bits
from forked import scripts_after
from journaled import Job

from zofo_optim import Journal, replay
from zofo_optim.journal import JournalError, read

SCRIPT = Path(journaled.__file__)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.zofo"


def train(job, path, start, stop, **options):
    with Journal(path, resume=True, **options).attach(job.optimizer):
        for step in range(start, stop):
            job.step(step)


def saved(job):
    state = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x,
        dict(model=job.model.state_dict(), optimizer=job.optimizer.state_dict()),
    )
    return state


def loaded(state, **options):
    job = Job(**options)
    job.model.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    return job


def check(job, path, stop):
    base = {name: p.clone() for name, p in job.base.items()}
    result = replay(base, path)
    assert (result.start, result.stop, result.verified) == (0, stop, True)
    for name, p in job.weights().items():
        assert same_bits(base[name], p)


MODES = ["in_place", "streamed"]


@pytest.mark.parametrize("perturbation", MODES)
def test_a_closed_journal_goes_on(perturbation, path):
    job = Job(perturbation=perturbation)
    train(job, path, 0, 5)
    size = path.stat().st_size
    again = loaded(saved(job), perturbation=perturbation)
    train(again, path, 5, 9)
    assert path.stat().st_size > size
    assert not path.with_name("run.zofo.bak").exists()
    check(again, path, 9)


@pytest.mark.parametrize("perturbation", MODES)
def test_steps_after_the_checkpoint_are_cut(perturbation, path):
    job = Job(perturbation=perturbation)
    train(job, path, 0, 4)
    state = saved(job)
    train(job, path, 4, 9)
    before = path.read_bytes()
    again = loaded(state, perturbation=perturbation)
    with pytest.warns(UserWarning, match=r"cut at the optimizer's step 4: 5 later steps.*\.bak"):
        train(again, path, 4, 6)
    assert path.with_name("run.zofo.bak").read_bytes() == before
    check(again, path, 6)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_tail_is_dropped(damage, path):
    job = Job()
    train(job, path, 0, 6)
    state = saved(job)
    train(job, path, 6, 9)
    recording = read(path)
    end = recording.records[-2].end  # of step 8
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[end - 3 :]
    else:
        data[end - 3] ^= 4
    path.write_bytes(data)
    again = loaded(state)
    with pytest.warns(UserWarning, match="2 later steps and what is incomplete are dropped"):
        train(again, path, 6, 9)
    check(again, path, 9)


def test_steps_that_are_missing(path):
    """The file ends before the optimizer's step: nothing can be made of that."""
    job = Job()
    train(job, path, 0, 3)
    job.step(3)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"must reach the optimizer's step 4.*steps 0 to 3"):
        Journal(path, resume=True).attach(job.optimizer)
    assert path.read_bytes() == before
    fresh = Job()
    for step in range(2):
        fresh.step(step)
    late = path.with_name("late.zofo")
    train(fresh, late, 2, 4)
    with pytest.raises(JournalError, match=r"must reach the optimizer's step 0.*steps 2 to"):
        Journal(late, resume=True).attach(Job().optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(distribution="rademacher"), "distribution='gaussian'.*'rademacher'"),
        (dict(rounding="nearest"), "rounding='stochastic'"),
        (dict(perturbation="streamed"), "perturbation='in_place'"),
        (dict(dtype=torch.bfloat16), "must have the dtype of .* float32, got bfloat16"),
        (dict(adapter=False), "journal has 4 names, not 6"),
    ],
)
def test_another_optimizer(options, message, path):
    train(Job(), path, 0, 2)
    before = path.read_bytes()
    other = Job(**options)
    with pytest.raises(JournalError, match=message):
        Journal(path, resume=True).attach(other.optimizer)
    assert path.read_bytes() == before
    other.step(0)


@pytest.mark.parametrize("stop", [0, 4])
def test_the_wrong_weights(stop, path):
    """The state of the optimizer was loaded, that of the model was not."""
    job = Job()
    train(job, path, 0, stop)
    before = path.read_bytes()
    again = Job()
    again.optimizer.load_state_dict(job.optimizer.state_dict())
    with torch.no_grad():
        again.model[2].bias.copy_(job.model[2].bias + (stop == 0))
        again.model[0].load_state_dict(job.model[0].state_dict())
        again.model[2].weight.copy_(job.model[2].weight + 1)
    with pytest.raises(JournalError, match=r"not those of its step in .*2\.weight.* differ; load"):
        Journal(path, resume=True).attach(again.optimizer)
    assert path.read_bytes() == before
    again.model.load_state_dict(job.model.state_dict())
    train(again, path, stop, 6)
    check(again, path, 6)


def test_two_writers(path):
    job = Job()
    journal = Journal(path).attach(job.optimizer)
    job.step(0)
    other = loaded(saved(job))
    with pytest.raises(JournalError, match="being written by another journal"):
        Journal(path, resume=True).attach(other.optimizer)
    journal.close()
    Journal(path, resume=True).attach(other.optimizer).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_worker_does_not_keep_the_lock(path):
    """As those of a DataLoader, which outlive a journal."""
    job = Job()
    journal = Journal(path).attach(job.optimizer)
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(begin)
        os.read(end, 1)  # until the parent closes its side
        os._exit(0)
    try:
        journal.close()
        Journal(path, resume=True).attach(job.optimizer).close()
    finally:
        os.close(begin)
        os.waitpid(child, 0)


def test_another_working_folder(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    job = Job()
    with Journal("run.zofo").attach(job.optimizer):
        job.step(0)
        state = saved(job)
        job.step(1)
        (path.parent / "elsewhere").mkdir()
        monkeypatch.chdir(path.parent / "elsewhere")
        job.model.load_state_dict(state["model"])
        with pytest.warns(UserWarning, match="1 later steps"):
            job.optimizer.load_state_dict(state["optimizer"])
        job.step(1)
    check(job, path, 2)


@pytest.mark.parametrize("perturbation", MODES)
def test_loading_a_state_moves_the_journal(perturbation, path):
    job = Job(perturbation=perturbation)
    with Journal(path).attach(job.optimizer) as journal:
        for step in range(3):
            job.step(step)
        state = saved(job)
        job.optimizer.load_state_dict(job.optimizer.state_dict())  # as accelerate does
        for step in range(3, 5):
            job.step(step)
        job.model.load_state_dict(state["model"])
        with pytest.warns(UserWarning, match="2 later steps"):
            job.optimizer.load_state_dict(state["optimizer"])
        for step in range(3, 7):
            job.step(step)
        assert journal._optimizer is job.optimizer
    check(job, path, 7)


def test_loading_a_state_that_the_journal_lacks(path):
    ahead = Job()
    for step in range(5):
        ahead.step(step)
    job = Job()
    journal = Journal(path).attach(job.optimizer)
    job.step(0)
    with pytest.raises(JournalError, match=r"must reach the optimizer's step 5"):
        job.optimizer.load_state_dict(ahead.optimizer.state_dict())
    job.step(5)  # goes on without a journal
    journal.close()
    assert read(path).stop == 1


@pytest.mark.parametrize("perturbation", MODES)
@pytest.mark.parametrize("close", [True, False])
def test_resume_while_accumulating(perturbation, close, path):
    """Moves that no update followed are in the state dict, and once in the journal."""
    job = Job(perturbation=perturbation)
    journal = Journal(path).attach(job.optimizer)
    job.step(0)
    job.optimizer.zero_grad()
    job.optimizer.backward(lambda: job.loss(1))
    if close:
        journal.stamp()  # tells the moves so far
    job.optimizer.backward(lambda: job.loss(2))
    state = saved(job)
    if close:
        journal.close()
    else:
        journal.flush()
        journal._detach()
    again = loaded(state, perturbation=perturbation)
    with Journal(path, resume=True).attach(again.optimizer):
        again.optimizer.backward(lambda: again.loss(3))
        again.optimizer.step()
        again.step(2)
    check(again, path, 3)


@pytest.mark.parametrize("perturbation", MODES)
def test_training_goes_on_after_a_replay(perturbation, path):
    """Base model, journal, optimizer state and adapter: no copy of the base weights is saved."""
    job = Job(perturbation=perturbation)
    train(job, path, 0, 5)
    state = saved(job)
    again = Job(perturbation=perturbation)
    replay(again.model, path)
    again.model[3].load_state_dict(job.model[3].state_dict())
    again.optimizer.load_state_dict(state["optimizer"])
    for each in (job, again):
        each.step(5)
    for a, b in zip(job.model.parameters(), again.model.parameters(), strict=True):
        assert same_bits(a, b)


@pytest.fixture(scope="module")
def run():
    with scripts_after() as run:
        yield run


@pytest.mark.parametrize("perturbation", MODES)
@pytest.mark.parametrize("call", [1, 40, 10**6], ids=["at once", "in the step", "after it"])
def test_sigkill(perturbation, call, tmp_path, run):
    """Killed twice in the midst of a step, or between steps: checkpoint and journal suffice."""
    whole = Job(perturbation=perturbation)
    after = []
    for step in range(14):
        after.append({name: p.clone() for name, p in whole.weights().items()})
        whole.step(step)
    for kill in (6, 13):
        done = run(SCRIPT, tmp_path, perturbation, kill, call, cwd=SCRIPT.parents[1])
        assert done.returncode == -9, done.stderr
        recording = read(tmp_path / "run.zofo")
        assert recording.stop == kill + (call == 10**6)
        base = {name: p.clone() for name, p in Job().base.items()}
        with pytest.warns(UserWarning, match="was not closed"):
            replay(base, recording, partial=True)
        if recording.stop < len(after):
            for name, p in after[recording.stop].items():
                assert same_bits(base[name], p)
        start = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert start["step"] == kill // 4 * 4
        with pytest.warns(UserWarning, match="was not closed"):
            replay(start["model"], recording, start=start["step"], partial=True)
        for name in whole.weights():
            assert same_bits(base[name], start["model"][name])
