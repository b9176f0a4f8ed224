"""Models that several processes share, and weights that are not there as a whole: refused."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zofo_optim import HybridZOFO, hybrid_param_groups

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
RATES = {"zo": {"lr": 1e-2}, "fo": {"lr": 1e-2}, "verbose": False}


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    return model


def free_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", init_method=free_address(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ordinary_step(model, wrapped, x):
    before = [p.clone() for p in model.parameters()]
    optimizer = HybridZOFO(hybrid_param_groups(model, **RATES))
    optimizer.step(lambda: wrapped(x).square().mean())
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def in_two_processes(rank, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    match = r"model must not be wrapped in DistributedDataParallel.* got 2 processes.*backward\("
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(rank))

    model = network()
    parallel = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=match):
        hybrid_param_groups(parallel, **RATES)
    with pytest.raises(RuntimeError, match=match):
        hybrid_param_groups(nn.ModuleList([parallel]), **RATES)

    # where the groups were made before the model was wrapped, or beneath it
    optimizer = HybridZOFO(hybrid_param_groups(model, **RATES))
    before = [p.clone() for p in model.parameters()]
    for called in (parallel, torch.compile(parallel, backend="eager")):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=match):
                optimizer.step(lambda called=called: called(x).square().mean())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    # first-order groups alone are as in torch
    model = network()[2:]
    parallel = DistributedDataParallel(model)
    inside = x[:, :1].expand(-1, 8)
    for _ in range(2):
        HybridZOFO(parallel.parameters(), lr=1e-2).step(lambda: parallel(inside).square().mean())
    gathered = [torch.empty_like(model[0].weight) for _ in range(2)]
    dist.all_gather(gathered, model[0].weight.detach())
    assert torch.equal(*gathered)

    # as is a model that each process has for itself
    model = network()
    ordinary_step(model, model, x)
    # or that a process shares with none
    alone = [dist.new_group([r]) for r in range(2)][rank]
    model = network()
    ordinary_step(model, DistributedDataParallel(model, process_group=alone), x)
    dist.destroy_process_group()


def test_two_processes():
    mp.spawn(in_two_processes, args=(free_address(),), nprocs=2)


@pytest.mark.usefixtures("one_process")
def test_one_process_is_served():
    model = network()
    parallel = DistributedDataParallel(model)
    groups = hybrid_param_groups(parallel, **RATES)
    assert [group["mode"] for group in groups] == ["zo", "fo"]
    ordinary_step(model, parallel, torch.ones(2, 4))


@pytest.mark.usefixtures("one_process")
def test_sharded_weights():
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"sharded weights \(DTensor.*one device.*'0.weight'"):
        hybrid_param_groups(model, **RATES)
    with pytest.raises(TypeError, match=r"is a DTensor, not a dense tensor.*unsharded"):
        HybridZOFO([{"params": [model[0].weight], "mode": "zo", "lr": 1e-2}])
    (group,) = hybrid_param_groups(model, exclude=r"^0\.", verbose=False)
    assert group["mode"] == "fo"


def quantised(weight):
    """As torchao and quanto hold weights: other tensors behind one of a floating dtype."""
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(weight, weight)


@pytest.mark.parametrize(
    "change",
    [
        quantised,
        lambda w: w.to(torch.float8_e4m3fn),
        lambda w: w.to_sparse(),
        lambda w: w.to(torch.complex64),
    ],
    ids=["wrapper", "float8", "sparse", "complex"],
)
def test_weights_that_could_learn_but_cannot_be_moved(change, capsys):
    model = network()
    model[0].weight = nn.Parameter(change(model[0].weight.detach()), requires_grad=False)
    match = r"weights that cannot be perturbed .*unquantised.*exclude=; '0.weight' is one"
    with pytest.raises(ValueError, match=match):
        hybrid_param_groups(model, **RATES)
    with pytest.raises(TypeError, match=r"dense tensor|dtype"):
        HybridZOFO([{"params": [model[0].weight], "mode": "zo", "lr": 1e-2}])
    for choice in ({"exclude": "weight"}, {"include": "bias"}):
        zo, _ = hybrid_param_groups(model, zo={"lr": 1e-2}, **choice)
        assert zo["param_names"] == ["0.bias"]
        assert "left out (excluded): 1 tensors" in capsys.readouterr().out


def test_integers_are_left_out(capsys):
    model = network()
    model.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    model.mask = nn.Parameter(torch.ones(2, dtype=torch.bool), requires_grad=False)
    zo, _ = hybrid_param_groups(model)
    assert zo["param_names"] == ["0.weight", "0.bias"]
    printed = capsys.readouterr().out
    assert "left out (int8): 1 tensors" in printed
    assert "left out (bool): 1 tensors" in printed
