"""Launching ranks: each case has its results, one that fails harms no other, none is left."""

import os

import psutil
import pytest
import torch
import torch.distributed as dist
from launch import TOKEN, case, launched, run_cases, running, torchrun

results = launched(__file__, 2)


@case
def mean_of_ranks(rank, size):
    mean = torch.tensor(float(rank))
    dist.all_reduce(mean)
    return mean / size


@case
def one_rank_fails(rank, size):
    if rank == 1:
        raise ValueError("of rank 1 alone")
    dist.all_reduce(torch.ones(3))


@case
def after_a_failure(rank, size):
    token = os.environ[TOKEN]
    every = [None] * size
    dist.all_gather_object(every, (rank, token))
    return every


def test_each_rank_returns_its_result(results):
    assert results["mean_of_ranks"] == [0.5, 0.5]


def test_a_failure_shows_the_traceback_and_the_others_do_not_wait(results):
    with pytest.raises(pytest.fail.Exception) as failed:
        results["one_rank_fails"]
    said = str(failed.value)
    assert "ValueError: of rank 1 alone" in said
    # the other's exchange fails as well: gloo has a message of its own for each moment of it
    assert "rank 0: Traceback" in said
    assert "all_reduce" in said
    assert "Timed out" not in said


def test_later_cases_are_not_harmed(results):
    first, second = results["after_a_failure"]
    assert first == second
    assert [rank for rank, _ in first] == [0, 1]
    token = first[0][1]
    assert not running(token)


def test_a_case_that_is_not_there(results):
    with pytest.raises(pytest.fail.Exception, match="rank 0 has no result of another"):
        results["another"]


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
os.write(1, b"started ")
time.sleep(600)
"""


LOST = """
import os, time
os._exit(3) if os.environ["RANK"] == "1" else time.sleep(600)
"""


def test_a_rank_that_is_lost_ends_the_others(tmp_path):
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    with pytest.raises(pytest.fail.Exception, match=r"rank 1 ended with 3\nrank 0 ended with -9"):
        torchrun(script, 2, module=["forked_ranks", 2])


def test_ranks_that_do_not_end_are_killed(tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    with pytest.raises(pytest.fail.Exception, match="not done after 10 s") as failed:
        torchrun(script, 2, tmp_path, timeout=10)
    assert str(failed.value).count("started ") == 2
    for rank in "01":
        assert not psutil.pid_exists(int((tmp_path / rank).read_text()))


def test_a_script_that_fails_fails_the_test(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text("raise SystemExit('nothing is right')")
    with pytest.raises(pytest.fail.Exception, match="nothing is right"):
        torchrun(script, 1)


if __name__ == "__main__":
    run_cases()
