"""Journals of low-rank directions, shared and one an example: recorded, replayed, resumed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU_BACKENDS, same_bits
from torch.nn import Parameter

from zofo_optim import HybridZOFO, Journal, replay
from zofo_optim.journal import JournalError, cli, player, read

STREAMED = dict(structure="low_rank", perturbation="streamed")
PER_EXAMPLE = dict(STREAMED, directions="per_example")
SHAPES = dict(w=(7, 5), b=(7,), stack=(2, 7, 6), head=(3, 6), row=(1, 3))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.zofo"


class Task:
    """Matrices, a stack of them, a single row and a vector; batches of a size that changes."""

    def __init__(self, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(0)
        made = {
            name: (0.3 + torch.randn(shape, generator=generator) / 2).to(dtype)
            for name, shape in SHAPES.items()
        }
        self.params = {name: Parameter(w, False) for name, w in made.items()}
        self.base = {name: w.clone() for name, w in made.items()}
        self.per_example = options.get("directions") == "per_example"
        if self.per_example:  # a stack's products have no closed form for examples
            del self.params["stack"], self.base["stack"]
        group = dict(params=list(self.params.items()), mode="zo", lr=1e-3, weight_decay=0.1)
        self.optimizer = HybridZOFO([group], seed=3, **{"structure": "low_rank", **options})
        self.dtype = dtype

    def loss(self, number, size=None):
        size = 2 + number % 3 if size is None else size
        x = torch.randn(size, 5, generator=torch.Generator().manual_seed(number))
        p = self.params
        h = F.linear(x.to(self.dtype), p["w"], p["b"]).tanh()
        if self.per_example:
            h = h[:, :6]
        else:
            h = h @ p["stack"][number % 2]
        h = F.linear(F.linear(h, p["head"]), p["row"]).float().square().squeeze(1)
        return h if self.per_example else h.mean()

    def train(self, start, stop):
        for number in range(start, stop):
            self.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + number)
            self.optimizer.zero_grad()
            self.optimizer.step(lambda number=number: self.loss(number))

    def replayed(self, path, **options):
        found = {name: w.clone() for name, w in self.base.items()}
        result = replay(found, path, **options)
        for name, p in self.params.items():
            assert same_bits(found[name], p.detach()), name
            assert not same_bits(found[name], self.base[name]), name
        return result


VARIANTS = [
    dict(rank=1, perturbation="in_place"),
    dict(rank=2, perturbation="in_place", estimator="one_sided", num_samples=3),
    dict(STREAMED, rank=2),
    dict(STREAMED, rank=1, num_samples=2),
    dict(PER_EXAMPLE, rank=1),
    dict(PER_EXAMPLE, rank=2, estimator="one_sided"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_replay_gives_the_trained_weights(variant, dtype, distribution, path):
    """Along signs on every backend; in pieces, too."""
    task = Task(dtype, distribution=distribution, **variant)
    with Journal(path).attach(task.optimizer):
        task.train(0, 6)
    assert task.replayed(path) == (0, 6, True)
    if distribution == "rademacher":
        for backend in CPU_BACKENDS:
            if backend != "triton":
                assert task.replayed(path, backend=backend) == (0, 6, True)


def test_info_says_which_directions(path, capsys):
    task = Task(**PER_EXAMPLE, active=0.5)
    with Journal(path).attach(task.optimizer):
        task.train(0, 2)
    assert cli.main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "gaussian, rank 1, one an example, version 2" in out
    assert "active  0.5" in out


@pytest.mark.parametrize("variant", VARIANTS[1:5:3], ids=lambda v: "-".join(map(str, v.values())))
def test_pieces_change_nothing(variant, path, monkeypatch):
    task = Task(torch.bfloat16, **variant)
    with Journal(path).attach(task.optimizer):
        task.train(0, 4)
    sizes = []
    monkeypatch.setattr(player, "_room", lambda steps: 11)
    assert task.replayed(path, progress=lambda done, total: sizes.append(done)) == (0, 4, True)
    assert len(sizes) > 3


def test_a_record_holds_a_coefficient_for_each_example(path):
    """Also of micro-batches, whose examples count on."""
    task = Task(**PER_EXAMPLE)
    with Journal(path).attach(task.optimizer):
        task.train(0, 3)
        for part in range(2):
            task.optimizer.backward(lambda part=part: task.loss(part, size=3 - part))
        accumulated = task.optimizer.accumulated[0].tolist()
        task.optimizer.step()
    steps = read(path).steps
    assert [len(parts[0].coefficients) for parts in steps] == [2, 3, 4, 5]
    assert list(steps[-1][0].coefficients) == accumulated
    assert all(parts[0].path == () for parts in steps)  # nothing moves
    assert task.replayed(path) == (0, 4, True)


@pytest.mark.parametrize("variant", VARIANTS[1:5:3], ids=lambda v: "-".join(map(str, v.values())))
def test_a_journal_goes_on(variant, path):
    """From a checkpoint in the middle of a step's accumulation, in another optimizer."""
    task, whole = Task(**variant), Task(**variant)
    whole.train(0, 3)
    for part in range(2):
        whole.optimizer.backward(lambda part=part: whole.loss(part, size=3 - part))
    whole.optimizer.step()
    with Journal(path).attach(task.optimizer):
        task.train(0, 3)
        task.optimizer.backward(lambda: task.loss(0, size=3))
    other = Task(**variant)
    other.optimizer.load_state_dict(task.optimizer.state_dict())
    for name, p in other.params.items():
        p.data.copy_(task.params[name])
    with Journal(path, resume=True).attach(other.optimizer):
        other.optimizer.backward(lambda: other.loss(1, size=2))
        other.optimizer.step()
    for name, p in other.params.items():
        assert same_bits(p.detach(), whole.params[name].detach())
    assert other.replayed(path) == (0, 4, True)


@pytest.mark.filterwarnings("ignore:state_dict was saved")
@pytest.mark.parametrize(
    ("here", "message"),
    [
        (dict(structure="full"), r"made with structure='low_rank', the optimizer has 'full'"),
        (dict(rank=1), r"made with rank=2, the optimizer has 1; .*HybridZOFO\(\.\.\., rank=2\)"),
    ],
)
def test_structure_and_rank_must_match(here, message, path):
    task = Task(rank=2)
    with Journal(path).attach(task.optimizer):
        task.train(0, 1)
    other = Task(**{"rank": 1 if "structure" in here else 2, **here})
    other.optimizer.load_state_dict(task.optimizer.state_dict())
    for name, p in other.params.items():
        p.data.copy_(task.params[name])
    with pytest.raises(JournalError, match=message):
        Journal(path, resume=True).attach(other.optimizer)


def test_older_journals_are_of_full_directions(path, monkeypatch):
    task = Task(structure="full")
    with Journal(path).attach(task.optimizer):
        task.train(0, 2)
    recording = read(path)
    assert not {"structure", "rank"} & {*recording.header}  # as headers were before
    assert task.replayed(recording) == (0, 2, True)

    from zofo_optim.journal import header

    ours = {name: getattr(task.optimizer.settings, name) for name in header._MUST_MATCH}
    rest = {name: recording.header[name] for name in ("noise_version", "groups")}
    header.check_same(recording, {**ours, **rest})
    with pytest.raises(JournalError, match="made with structure='full', the optimizer has"):
        header.check_same(recording, {**ours, **rest, "structure": "low_rank"})


@pytest.mark.filterwarnings("ignore:state_dict was saved")
def test_shared_and_own_directions_may_follow_one_another(path):
    """A record has as many as its step had; the noise is the same."""
    task = Task(**PER_EXAMPLE)
    with Journal(path).attach(task.optimizer):
        task.train(0, 2)
    other = Task(**PER_EXAMPLE)
    group = other.optimizer.param_groups[0]
    shared = HybridZOFO([dict(group, params=list(other.params.items()))], **STREAMED)
    shared.load_state_dict(task.optimizer.state_dict())
    for name, p in other.params.items():
        p.data.copy_(task.params[name])
    with Journal(path, resume=True).attach(shared):
        shared.step(lambda: other.loss(0).mean())
    assert other.replayed(path) == (0, 3, True)
