"""Zeroth order in place where torch spreads a model over meshes: the weights of one process."""

import pytest
import torch
from launch import case, launched, run_cases
from sharded import (
    TORCH_26,
    VARIANTS,
    Even,
    batch,
    by_columns,
    close,
    every_variant,
    fsdp,
    full,
    hybrid_mesh,
    needs_tensor_parallel,
    optimizer_of,
    over_tensor,
    parallelized,
    replayed,
    same,
    tensor_parallel,
    toy,
    train,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
)

from zofo_optim.sharding import local_of, pieces_of

results = launched(__file__, 4)


SPREAD = {
    "tensor parallel": lambda model: tensor_parallel(model, init_device_mesh("cpu", (4,))),
    "fsdp": fsdp,
    "fsdp by columns": lambda model: fsdp(model, shard_placement_fn=by_columns),
    "fsdp in pairs": lambda model: fsdp(model, reshard_after_forward=2),
    "hsdp": lambda model: fsdp(model, mesh=hybrid_mesh()),
    "fsdp over tensor": over_tensor,
}
OF_TENSOR = {"tensor parallel", "fsdp over tensor"}
STRATEGIES = [pytest.param(s, marks=[needs_tensor_parallel] * (s in OF_TENSOR)) for s in SPREAD]
if TORCH_26:
    SPREAD = {name: spread for name, spread in SPREAD.items() if name not in OF_TENSOR}
PARTS = {"tensor parallel": 1, "fsdp over tensor": 2}
"""Into how many a batch is spread, where not over all ranks."""
PAIRS = [
    ("full", torch.bfloat16),
    ("full, signs", torch.float32),
    ("low rank", torch.bfloat16),
    ("low rank, signs", torch.float32),
]


# ---- places -----------------------------------------------------------------------------------


class Numbered(Even):
    """Each element is its own number."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape))


@case
def places(rank, size):
    """The elements that this rank holds of each parameter, and those that its pieces say."""
    found = {}
    for name, spread in SPREAD.items():
        for parameter, p in spread(Numbered()).named_parameters():
            said = [
                piece.offset + k // length * stride + k % length
                for piece in pieces_of(p)
                for length, stride in [piece.rectangle or (piece.tensor.numel() or 1,) * 2]
                for k in range(piece.tensor.numel())
            ]
            held = local_of(p).flatten().int().tolist()
            kinds = [type(x).__name__ for x in getattr(p, "placements", ())]
            found[name, parameter] = said, held, kinds
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pieces_are_where_they_say(results, strategy):
    every = results["places"]
    kinds = set()
    for parameter, p in Even().named_parameters():
        of_ranks = [found[strategy, parameter] for found in every]
        assert all(said == held for said, held, _ in of_ranks), parameter
        assert set().union(*(held for _, held, _ in of_ranks)) == set(range(p.numel()))
        kinds.update(*(names for *_, names in of_ranks))
    assert ("_StridedShard" in kinds) == (strategy == "fsdp over tensor")


# ---- bits -------------------------------------------------------------------------------------


@case
def replays(rank, size):
    return {name: every_variant(spread, PAIRS, Even) for name, spread in SPREAD.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("variant", "dtype"), PAIRS)
def test_given_coefficients_give_the_bits_of_one_process(results, variant, dtype, strategy):
    expected = replayed(toy(dtype, Even), **VARIANTS[variant])
    for found in results["replays"]:
        same(found[strategy][variant, dtype], expected)


# ---- whole runs -------------------------------------------------------------------------------

SETTINGS = {
    "full": dict(num_samples=2, estimator="one_sided"),
    "low rank": dict(structure="low_rank", rank=2),
}


def part_of_batch(strategy, rank, size):
    parts = PARTS.get(strategy, size)
    return tuple(t.chunk(parts)[rank * parts // size] for t in batch())


@case
def whole_runs(rank, size):
    found = {}
    for strategy, spread in SPREAD.items():
        inputs = part_of_batch(strategy, rank, size)
        for name, settings in SETTINGS.items():
            model = spread(toy(torch.float64, Even))
            optimizer = optimizer_of(model, **settings)
            for _ in range(3):
                optimizer.step(lambda: model(*inputs))  # noqa: B023
            found[strategy, name] = full(model)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_whole_runs_are_those_of_one_process(results, name, strategy):
    model = toy(torch.float64, Even)
    train(model, **SETTINGS[name])
    assert not torch.equal(model.norm.weight, toy(torch.float64, Even).norm.weight)
    for found in results["whole_runs"]:
        close(found[strategy, name], full(model))


# ---- losses that are spread, too --------------------------------------------------------------


@case
def spread_losses(rank, size):
    """The model ends in a DTensor, and so does its loss."""
    model = toy(torch.float64, Even)
    mesh = init_device_mesh("cpu", (4,))
    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    plan["head"] = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    parallelized(model, mesh, plan)
    tokens, labels = batch()
    labels = DTensor.from_local(labels, mesh, [Replicate()])
    kind = type(model(tokens, labels)).__name__
    optimizer = optimizer_of(model)
    for _ in range(3):
        loss = optimizer.step(lambda: model(tokens, labels))
    return kind, float(loss), full(model)


def test_a_loss_may_be_a_dtensor(results):
    model = toy(torch.float64, Even)
    losses = train(model)
    for kind, loss, found in results["spread_losses"]:
        assert kind == "DTensor"
        assert loss == pytest.approx(losses[-1], rel=1e-10)
        close(found, full(model))


if __name__ == "__main__":
    run_cases()
