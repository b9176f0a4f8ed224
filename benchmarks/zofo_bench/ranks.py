"""Steps by several processes of this machine, and what they are made of; runs under torchrun.

``python -m torch.distributed.run ... -m zofo_bench.ranks FILE`` writes what it measures to FILE.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from zofo_kernels import Direction, Shift, Weights, perturb_, update_
from zofo_optim import HybridZOFO, hybrid_param_groups

from .decoders import LORA_TARGETS, TINY, Decoder, build, random_tokens
from .lora import RANK, with_lora
from .timing import quiet_collector, spread
from .traffic import Traffic

DECODER = Decoder(
    "Llama, 4 layers of 512",
    "llama",
    {
        "vocab_size": 2000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
)
ROWS, TOKENS = 4, 64
"""Of each process's batch."""
LR_ZO, LR_FO, MU = 1e-7, 1e-4, 1e-3
FURTHER = 8
"""Directions of the update that tells what further ones cost."""
SUMMED = 1 << 24
"""Bytes of the sum, and of the gathering, that tell bandwidths."""
Run = Callable[[], object]


class Job:
    """A model of this process, its batch, and a step with the other processes of a group.

    Args:
        quick: a tiny model.
        group: the processes.
    """

    zo: ClassVar = {"lr": LR_ZO, "mu": MU}

    def __init__(self, quick: bool, group: dist.ProcessGroup) -> None:
        self.group = group
        self.decoder = TINY if quick else DECODER
        self.model = build(self.decoder, torch.device("cpu"), torch.float32)
        ids = random_tokens(self.model, ROWS, TOKENS, torch.device("cpu"))
        self.ids = (ids + dist.get_rank()) % self.decoder.options["vocab_size"]

    def losses(self, model: nn.Module) -> Tensor:
        """Of the examples."""
        logits = model(input_ids=self.ids).logits[:, :-1]
        found = nn.functional.cross_entropy(
            logits.flatten(0, 1), self.ids[:, 1:].flatten(), reduction="none"
        )
        return found.view(ROWS, -1).mean(1)

    def loss(self, model: nn.Module) -> Tensor:
        return self.losses(model).mean()

    def zeroth_order(self, **options: Any) -> Run:
        """Steps of zeroth order alone."""
        directions = options.get("directions", "shared")
        groups = hybrid_param_groups(self.model, self.zo, directions=directions, verbose=False)
        optimizer = HybridZOFO(groups, process_group=self.group, **options)
        loss = self.losses if directions == "per_example" else self.loss
        return lambda: optimizer.step(lambda: loss(self.model))

    def data_parallel(self) -> Run:
        return self.zeroth_order()

    def samples(self) -> Run:
        return self.zeroth_order(
            parallel="samples",
            num_samples=self.group.size(),
            perturbation="streamed",
            distribution="rademacher",
        )

    def per_example(self) -> Run:
        return self.zeroth_order(
            directions="per_example", structure="low_rank", perturbation="streamed"
        )

    def hybrid(self) -> Run:
        adapted = with_lora(self.model, "CAUSAL_LM", LORA_TARGETS)
        groups = hybrid_param_groups(adapted, self.zo, dict(lr=LR_FO), verbose=False)
        model = DistributedDataParallel(adapted, process_group=self.group)
        optimizer = HybridZOFO(groups, process_group=self.group)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.step(lambda: self.loss(model))

        return step

    def sharded(self) -> Run:
        mesh = DeviceMesh.from_group(self.group, "cpu")
        for layer in self.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=True)
        return self.zeroth_order()

    def first_order(self) -> Run:
        self.model.requires_grad_(True)
        model = DistributedDataParallel(self.model, process_group=self.group)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR_FO)

        def step() -> None:
            optimizer.zero_grad()
            self.loss(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step


STRATEGIES: dict[str, Callable[[Job], Run]] = {
    "ZO, data parallel": Job.data_parallel,
    "ZO, samples in parallel": Job.samples,
    "ZO, per example": Job.per_example,
    "hybrid, LoRA under DDP": Job.hybrid,
    "ZO, FSDP2": Job.sharded,
    "FO, DDP": Job.first_order,
}
WARM_UP = 2
"""Steps before anything is measured: the first verifies, and compares the processes."""


def parts(job: Job) -> dict[str, Run]:
    """What steps are made of, each by itself: arithmetic, passes over the weights, collectives."""
    model = job.model.requires_grad_(True)
    tensors = [p.detach().clone() for p in model.parameters()]
    trained = [p.clone().requires_grad_(True) for p in tensors]
    for p in trained:
        p.grad = torch.zeros_like(p)
    weights, sgd = Weights(tensors), torch.optim.SGD(trained, lr=LR_FO)
    along = {
        "gaussian": [Direction(0, 0, s) for s in range(FURTHER)],
        "rademacher": [Direction(0, 0, s, "rademacher") for s in range(FURTHER)],
        "rank 1": [Direction(0, 0, s, rank=1) for s in range(FURTHER)],
    }
    gaussian = along["gaussian"]
    small, summed = torch.zeros(4, dtype=torch.float64), torch.zeros(SUMMED // 4)
    group, size = job.group, job.group.size()
    every = [torch.zeros_like(small) for _ in range(size)]
    own = torch.zeros(SUMMED // 4 // size)
    gathered = [torch.zeros_like(own) for _ in range(size)]

    def forward() -> None:
        with torch.no_grad():
            job.loss(model)

    def updated(directions: list[Direction], recover: Shift | None = None) -> Run:
        ones = torch.zeros(len(directions))
        return lambda: update_(weights, directions, ones, 1e-9, recover=recover)

    return {
        "forward": forward,
        "forward and backward": lambda: job.loss(model).backward(),  # type: ignore[no-untyped-call]
        "recover and perturb": lambda: perturb_(
            weights, gaussian[1], 0.0, recover=Shift(gaussian[0], 0.0)
        ),
        "restore and update": updated(gaussian[:1], Shift(gaussian[0], 0.0)),
        **{f"update, 1 direction, {k}": updated(some[:1]) for k, some in along.items()},
        **{f"update, {FURTHER} directions, {k}": updated(some) for k, some in along.items()},
        "SGD": sgd.step,
        "all-gather of 32 bytes": lambda: dist.all_gather(every, small, group),
        "all-gather of 16 MiB": lambda: dist.all_gather(gathered, own, group),
        "all-reduce of 16 MiB": lambda: dist.all_reduce(summed, group=group),
    }


def counted(run: Run) -> dict[str, int]:
    """What a step hands to collectives."""
    with Traffic() as traffic:
        run()
    return {"bytes": traffic.bytes, "collectives": traffic.collectives}


class Member:
    """What this process does as one of a group; nothing where it is none of it.

    Args:
        quick: see :class:`Job`.
        group: None where this process is outside.
    """

    def __init__(self, quick: bool, group: dist.ProcessGroup | None) -> None:
        self.runs: dict[str, Run] = {}
        self.traffic: dict[str, dict[str, int]] = {}
        self.job = None if group is None else Job(quick, group)
        if self.job is None or group is None:
            return
        self.runs = {name: make(Job(quick, group)) for name, make in STRATEGIES.items()}
        steps = list(self.runs)
        self.runs |= parts(self.job)
        for run in self.runs.values():
            for _ in range(WARM_UP):
                run()
        self.traffic = {name: counted(self.runs[name]) for name in steps}

    def seconds(self, name: str) -> float:
        """Of the process of the group that ends last; all processes call this."""
        run = self.runs.get(name)
        dist.barrier()
        start = time.perf_counter()
        if run is not None:
            run()
        spent = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        return float(spent)

    def sizes(self) -> dict[str, Any]:
        """Of the model and the batch of each process."""
        assert self.job is not None
        job, options = self.job, self.job.decoder.options
        both = {name: sum(p.shape) for name, p in job.model.named_parameters() if "proj" in name}
        adapted = [size for name, size in both.items() if any(t in name for t in LORA_TARGETS)]
        return {
            "model": job.decoder.name,
            "parameters": sum(p.numel() for p in job.model.parameters()),
            "rows_and_columns": sum(both.values()),
            "adapter": RANK * sum(adapted),
            "layers": options["num_hidden_layers"],
            "width": options["hidden_size"],
            "vocabulary": options["vocab_size"],
            "rows": ROWS,
            "tokens": TOKENS,
        }


def measured(quick: bool, rounds: int, counts: Sequence[int]) -> dict[str, Any]:
    """By number of processes; all numbers in turn, so that all see the same machine.

    Those that a number leaves out sleep meanwhile. Only rank 0 has a result.
    """
    rank, members = dist.get_rank(), {}
    for count in counts:
        group = dist.new_group(range(count))
        members[count] = Member(quick, group if rank < count else None)
        dist.barrier()
    names = members[max(counts)].runs
    found: dict[tuple[int, str], list[float]] = {}
    with quiet_collector():
        for _ in range(rounds):
            for name in names:
                for count, member in members.items():
                    found.setdefault((count, name), []).append(member.seconds(name))
    result = {}
    for count, member in members.items() if rank == 0 else ():
        times = {name: {"seconds": spread(found[count, name])} for name in names}
        result[str(count)] = {
            "sizes": member.sizes(),
            "steps": {name: {**times[name], **member.traffic[name]} for name in STRATEGIES},
            "parts": {name: times[name] for name in names if name not in STRATEGIES},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--counts", type=int, nargs="+", help="of processes, up to all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = measured(args.quick, args.rounds, args.counts)
        if dist.get_rank() == 0:
            args.file.write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
