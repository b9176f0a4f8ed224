"""perturbation="streamed" where FSDP2 shards the weights: as in one process, to the bit."""

import functools

import pytest
import torch
import torch.nn.functional as F
from launch import case, launched, run_cases
from sharded import TORCH_26, least_growth, needs_fsdp_backward, needs_reset
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from zofo_optim import HybridZOFO, hybrid_param_groups

results = launched(__file__, 1, 2, 4)


class Block(nn.Module):
    """A layer, and an adapter of rank 2 beside it where it is asked for."""

    def __init__(self, width, hidden, adapter):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.adapter = nn.Sequential(nn.Linear(width, 2), nn.Linear(2, width)) if adapter else None

    def forward(self, x):
        y = self.norm(x)
        z = self.down(torch.tanh(self.up(y)))
        return x + z + (0 if self.adapter is None else self.adapter(y))


class Model(nn.Module):
    """Rows that no number of ranks divides, and parameters that the root itself gathers."""

    def __init__(self, adapter, width=6, hidden=(7,)):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([Block(width, size, adapter) for size in hidden])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def made(sharded, adapter=False, dtype=torch.float32, sizes=(), **options):
    """The same weights whatever the ranks, sharded by layers and the rest by the root."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Model(adapter, *sizes).to(dtype).requires_grad_(False)
    for block in model.blocks:
        if adapter:
            block.adapter.requires_grad_(True)
        if sharded:
            fully_shard(block, **options)
    return fully_shard(model, **options) if sharded else model


def losses_of(model, x):
    logits = model(x).flatten(0, 1).double()
    return F.cross_entropy(logits, x.roll(-1, 1).flatten(), reduction="none").view(x.shape).mean(1)


def optimizer_of(model, *, mu=1e-2, lr=0.03, fo=None, **options):
    directions = options.get("directions", "shared")
    zo = dict(lr=lr, mu=mu, weight_decay=0.1)
    groups = hybrid_param_groups(model, zo=zo, fo=fo, directions=directions, verbose=False)
    return HybridZOFO(groups, **{"perturbation": "streamed", "seed": 7, **options})


def tokens(rows=4):
    return torch.randint(11, (rows, 5), generator=torch.Generator().manual_seed(1))


def trained(model, x, *, steps=2, weighted=False, **options):
    """The losses of some steps, and the weights then, whole."""
    if any(p.requires_grad for p in model.parameters()):
        options["fo"] = dict(lr=0.1, momentum=0.9)
    optimizer, losses = optimizer_of(model, **options), []

    def closure():
        losses = losses_of(model, x)
        return losses if options.get("directions") == "per_example" else losses.mean()

    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(optimizer.step(closure, weight=len(x) if weighted else None).detach())
    return torch.stack([loss.mean() for loss in losses]), whole(model), optimizer.last_loss


def reshard(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(model):
    reshard(model)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def assert_same(found, expected, near=None):
    pairs = [(found[0], expected[0]), *((found[1][n], w) for n, w in expected[1].items())]
    for one, other in pairs:
        if near is None:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=near, atol=near)


# ---- all processes have one batch -------------------------------------------------------------

LOW_RANK = dict(structure="low_rank")
PER_EXAMPLE = dict(LOW_RANK, directions="per_example")
RUNS = {
    "full": dict(),
    "several": dict(estimator="one_sided", num_samples=2),
    "active": dict(distribution="rademacher", active=0.5),
    "low_rank": dict(LOW_RANK, rank=2),
    "hybrid": dict(adapter=True, estimator="one_sided"),
    "coupled": dict(adapter=True, coupling=0.5),
    "coupled_low_rank": dict(LOW_RANK, adapter=True, coupling=0.5),
}
SOME = ("full", "low_rank", "hybrid")


def possible(runs):
    """Names of those that this torch can make, of runs with or without an adapter."""
    return [name for name in runs if not (TORCH_26 and is_hybrid(name))]


def is_hybrid(name):
    return "hybrid" in name or "coupled" in name


def marked(runs):
    return [pytest.param(r, marks=[needs_fsdp_backward] * is_hybrid(r)) for r in runs]


@functools.cache
def runs_here():
    return {name: one_run(False, **options) for name, options in RUNS.items()}


def one_run(sharded, adapter=False, **options):
    return trained(made(sharded, adapter), tokens(), **options)


@case
def runs(rank, size):
    names = RUNS if size == 2 else SOME  # all are for two
    return {name: one_run(True, **RUNS[name]) for name in possible(names)}


@pytest.mark.parametrize("run", marked(RUNS))
def test_steps_are_those_of_one_process(results, run):
    if results.size != 2 and run not in SOME:
        pytest.skip("for two ranks")
    for of_rank in results["runs"]:
        assert_same(of_rank[run], runs_here()[run])


# ---- each process has its own -----------------------------------------------------------------

OWN = {
    "own": (4, dict()),
    "own_samples": (None, dict(estimator="one_sided", num_samples=4, parallel="samples")),
    "own_hybrid": (5, dict(LOW_RANK, adapter=True)),
    "own_examples": (6, PER_EXAMPLE),
    "own_examples_hybrid": (5, dict(PER_EXAMPLE, adapter=True, estimator="one_sided")),
}


def own_run(rank, size, sharded, rows, options):
    """Examples are dealt by turns, some ranks may have one less; or all have all of them."""
    options = dict(options)
    adapter = options.pop("adapter", False)
    x = tokens(rows or 4)
    if rows:
        x = x[rank::size]
    return trained(made(sharded, adapter, torch.float64), x, weighted=bool(rows), **options)


@case
def own_batches(rank, size):
    return {name: own_run(rank, size, True, *OWN[name]) for name in possible(OWN)}


@functools.cache
def own_here():
    return {
        name: own_run(0, 1, False, rows, {**options, "parallel": "data"})
        for name, (rows, options) in OWN.items()
    }


@pytest.mark.parametrize("run", marked(OWN))
def test_batches_of_their_own_are_parts_of_one(results, run):
    for of_rank in results["own_batches"]:
        (_, found, _), (_, expected, _) = of_rank[run], own_here()[run]
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-9)


# ---- what FSDP2 can be told -------------------------------------------------------------------

OTHERWISE = {
    "kept_gathered": dict(reshard_after_forward=False),
    "by_columns": dict(shard_placement_fn=lambda p: Shard(int(p.dim() == 2 and p.shape[1] == 6))),
    "offloaded": dict(offload_policy=CPUOffloadPolicy(pin_memory=False)),
}


@case
def otherwise(rank, size):
    if size == 2:
        return {
            name: trained(made(True, **options), tokens(), **LOW_RANK)
            for name, options in OTHERWISE.items()
        }


@pytest.mark.parametrize("way", OTHERWISE)
def test_however_fsdp2_shards(results, way):
    if results.size != 2:
        pytest.skip("for two ranks")
    expected = trained(made(False), tokens(), **LOW_RANK)
    for of_rank in results["otherwise"]:
        assert_same(of_rank[way], expected)


@case
def weights_anew(rank, size):
    """FSDP2 gives shards that were set other memory, when it first gathers them."""
    weights, model = made(False).state_dict(), made(True)
    new = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p not in new:
            shard = distribute_tensor(weights[name], p.device_mesh, p.placements)
            new[p] = nn.Parameter(shard, requires_grad=False)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, new[p])
    return trained(model, tokens())


def test_weights_that_were_set_after_sharding(results):
    for of_rank in results["weights_anew"]:
        assert_same(of_rank, runs_here()["full"])


@case
def several_meshes(rank, size):
    """Shards in pairs of ranks, and copies of these; whole layers stay with pairs."""
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model, other = made(True, mesh=mesh), made(True, sizes=(8, (8,)), reshard_after_forward=2)
        return trained(model, tokens()), trained(other, tokens())


def test_shards_in_pairs(results):
    if results.size != 4:
        pytest.skip("for four ranks")
    expected = trained(made(False, sizes=(8, (8,))), tokens())
    for pairs, other in results["several_meshes"]:
        assert_same(pairs, runs_here()["full"])
        assert_same(other, expected)


@case
def mixed_precision(rank, size):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    found = []
    for run in (dict(), LOW_RANK, PER_EXAMPLE):
        x = tokens()[rank::size] if run is PER_EXAMPLE else tokens()
        found.append(trained(made(True, mp_policy=policy), x, mu=0.1, **run)[0])
    return found


def test_16_bit_copies_are_of_what_is_computed_with(results):
    runs = (dict(), LOW_RANK, PER_EXAMPLE)
    here = [trained(made(False, dtype=torch.bfloat16), tokens(), mu=0.1, **run)[0] for run in runs]
    for of_rank in results["mixed_precision"]:
        for losses, expected in zip(of_rank, here, strict=True):
            # later ones are at weights that were not rounded
            torch.testing.assert_close(losses[0], expected[0], rtol=1e-9, atol=0.0)


# ---- what is gathered, and when ---------------------------------------------------------------


@case
def parameters_that_take_turns(rank, size):
    model, gathered = made(True), []
    optimizer = optimizer_of(model, active=0.5)

    def closure():
        return losses_of(model, tokens()).mean()

    for _ in range(3):
        optimizer.step(closure)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_pre_hook(lambda *_: gathered.append("forward"))
            unshard = module.unshard
            module.unshard = lambda unshard=unshard: [gathered.append("else"), unshard()]
    optimizer.step(closure)
    return gathered


def test_no_step_gathers_weights_to_look_for_them(results):
    for gathered in results["parameters_that_take_turns"]:
        assert gathered == ["forward"] * 4  # of the root and a block, at two points


@case
def memory(rank, size):
    """Beside that of a forward pass, in units of the largest weight; and of all weights."""
    if size != 2:
        return None
    sizes, found = (64, (256,) * 4), {}
    for name, options in dict(full={}, low_rank=LOW_RANK, per_example=PER_EXAMPLE).items():
        model, x = made(True, sizes=sizes), tokens()
        optimizer = optimizer_of(model, **options)

        def closure(model=model, x=x, options=options):
            return losses_of(model, x) if options is PER_EXAMPLE else losses_of(model, x).mean()

        def forward(model=model, closure=closure):
            with torch.no_grad():
                closure()
            reshard(model)

        optimizer.step(closure)  # which also verifies
        forward()
        step = least_growth(lambda optimizer=optimizer, closure=closure: optimizer.step(closure))
        more = step - least_growth(forward)
        largest = model.blocks[0].up.weight.numel() * 4
        found[name] = more / largest, sum(p.numel() for p in model.parameters()) * 4 / largest
    return found


def test_memory_is_that_of_a_forward_pass_and_one_copy(results):
    if results.size != 2:
        pytest.skip("for two ranks")
    for of_rank in results["memory"]:
        for more, whole_model in of_rank.values():
            assert more <= 1.1
            assert whole_model > 8


# ---- what cannot be done ----------------------------------------------------------------------


def said(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@case
def unknown_model(rank, size):
    model = made(True)
    group = dict(params=list(model.parameters()), mode="zo", lr=0.1)
    optimizer = HybridZOFO([group], perturbation="streamed")
    return said(lambda: optimizer.step(lambda: losses_of(model, tokens()).mean()))


def test_a_model_that_is_not_known_is_refused(results):
    for message in results["unknown_model"]:
        assert message.startswith("ValueError: params must be what hybrid_param_groups(model)")


@case
def read_by_the_last_rank(rank, size):
    """It reads a weight in a way that torch functions do not see; all raise, and then go on."""
    found = []
    for options in (dict(), LOW_RANK):
        model = made(True)
        optimizer, before = optimizer_of(model, **options), whole(model)

        def closure(model=model, hidden=True):
            loss = losses_of(model, tokens()).mean()
            if hidden and rank == size - 1:
                with torch._C.DisableTorchFunction():
                    loss = loss + model.norm.weight.square().sum()
            return loss

        message = said(lambda: optimizer.step(closure))  # noqa: B023
        same = all(torch.equal(before[n], w) for n, w in whole(model).items())
        found.append((message, same, float(optimizer.step(lambda: closure(hidden=False)))))
    return found


def test_what_one_process_does_wrong_is_raised_in_all(results):
    here = [optimizer_and_loss(**options) for options in (dict(), LOW_RANK)]
    for of_rank in results["read_by_the_last_rank"]:
        for (message, same, loss), expected in zip(of_rank, here, strict=True):
            assert message.startswith("RuntimeError: closure must use zeroth-order parameters")
            assert "norm.weight" in message
            assert "blocks" not in message
            assert same
            assert loss == expected


def optimizer_and_loss(**options):
    model = made(False)
    return float(optimizer_of(model, **options).step(lambda: losses_of(model, tokens()).mean()))


@case
def raises_in_a_layer(rank, size):
    """Each evaluation of the first step in turn fails half-way: nothing stays of it."""
    found = []
    for fails in range(5 if size == 2 else 1):
        model, calls = made(True), iter(range(100))
        optimizer = optimizer_of(model)

        def closure(model=model):
            return losses_of(model, tokens()).mean()

        def hook(*_, calls=calls, fails=fails):
            if next(calls) == fails:
                raise ArithmeticError

        model.blocks[0].up.register_forward_hook(hook)
        message = said(lambda: optimizer.step(closure))  # noqa: B023
        found.append((message, [float(optimizer.step(closure)) for _ in range(2)]))
    return found


@needs_reset
def test_a_step_that_failed_changes_no_later_one(results):
    expected, _, _ = trained(made(False), tokens())
    for of_rank in results["raises_in_a_layer"]:
        for message, losses in of_rank:
            assert message.startswith("ArithmeticError")
            assert losses == expected.tolist()


if __name__ == "__main__":
    run_cases()
