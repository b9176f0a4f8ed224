"""Bottlenecks of a model whose weights are sharded over processes."""

import tempfile
from pathlib import Path

import torch
from launch import case, launched, run_cases
from torch import nn
from torch.distributed.fsdp import fully_shard

from zofo_optim.transfer.bottleneck_files import load_bottlenecks, save_bottlenecks
from zofo_optim.transfer.bottlenecks import adapters_of, add_bottlenecks

results = launched(__file__, 2)
X = torch.linspace(-1, 1, 12).reshape(2, 6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def adapted():
    model = add_bottlenecks(net(), ["0"], 3, modules_to_save=["2"])
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            nn.init.normal_(adapter.up.weight)
        nn.init.normal_(model[2].weight)
    return model


@case
def files(rank, size):
    model = adapted()
    wanted = model(X).detach()
    fully_shard(model[2])
    fully_shard(model)
    model(X)  # gathers what the root has
    names = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(names)
    folder = Path(names[0])
    path = save_bottlenecks(model, folder)
    torch.distributed.barrier()
    found = load_bottlenecks(net(), path)(X).detach()
    block = folder / "file"
    if rank == 0:
        block.write_text("no folder")
    torch.distributed.barrier()
    try:
        save_bottlenecks(model, block)
    except (OSError, RuntimeError) as error:
        return wanted, found, type(error), str(error)
    return wanted, found, None, ""


def test_the_first_process_writes_what_all_gather(results):
    for wanted, found, _, _ in results["files"]:
        assert torch.equal(found, wanted)


def test_all_know_that_it_could_not(results):
    (_, _, first, _), (_, _, second, said) = results["files"]
    assert issubclass(first, OSError)
    assert second is RuntimeError
    assert said.startswith("folder must be one that the first process can write to")


if __name__ == "__main__":
    run_cases()
