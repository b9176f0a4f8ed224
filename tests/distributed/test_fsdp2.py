"""Zeroth order in place on shards of FSDP2: the same weights as one process finds."""

import pytest
import torch
from launch import case, launched, run_cases
from sharded import (
    TORCH_26,
    VARIANTS,
    Toy,
    batch,
    close,
    evaluated,
    every_variant,
    fsdp,
    full,
    least_growth,
    needs_fsdp_backward,
    optimizer_of,
    replayed,
    same,
    toy,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
)
from torch.utils.checkpoint import checkpoint

from zofo_optim import HybridZOFO

results = launched(__file__, 2, forked=False)


# ---- bits -------------------------------------------------------------------------------------


PAIRS = [
    *((variant, torch.float32) for variant in VARIANTS),
    *((variant, torch.bfloat16) for variant in VARIANTS),
    ("full", torch.float64),
    ("low rank", torch.float64),
]


@case
def replays(rank, size):
    return every_variant(fsdp, PAIRS)


@pytest.mark.parametrize(("variant", "dtype"), PAIRS)
def test_given_coefficients_give_the_bits_of_one_process(results, variant, dtype):
    expected = replayed(toy(dtype), **VARIANTS[variant])
    assert any(not torch.equal(p, expected[n]) for n, p in toy(dtype).named_parameters())
    for found in results["replays"]:
        same(found[variant, dtype], expected)


# ---- whole runs -------------------------------------------------------------------------------


def part_of_batch(rank, size):
    return tuple(t.chunk(size)[rank] for t in batch())


@case
def whole_runs(rank, size):
    """Each rank has its part of the batch, root and layers gathered as torch's defaults say."""
    found = {}
    for after in (None, True, False):
        # torch 2.6 takes no None, which is the default of others
        chosen = {} if after is None else dict(reshard_after_forward=after)
        model = fsdp(toy(torch.float64), **chosen)
        optimizer = optimizer_of(model, num_samples=2)
        inputs = part_of_batch(rank, size)
        losses = [float(optimizer.step(lambda: model(*inputs))) for _ in range(4)]  # noqa: B023
        found[after] = losses, full(model)
    return found


@pytest.mark.parametrize("after", [None, True, False])
def test_a_batch_spread_over_ranks_trains_as_in_one_process(results, after):
    model = toy(torch.float64)
    losses = train(model, 4, num_samples=2)
    for found in results["whole_runs"]:
        assert found[after][0] == pytest.approx(losses, rel=1e-12)
        close(found[after][1], full(model))


class Casting(nn.Module):
    """The arithmetic of ``param_dtype=torch.bfloat16`` by one process."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        cast = {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, cast, inputs)


@case
def policies(rank, size):
    found = {}
    for name, policy in {
        "mixed": dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        "offloaded": dict(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    }.items():
        model = fsdp(toy(), **policy)
        found[name] = train(model), full(model)
    return found


@pytest.mark.parametrize("policy", ["mixed", "offloaded"])
def test_policies_of_fsdp_train_as_in_one_process(results, policy):
    model = toy()
    losses = train(Casting(model) if policy == "mixed" else model)
    for found in results["policies"]:
        assert found[policy][0] == losses
        same(found[policy][1], full(model))


def prefetching(model):
    fsdp(model)
    model.set_modules_to_forward_prefetch([model.layers[0]])
    model.layers[0].set_modules_to_forward_prefetch([model.layers[1]])
    return model


def compiled(model):
    for layer in model.layers:
        layer.compile(backend="eager")
    return fsdp(model)


def deferred(model):
    """Made on the meta device, sharded, then loaded."""
    with torch.device("meta"):
        empty = Toy().to(model.norm.weight.dtype).requires_grad_(False)
    fsdp(empty).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(empty, model.state_dict(), options=options)
    return empty


WAYS = {"prefetching": prefetching, "compiled": compiled, "deferred": deferred}


@case
def ways(rank, size):
    found = {}
    for name, way in WAYS.items():
        model = way(toy())
        found[name] = train(model), full(model)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_make_and_run_a_model_train_as_one_process(results, way):
    model = toy()
    losses = train(model)
    for found in results["ways"]:
        assert found[way][0] == losses
        same(found[way][1], full(model))


@case
def moved_memory(rank, size):
    """Shards of one process alone get other memory, as torch 2.6 gives them in the first step."""
    model = prefetching(toy())
    optimizer = optimizer_of(model)
    losses = train(model, 1, optimizer=optimizer)
    if rank == 1:
        model.layers[0]._apply(torch.clone)
    return losses + train(model, 2, optimizer=optimizer)


def test_processes_gather_alike_where_one_has_other_memory(results):
    for found in results["moved_memory"]:
        assert found == train(toy(), 3)


# ---- with a first-order part ------------------------------------------------------------------

case_of_backward = (lambda function: function) if TORCH_26 else case  # what fails aborts others


class Adapted(Toy):
    """Trains its head and the layers' first matrices by first order."""


def adapted(dtype=torch.float64, kind=Adapted):
    model = toy(dtype, kind)
    model.head.requires_grad_(True)
    for layer in model.layers:
        layer.up.requires_grad_(True)
    return model


FIRST_ORDER = {
    "SGD": dict(momentum=0.9),
    "AdamW": dict(fo_optimizer=torch.optim.AdamW),
    "one-sided": dict(estimator="one_sided", momentum=0.9),
    "coupling": dict(coupling=0.5),
}


def hybrid_run(model, inputs, **settings):
    zo, fo = dict(lr=1e-2, mu=1e-2), dict(lr=1e-2)
    optimizer = optimizer_of(model, zo, fo, **settings)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(lambda: model(*inputs))
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
        optimizer.step()
    return full(model)


@case_of_backward
def hybrids(rank, size):
    return {
        name: hybrid_run(fsdp(adapted()), part_of_batch(rank, size), **settings)
        for name, settings in FIRST_ORDER.items()
    }


@needs_fsdp_backward
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_hybrid_training_clips_and_steps_as_in_one_process(results, name):
    expected = hybrid_run(adapted(), batch(), **FIRST_ORDER[name])
    for found in results["hybrids"]:
        close(found[name], expected, 1e-9)


class Checkpointed(Adapted):
    """Its layers run again in the backward, where they are gathered already."""

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return nn.functional.cross_entropy(self.head(self.norm(x)).mean(1), labels)


def accumulated(model, inputs):
    """Two halves of a step's loss, of which FSDP2 sends the gradients once."""
    optimizer = optimizer_of(model, dict(lr=1e-2, mu=1e-2), dict(lr=1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        for last in (False, True):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            optimizer.backward(lambda: model(*inputs) / 2)
        optimizer.step()
    return full(model)


@case_of_backward
def backwards(rank, size):
    """Several passes before a backward, and layers that run again in it."""
    inputs = part_of_batch(rank, size)
    found = {"accumulated": accumulated(fsdp(adapted()), inputs)}
    for after in (None, False):
        model = fsdp(adapted(kind=Checkpointed), reshard_after_forward=after)
        found["checkpointed", after] = hybrid_run(model, inputs, coupling=0.5)
    return found


@needs_fsdp_backward
def test_accumulated_gradients_are_those_of_one_process(results):
    expected = accumulated(adapted(), batch())
    for found in results["backwards"]:
        close(found["accumulated"], expected, 1e-9)


@needs_fsdp_backward
@pytest.mark.parametrize("after", [None, False])
def test_checkpointed_layers_run_again_as_in_one_process(results, after):
    expected = hybrid_run(adapted(kind=Checkpointed), batch(), coupling=0.5)
    for found in results["backwards"]:
        close(found["checkpointed", after], expected, 1e-9)


def with_gradients(model, inputs):
    """Zeroth-order parameters that require gradients, by hand."""
    model.requires_grad_(True)
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if not any(p is h for h in head)]
    optimizer = HybridZOFO(
        [
            dict(params=rest, mode="zo", lr=1e-2, mu=1e-2),
            dict(params=head, mode="fo", lr=1e-2),
        ],
        seed=3,
        restore_buffers=model,
    )
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(lambda: model(*inputs))
    return full(model), sum(p.grad is not None for p in rest), all(p.requires_grad for p in rest)


@case_of_backward
def requiring(rank, size):
    return with_gradients(fsdp(toy(torch.float64)), part_of_batch(rank, size))


@needs_fsdp_backward
def test_parameters_that_require_gradients_get_none_from_fsdp(results):
    expected, none, kept = with_gradients(toy(torch.float64), batch())
    assert (none, kept) == (0, True)
    for found, gradients, still in results["requiring"]:
        close(found, expected, 1e-9)
        assert (gradients, still) == (0, True)


# ---- memory -----------------------------------------------------------------------------------

DEPTH = 8


class Deep(Toy):
    """Layers of one size, which hold nearly all weights."""

    WIDTH, HIDDEN = 256, (256,) * DEPTH


@case
def memory(rank, size):
    """Bytes of the shards, and the most that a forward pass and a step take beside them."""
    model = fsdp(toy(kind=Deep))
    optimizer = optimizer_of(model, structure="low_rank", num_samples=2)

    def step():
        optimizer.step(lambda: model(*batch()))

    def forward():
        evaluated(model)
        model.reshard()

    step()  # which also verifies
    shards = sum(p.to_local().nbytes for p in model.parameters())
    return shards, least_growth(forward), least_growth(step)


def test_a_step_takes_the_memory_of_the_shards_and_of_a_layer(results):
    model = toy(kind=Deep)
    whole = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    for shards, forward, step in results["memory"]:
        assert shards < whole / results.size + 0.1 * layer
        # the layer, and two buffers of its size by which torch gathers this one and the last
        assert layer < forward < 3.2 * layer
        assert step < forward + 0.1 * layer


if __name__ == "__main__":
    run_cases()
