"""Scripts under torchrun, and cases that many ranks run in one launch.

Starting ranks takes seconds, so one launch serves a whole file of tests. The file is its own
script: functions marked ``@case`` run on every rank, and tests read what they returned::

    from launch import case, launched, run_cases

    results = launched(__file__, 2)  # a fixture; (__file__, 1, 2) runs each test with each number


    @case
    def mean_of_ranks(rank, size):
        mean = torch.tensor(float(rank))
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        return mean


    def test_mean(results):
        first, second = results["mean_of_ranks"]  # of rank 0, of rank 1; fails where a rank did
        assert first == second == 0.5


    if __name__ == "__main__":
        run_cases()

While one case is worked on, ``ZOFO_CASES=mean_of_ranks`` in the environment leaves out others.
"""

import contextlib
import datetime
import faulthandler
import gc
import os
import subprocess
import sys
import tempfile
import traceback
import uuid
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PATH = [ROOT, ROOT / "kernels", ROOT / "tests"]
LONGEST = 300
"""Seconds of a launch, before it is stopped."""
PATIENCE = 60
"""Seconds that a rank waits for the others in a case."""
TOKEN, LIMIT, FOLDER = "ZOFO_LAUNCH", "ZOFO_LAUNCH_LIMIT", "ZOFO_LAUNCH_FOLDER"


# ---- launching ------------------------------------------------------------------------------


def torchrun(script, ranks, *args, timeout=LONGEST, env=None, options=(), check=True, module=None):
    """Run a script on ``ranks`` processes, on a free port of this machine; leave none behind.

    Args:
        script: its path; it runs in the current folder.
        ranks: how many processes.
        *args: arguments of the script.
        timeout: seconds, after which all processes are killed and the test fails.
        env: environment variables beside this process's own.
        options: words for the launcher, such as ``("--max-restarts", "1")``.
        check: fail the test, with all that was printed, where the exit status is not 0.
        module: the launcher and its own options, in place of ``torch.distributed.run``.

    Returns:
        subprocess.CompletedProcess, whose ``stdout`` has both streams of all processes.
    """
    where = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", ranks]
    launcher = module or ["torch.distributed.run", *where]
    words = [sys.executable, "-m", *launcher, *options, script, *args]
    command = [str(word) for word in words]
    token = uuid.uuid4().hex
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([*map(str, PATH), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
        TOKEN: token,
        LIMIT: str(timeout - 5),  # they say where they are before they are killed
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    late = False
    with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open with a lost rank
        streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            kill(token)
            process.wait()
        output.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, output.read())
    if late:
        pytest.fail(f"not done after {timeout} s: {' '.join(command)}\n{done.stdout}")
    if check and done.returncode:
        pytest.fail(f"exit status {done.returncode}: {' '.join(command)}\n{done.stdout}")
    return done


def running(token):
    """The processes of a launch; torchrun's workers have sessions of their own."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(TOKEN) == token:
                found.append(process)
    return found


def kill(token):
    while left := running(token):  # what was started meanwhile, too
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, 10)


# ---- the tests' side ------------------------------------------------------------------------


def launched(script, *ranks, forked=True, module=None):
    """A fixture: :class:`Results` of the script's cases, from one launch a number of ranks.

    Args:
        script: a file that ends with :func:`run_cases`.
        *ranks: each test runs with each of these numbers.
        forked: see :func:`results_of`.
        module: of :func:`torchrun`.
    """

    @pytest.fixture(scope="session", params=ranks, ids=[f"{count}-ranks" for count in ranks])
    def results(request, tmp_path_factory):
        folder = tmp_path_factory.mktemp("ranks")
        return results_of(script, request.param, folder, forked=forked, module=module)

    return results


def results_of(script, ranks, folder, *, forked=True, module=None, env=None):
    """:class:`Results` of one launch, which writes them to the folder.

    Args:
        forked: ranks are, where they can be: it is quicker than torchrun, see `forked_ranks.py`.
        module, env: of :func:`torchrun`.
    """
    if forked and module is None and hasattr(os, "fork"):
        module = ["forked_ranks", ranks]
    env = {**(env or {}), FOLDER: str(folder)}
    return Results(ranks, folder, torchrun(script, ranks, module=module, env=env, check=False))


class Results:
    """What the cases of a launch returned: ``results["name"]`` is a list by rank.

    Attributes:
        size: how many ranks.
    """

    def __init__(self, size, folder, done):
        self.size, self._folder, self._done = size, folder, done

    def __getitem__(self, name):
        found, failed = [], []
        for rank in range(self.size):
            path = self._folder / f"{name}.{rank}.pt"
            if not path.exists():
                failed.append(f"rank {rank} has no result of {name}")
                continue
            returned, error = torch.load(path, weights_only=False)
            found.append(returned)
            if error is not None:
                failed.append(f"rank {rank}: {error}")
        if failed:
            pytest.fail("\n".join([*failed, "printed by all ranks:", self._done.stdout]))
        return found


# ---- the ranks' side ------------------------------------------------------------------------

_CASES = []


def case(function):
    """Mark a function (rank, size) -> anything picklable, which every rank calls."""
    _CASES.append(function)
    return function


def let_cpu_shard():
    """Let FSDP2 of torch 2.6 shard on the CPU, whose streams lack what it asks of them there."""
    stream = torch.cpu.Stream
    if not hasattr(stream, "record_event"):
        stream.record_event = lambda self, event=None: torch.cpu.Event()
        stream.wait_event = lambda self, event: None


def run_cases():
    """Run this script's cases on gloo, in order, each with ``torch.manual_seed(0)``.

    A case that fails on a rank fails for its test alone: the rank leaves the process group, by
    which the others stop waiting for it, and all make a new one for the next case.
    """
    faulthandler.dump_traceback_later(float(os.environ[LIMIT]), exit=True)  # whoever killed whom
    torch.set_num_threads(1)
    let_cpu_shard()
    store, rank, size = next(dist.rendezvous("env://"))
    folder, groups = Path(os.environ[FOLDER]), 0

    def begin():
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"group {groups}", store),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=PATIENCE),
        )

    begin()
    wanted = os.environ.get("ZOFO_CASES", "")
    for function in (
        _CASES if not wanted else [f for f in _CASES if f.__name__ in wanted.split(",")]
    ):
        name, returned, error = function.__name__, None, None
        torch.manual_seed(0)
        try:
            returned = function(rank, size)
        except Exception:
            error = traceback.format_exc()
            end()  # so that the others need not wait until they lose patience
        fresh = folder / f"{name}.{rank}.new"
        torch.save((returned, error), fresh)
        fresh.replace(folder / f"{name}.{rank}.pt")
        store.set(f"{name} {rank}", "failed" if error else "passed")
        outcomes = [store.get(f"{name} {other}") for other in range(size)]  # waits for each
        if b"failed" in outcomes:
            end()
            groups += 1
            begin()
    end()


def end():
    """Leave the process group, and close its connections."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # wrappers of modules hold groups, in cycles
