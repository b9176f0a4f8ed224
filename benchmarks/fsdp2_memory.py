"""Memory of a zeroth-order step under FSDP2, in bytes of tensors: of shards, and beside them.

    for ranks in 1 2 4; do torchrun --nproc-per-node $ranks benchmarks/fsdp2_memory.py; done

adds a row to ``benchmarks/results/cpu/fsdp2_memory.json`` each. Bytes are exact, on any machine.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of experiments

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from zofo_bench.machine import header

from experiments.measure import growth, quiet
from zofo_optim import HybridZOFO, hybrid_param_groups

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "fsdp2_memory.json"
SIZES = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, vocab_size=512)
STEPS = {
    "full directions": dict(),
    "low rank": dict(structure="low_rank"),
    "one-sided, 2 samples": dict(estimator="one_sided", num_samples=2),
}
REPEATS = 5
"""Buffers that another thread has sent are freed sooner or later: the least is the step's."""


def sharded() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8))
    model.requires_grad_(False).eval()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def measured() -> dict[str, object]:
    """Bytes of one process."""
    model = sharded()
    tokens = torch.randint(512, (1, 16))

    def forward() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    found: dict[str, object] = {
        "weights": nbytes(model),
        "layer": nbytes(model.model.layers[0]),
        "root": nbytes(model) - sum(nbytes(layer) for layer in model.model.layers),
        "shards": sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor)),
    }
    with torch.no_grad():
        forward()
        model.reshard()  # it keeps the root's weights gathered
        found["forward"] = least(lambda: (forward(), model.reshard()))
    beside = {}
    for name, options in STEPS.items():
        groups = hybrid_param_groups(model, dict(lr=1e-6), verbose=False)
        optimizer = HybridZOFO(groups, check_ranks_every=0, **options)
        optimizer.step(forward)  # which also verifies
        beside[name] = least(lambda: optimizer.step(forward))  # noqa: B023
    return {**found, "steps": beside}


def least(call: Callable[[], object]) -> int:
    return min(growth(call).most for _ in range(REPEATS))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with quiet():
        found = measured()
    if dist.get_rank() == 0:
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"ranks": {}}
        ranks = {**known["ranks"], str(dist.get_world_size()): found}
        content = {"machine": header(torch.device("cpu")), "sizes": SIZES, "ranks": ranks}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
