"""Models that several processes share, and weights that are not there as a whole: refused."""

import socket

import pytest
import torch
import torch.distributed as dist
from launch import let_cpu_shard
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


@pytest.mark.usefixtures("one_process")
def test_one_process_is_served():
    model = network()
    parallel = DistributedDataParallel(model)
    groups = hybrid_param_groups(parallel, **RATES)
    assert [group["mode"] for group in groups] == ["zo", "fo"]
    ordinary_step(model, parallel, torch.ones(2, 4))


@pytest.mark.usefixtures("one_process")
def test_weights_sharded_over_one_process():
    from torch.distributed.fsdp import fully_shard

    let_cpu_shard()
    x = torch.ones(2, 4)
    plain, sharded = network(), network()
    fully_shard(sharded)
    for model in (plain, sharded):
        optimizer = HybridZOFO(hybrid_param_groups(model, **RATES))
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(lambda model=model: model(x).square().mean())
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(p, q.full_tensor())


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
