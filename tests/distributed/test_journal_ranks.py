"""Journals of several processes: the first writes, all learn of errors, weights are full ones."""

import contextlib
import errno
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import same_bits
from journaled import SETTINGS, Job
from launch import case, launched, run_cases
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay
from zofo_optim.journal import read

results = launched(__file__, 2)
STEPS = 5


class Part(Job):
    """The job, of which each process sees its own rows; zeroth-order alone."""

    def __init__(self, rank=0, size=1, **options):
        super().__init__(adapter=False, **options)
        self.rank, self.size = rank, size

    def loss(self, step):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step))
        x = x[self.rank :: self.size].to(self.dtype)
        h = self.model[2](torch.tanh(self.model[0](x)))
        return (self.model[3](h.to(self.model[3].weight.dtype)).float().square()).mean()


def folder_of_all():
    """One that all processes have."""
    import tempfile

    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return Path(found[0])


def contents(job):
    return {name: p.detach().clone() for name, p in job.weights().items()}


def trained(rank, size, path, start=0, stop=STEPS, state=None, **options):
    job = Part(rank, size, **options)
    if state is not None:
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
    with Journal(path, resume=True).attach(job.optimizer) as journal:
        for step in range(start, stop):
            job.step(step)
            if step == 1:
                journal.stamp()
    return job


@case
def replicated(rank, size):
    path = folder_of_all() / "run.zofo"
    job = trained(rank, size, path)
    return dict(path=path, weights=contents(job))


def test_the_first_process_writes_one_journal(results):
    found = results["replicated"]
    assert all(same_bits(p, found[1]["weights"][name]) for name, p in found[0]["weights"].items())
    recording = read(found[0]["path"])
    assert recording.closed
    assert (recording.start, recording.stop) == (0, STEPS)
    base = Part().base
    assert replay(base, found[0]["path"]) == (0, STEPS, True)
    assert all(same_bits(base[name], p) for name, p in found[0]["weights"].items())


@case
def errors(rank, size):
    folder = folder_of_all()
    told = {}

    @contextlib.contextmanager
    def noting(name):
        try:
            yield
        except Exception as error:
            told[name] = type(error).__name__, str(error)

    trained(rank, size, folder / "run.zofo")
    with noting("exists"):
        Journal(folder / "run.zofo").attach(Part(rank, size).optimizer)
    with noting("lacks"):  # an optimizer at step 0, with other weights
        job = Part(rank, size)
        job.model[0].weight.data += 1
        Journal(folder / "run.zofo", resume=True).attach(job.optimizer)
    with noting("folder"):
        Journal(folder / "none" / "run.zofo").attach(Part(rank, size).optimizer)
    with noting("cast"):
        job = Part(rank, size)
        Journal(folder / "cast.zofo").attach(job.optimizer)
        job.step(0)
        job.model.double()
        job.dtype = torch.float64
        job.step(1)
    with noting("loads"):
        job = Part(rank, size)
        early = job.optimizer.state_dict()
        job.step(0)
        Journal(folder / "loads.zofo").attach(job.optimizer)
        job.step(1)
        job.optimizer.load_state_dict(early)
    # the others stay usable
    with Journal(folder / "again.zofo").attach(job.optimizer):
        job.step(5)
    return told


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("exists", "FileExistsError", "path must not exist"),
        ("lacks", "JournalError", "weights are not those of its step"),
        ("folder", "FileNotFoundError", "No such file"),
        ("cast", "JournalError", "must keep their shape and dtype"),
        ("loads", "JournalError", "must reach the optimizer's step 0"),
    ],
)
def test_errors_reach_all(results, name, kind, message):
    for rank, told in enumerate(results["errors"]):
        assert told[name][0] == kind
        assert message in told[name][1]
        assert ("in the first process" in told[name][1]) is (rank > 0 and name != "cast")


class Full:
    """A file on a disk without room."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")


@case
def no_room(rank, size):
    job = Part(rank, size)
    journal = Journal(folder_of_all() / "run.zofo").attach(job.optimizer)
    job.step(0)
    if rank == 0:
        journal._file = Full(journal._file)
    told = []
    for work in (lambda: job.step(1), journal.flush, journal.stamp, journal.close):
        try:
            work()
            told.append("")
        except OSError as error:
            told.append(str(error))
    return told


def test_errors_in_a_step_are_the_first_process_s(results):
    first, second = results["no_room"]
    assert all("No space left" in said for said in first)
    assert second[0] == ""
    assert all("No space left" in said and "first process" in said for said in second[1:])


@case
def states(rank, size):
    """A checkpoint at step 2, and a journal that goes on to 4: for other numbers of processes."""
    folder = folder_of_all()
    job = trained(rank, size, folder / "run.zofo", stop=2)
    state = dict(model=job.model.state_dict(), optimizer=job.optimizer.state_dict())
    if rank == 0:
        torch.save(state, folder / "checkpoint.pt")
    job = trained(rank, size, folder / "run.zofo", 2, 4, state)
    dist.barrier()
    again = trained(rank, size, folder / "run.zofo", 2, STEPS, state)  # cut at 2
    return dict(folder=folder, weights=contents(again))


def test_resumed_at_a_checkpoint_and_by_another_number_of_processes(results):
    first, second = results["states"]
    path = first["folder"] / "run.zofo"
    assert path.with_name("run.zofo.bak").exists()
    base = Part().base
    assert replay(base, path) == (0, STEPS, True)
    for name, p in first["weights"].items():
        assert same_bits(p, second["weights"][name])
        assert same_bits(p, base[name])
    # one process goes on where two were, with the whole batches
    state = torch.load(first["folder"] / "checkpoint.pt", weights_only=True)
    with pytest.warns(UserWarning, match="3 later steps"):
        job = trained(0, 1, path, 2, STEPS, state)
    base = Part().base
    assert replay(base, path) == (0, STEPS, True)
    for name, p in job.weights().items():
        assert same_bits(base[name], p)
        torch.testing.assert_close(p, first["weights"][name])


@case
def sharded(rank, size):
    """Shards of FSDP2, whose fingerprints are of the full weights."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    path = folder_of_all() / "run.zofo"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 39), nn.Tanh(), nn.Linear(39, 5)).requires_grad_(False)
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)
    zo = dict(lr=1e-3, weight_decay=0.1)
    groups = hybrid_param_groups(model, zo=zo, verbose=False)
    optimizer = HybridZOFO(groups, **{**SETTINGS, "distribution": "rademacher"})
    with Journal(path).attach(optimizer):
        for step in range(STEPS):
            x = torch.randn(2, 12, generator=torch.Generator().manual_seed(10 * step + rank))
            optimizer.step(lambda x=x: model(x).square().mean())
    trained = {name: p.full_tensor() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.copy_(distribute_tensor(full[name], p.device_mesh, p.placements))
    again = replay(model, path)
    remade = {name: p.full_tensor() for name, p in model.named_parameters()}
    return dict(path=path, base=full, weights=trained, again=again, remade=remade)


def test_shards_are_replayed_onto_full_weights_and_onto_shards(results):
    for found in results["sharded"]:
        assert replay(found["base"], found["path"]) == found["again"] == (0, STEPS, True)
        for name, p in found["weights"].items():
            assert same_bits(found["base"][name], p)
            assert same_bits(found["remade"][name], p)


@case
def columns(rank, size):
    """Shards of columns, and of a convolution's second dimension: rectangles."""
    from torch.distributed.tensor import Shard, distribute_tensor

    path = folder_of_all() / "run.zofo"
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    base = {"matrix": torch.randn(7, 5).bfloat16(), "kernels": torch.randn(4, 6, 3).bfloat16()}
    shards = {name: distribute_tensor(p, mesh, [Shard(1)]) for name, p in base.items()}
    model = nn.ParameterDict({name: nn.Parameter(p, False) for name, p in shards.items()})
    groups = hybrid_param_groups(model, zo=dict(lr=1e-2), verbose=False)
    optimizer = HybridZOFO(groups, distribution="rademacher", mu=1e-2)

    def closure():
        return sum((p.full_tensor().float() ** 3).sum() for p in model.values())

    with Journal(path).attach(optimizer):
        for _ in range(STEPS):
            optimizer.step(closure)
    trained = {name: p.full_tensor() for name, p in model.items()}
    with torch.no_grad():
        for name, p in model.items():
            p.copy_(distribute_tensor(base[name], mesh, [Shard(1)]))
    again = replay(model, path)
    remade = {name: p.full_tensor() for name, p in model.items()}
    return dict(path=path, base=base, weights=trained, again=again, remade=remade)


def test_rectangles_are_replayed(results):
    for found in results["columns"]:
        before = {name: p.clone() for name, p in found["base"].items()}
        assert replay(found["base"], found["path"]) == found["again"] == (0, STEPS, True)
        for name, p in found["weights"].items():
            assert same_bits(found["base"][name], p)
            assert same_bits(found["remade"][name], p)
            assert not same_bits(before[name], p)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".* is cut at the optimizer's step")
    run_cases()
