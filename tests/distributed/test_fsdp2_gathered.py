"""What FSDP2 has gathered of the weights is never older than the shards, and does no harm."""

import contextlib
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import case, launched, run_cases
from sharded import (
    Toy,
    batch,
    close,
    evaluated,
    fsdp,
    full,
    needs_reset,
    optimizer_of,
    same,
    toy,
    train,
)
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)

from zofo_optim import HybridZOFO, load_base_weights, save_base_weights, save_hybrid

results = launched(__file__, 2)


# ---- the trap of the root ---------------------------------------------------------------------


class Outer(nn.Module):
    """The root holds all that its layers do not, and is not what the groups were made of."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)


def of_hand(model, **settings):
    """An optimizer of groups that were made by hand."""
    group = dict(params=list(model.parameters()), mode="zo", lr=1e-2, mu=1e-2)
    return HybridZOFO([group], **{"seed": 3, "restore_buffers": model, **settings})


def with_method(model):
    """A forward pass by another method than ``forward``."""
    model.loss = lambda *inputs: type(model).forward(model, *inputs)
    register_fsdp_forward_method(model, "loss")
    return model


@case
def traps(rank, size):
    """Losses of evaluations before, between and after steps; and the weights."""
    found = {}

    def run(name, model, optimizer, call=None):
        call = call or model
        losses = [evaluated(call)]
        for _ in range(3):
            losses.append(float(optimizer.step(lambda: call(*batch()).double())))
            losses.append(evaluated(call))
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        found[name] = losses, full(getattr(model, "model", model))

    model = fsdp(toy())
    run("groups by hand", model, of_hand(model))
    model = fsdp(toy())
    evaluated(model)  # the root stays gathered
    run("groups made late", model, optimizer_of(model))
    model = toy()
    fully_shard(model.layers[0])
    outer = fully_shard(Outer(model))
    run("another root", outer, optimizer_of(model))
    model = with_method(fsdp(toy()))
    run("another method", model, optimizer_of(model), model.loss)
    model = fsdp(toy(), reshard_after_forward=False)
    run("nothing resharded", model, of_hand(model))
    return found


@pytest.mark.parametrize(
    "trap",
    ["groups by hand", "groups made late", "another root", "another method", "nothing resharded"],
)
def test_what_is_gathered_is_never_older_than_the_shards(results, trap):
    model = toy()
    optimizer = optimizer_of(model)
    expected = [evaluated(model)]
    for _ in range(3):
        expected.append(float(optimizer.step(lambda: model(*batch()).double())))
        expected.append(evaluated(model))
    assert len(set(expected)) == 7
    for found in results["traps"]:
        losses, weights = found[trap]
        assert losses == expected
        same(weights, full(model))


def message_of(function):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


@case
def refusals(rank, size):
    found = {}
    model = fsdp(toy())
    evaluated(model)
    optimizer = of_hand(model)  # with what the root has gathered
    found["gathered"] = message_of(lambda: train(model, optimizer=optimizer))

    model = fsdp(toy())
    evaluated(model)
    optimizer = of_hand(model)
    model.reshard()
    found["freed"] = message_of(lambda: train(model, optimizer=optimizer))

    model = with_method(fsdp(toy()))
    before = full(model)
    optimizer = of_hand(model, restore_buffers=True)
    found["unknown"] = message_of(lambda: optimizer.step(lambda: model.loss(*batch())))

    outer = with_method(fully_shard(Outer(toy())))
    optimizer = optimizer_of(outer.model)
    found["outside"] = message_of(lambda: optimizer.step(lambda: outer.loss(*batch())))
    outer.reshard()
    found["weights"] = before, full(model), full(outer.model)
    return found


def test_what_was_gathered_is_no_parameter_of_zeroth_order(results):
    for found in results["refusals"]:
        assert "must be a shard of FSDP2" in found["gathered"]
        assert "hybrid_param_groups(model)" in found["gathered"]
        assert "must hold data" in found["freed"]


def test_modules_that_gather_unseen_are_refused(results):
    """No hook of a module sees passes by other methods: losses would be of older weights."""
    for found in results["refusals"]:
        assert found["unknown"].startswith(
            "params must be what hybrid_param_groups(model) returned"
        )
        assert "restore_buffers=model" in found["unknown"]
        assert found["outside"].startswith("hybrid_param_groups must be given the model that")
        before, *after = found["weights"]
        for weights in after:
            close(weights, before, 1e-6)  # in place, moves round


class Skipping(Toy):
    """Calls its last layer in each second pass."""

    passes = 0

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for layer in self.layers[: 1 + self.passes % 2]:
            x = layer(x)
        self.passes += 1
        return nn.functional.cross_entropy(self.head(self.norm(x)).mean(1), labels)


def skipping(model):
    """Slopes between a pass without the last layer, and one with it."""
    optimizer = optimizer_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of losses that differ at one point
        train(model, 1, optimizer=optimizer)
    model.passes = 0
    optimizer.backward(lambda: model(*batch()))
    return optimizer.projected_grads


def halved(model):
    """Weights are written between steps, while what FSDP2 has gathered of the root is there."""
    optimizer = optimizer_of(model, estimator="one_sided")
    train(model, 1, optimizer=optimizer)
    evaluated(model)
    with torch.no_grad():
        for p in optimizer.zo_groups()[0].placed.locals:
            p.mul_(0.5)
    train(model, 1, optimizer=optimizer)
    return optimizer.last_loss


@case
def ahead(rank, size):
    """Layers that are gathered before a point, and used at it."""
    model = fsdp(toy(torch.float64, Skipping))
    model.layers[0].set_modules_to_forward_prefetch([model.layers[1]])
    slopes = skipping(model)

    model = fsdp(toy(torch.float64))
    optimizer = optimizer_of(model)
    losses = train(model, 1, optimizer=optimizer)
    handle = model.layers[0].unshard(async_op=True)
    losses += train(model, 1, optimizer=optimizer)
    handle.wait()
    return slopes, losses, halved(fsdp(toy(torch.float64)))


def test_what_was_gathered_ahead_is_not_used(results):
    losses = train(toy(torch.float64), 2)
    slopes, loss = skipping(toy(torch.float64, Skipping)), halved(toy(torch.float64))
    for found_slopes, found_losses, found_loss in results["ahead"]:
        assert torch.equal(found_slopes, slopes)
        assert found_losses == losses
        assert torch.equal(found_loss, loss)


@case
def remembered(rank, size):
    """How many forward passes FSDP2 remembers for a backward, after steps that have none."""
    model = fsdp(toy())
    train(model)
    states = [module._get_fsdp_state() for module in (model, *model.layers)]
    orders = [state._comm_ctx.post_forward_order for state in states]
    indices = [state._fsdp_param_group._post_forward_indices for state in states]
    return [len(kept) for kept in (*orders, *indices)]


def test_forward_passes_without_a_backward_are_forgotten(results):
    for found in results["remembered"]:
        assert found == [0] * 6


@case
def loaded(rank, size):
    """Shards in other memory than FSDP2 made, which it copies in its first forward pass."""
    model = fsdp(toy())
    for p in model.parameters():
        p._local_tensor = p.to_local().clone()
    optimizer = optimizer_of(model)
    before = [p.to_local() for p in model.parameters()]
    losses = train(model, optimizer=optimizer)
    now = [p.to_local() for p in model.parameters()]
    moved = sum(p.data_ptr() != q.data_ptr() for p, q in zip(before, now, strict=True))
    return moved, losses, full(model)


@case
def loaded_and_written(rank, size):
    """A closure writes to a shard before FSDP2 copies it."""
    model = fsdp(toy())
    for p in model.parameters():
        p._local_tensor = p.to_local().clone()

    def closure():
        model.head.weight._local_tensor.mul_(1.0)
        return model(*batch())

    return message_of(lambda: optimizer_of(model).step(closure))


def test_writes_to_shards_that_fsdp_copies_are_seen(results):
    for message in results["loaded_and_written"]:
        assert "must not write to the zeroth-order parameter 'head.weight': the" in message


def test_shards_that_fsdp_copies_in_its_first_pass_train_as_others(results):
    model = toy()
    expected = train(model)
    for _, losses, weights in results["loaded"]:
        assert losses == expected
        same(weights, full(model))
    assert sum(moved for moved, _, _ in results["loaded"]) > 0  # of uneven ones


@case
def failures(rank, size):
    """A forward pass raises in the midst; the next step is as if it had not been."""
    model = fsdp(toy(), reshard_after_forward=False)
    optimizer = optimizer_of(model)
    train(model, 1, optimizer=optimizer)
    before = full(model)
    calls = []

    def raising(*args):
        calls.append(1)
        if len(calls) == 2:  # at the second point, when the weights are displaced
            raise KeyError("broken")

    hook = model.norm.register_forward_pre_hook(raising)
    with contextlib.suppress(KeyError):
        train(model, 1, optimizer=optimizer)
    hook.remove()
    restored = full(model)
    return before, restored, train(model, 2, optimizer=optimizer), full(model)


@needs_reset
def test_a_forward_pass_that_raises_leaves_all_as_it_was(results):
    model = toy()
    losses = train(model, 3)
    for before, restored, found, weights in results["failures"]:
        close(restored, before, 1e-6)  # in place, moves round
        assert found == pytest.approx(losses[1:], rel=1e-5)
        close(weights, full(model), 1e-5)


@case
def without_a_way_out(rank, size):
    """The same where torch cannot leave a pass; and where the closure raises after it."""
    model = fsdp(toy(torch.float64))
    optimizer = optimizer_of(model)
    losses = train(model, 1, optimizer=optimizer)
    reset = FSDPModule.__dict__.get("reset_iter_state")
    if reset is not None:
        del FSDPModule.reset_iter_state
    try:
        after = message_of(lambda: optimizer.step(lambda: broken(model(*batch()))))
        losses += train(model, 1, optimizer=optimizer)
        hook = model.norm.register_forward_pre_hook(broken)
        within = message_of(lambda: train(model, 1, optimizer=optimizer))
        hook.remove()
        refused = message_of(lambda: train(model, 1, optimizer=optimizer))
    finally:
        if reset is not None:
            FSDPModule.reset_iter_state = reset
    return losses, (after, within, refused)


def broken(*args):
    raise ValueError("broken")


def test_a_pass_that_torch_cannot_leave_is_the_last(results):
    expected = train(toy(torch.float64), 2)
    for losses, (after, within, refused) in results["without_a_way_out"]:
        assert losses == pytest.approx(expected, rel=1e-12)
        assert after == within == "broken"
        assert refused.startswith("closure must not raise within a forward pass of FSDP2")


# ---- what is read and written beside steps ----------------------------------------------------


@case
def reports(rank, size):
    """Of one rank alone: no other takes part."""
    model = fsdp(toy())
    optimizer = optimizer_of(model)
    train(model, 2, optimizer=optimizer)
    return optimizer.report() if rank == 0 else ""


def size_of_update(report):
    return float(re.search(r"update (\S+) of the weights' norm", report)[1])


def test_a_report_needs_no_other_rank(results):
    model = toy()
    optimizer = optimizer_of(model)
    train(model, 2, optimizer=optimizer)
    report, _ = results["reports"]
    assert "step 2" in report
    # of the shards here: an estimate of the whole's
    assert size_of_update(report) == pytest.approx(size_of_update(optimizer.report()), rel=0.5)


@case
def saves(rank, size):
    """Of the base weights, to a file that a plain model loads, and another sharded one."""
    with shared_folder() as folder:
        model = fsdp(toy())
        optimizer = optimizer_of(model)
        train(model, 2, optimizer=optimizer)
        evaluated(model)  # the root is gathered
        path = save_base_weights(optimizer, model, folder)
        dist.barrier()
        plain, sharded = toy(), fsdp(toy(), reshard_after_forward=False)
        evaluated(sharded)
        load_base_weights(plain, folder)
        load_base_weights(sharded, folder)
        loss = evaluated(sharded)
        refused = message_of(lambda: save_hybrid(model, optimizer, folder))
        unwritable = Path(folder, "file")
        unwritable.touch()
        dist.barrier()
        with contextlib.suppress(OSError):
            refused += message_of(lambda: save_base_weights(optimizer, model, unwritable))
        optimizer.zero_grad()
        model.reshard()
        return path.name, full(model), full(plain), loss, evaluated(plain), refused


@contextlib.contextmanager
def shared_folder():
    """One of all ranks."""
    with tempfile.TemporaryDirectory() as own:
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, own)
        yield names[0]
        dist.barrier()


def test_base_weights_are_saved_whole_and_loaded_into_shards(results):
    for name, trained, plain, loss, expected, _ in results["saves"]:
        assert name == "zo_weights.safetensors"
        same(plain, trained)
        assert loss == expected
        assert not torch.equal(plain["norm.weight"], toy().norm.weight)


def test_what_cannot_be_saved_of_shards_is_said(results):
    for *_, refused in results["saves"]:
        assert "torch.distributed.checkpoint" in refused
    *_, refused = results["saves"][1]
    assert "that the first process can write to" in refused


if __name__ == "__main__":
    run_cases()
