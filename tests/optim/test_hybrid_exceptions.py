"""What a step leaves behind when the closure, a hook or Ctrl-C ends it."""

import signal

import pytest
import torch
from toys import (
    CONFIGURATIONS,
    ULPS,
    Toy,
    assert_restored,
    draw,
    equal,
    evaluations,
    random_states,
    seed_everything,
)

from zofo_optim import HybridZOFO, evaluation
from zofo_optim.perturbation import in_place


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_an_exception_at_any_evaluation_restores_everything(mode, estimator, samples, dtype):
    options = {"estimator": estimator, "num_samples": samples, "momentum": 0.9, "mu": 1e-2}
    for k in range(1, evaluations(mode, estimator, samples) + 1):
        for error in (ValueError, KeyboardInterrupt, SystemExit):
            for call in ("step", "backward"):
                toy, drawn = Toy(dtype), []
                optimizer = toy.optimizer(mode, **options)
                before = toy.values()

                def closure(toy=toy, drawn=drawn, k=k, error=error):
                    drawn.append(draw())
                    loss = toy()
                    if toy.calls == k:
                        raise error("at evaluation", k)
                    draw()
                    return loss

                seed_everything(4)
                with pytest.raises(error, match=f"at evaluation.*{k}"):
                    getattr(optimizer, call)(closure)
                assert_restored(toy, before, mode)
                assert toy.calls == k
                assert len(set(drawn)) == 1
                after = random_states()
                seed_everything(4)
                draw()  # at the first evaluation the closure got no further than this
                if k > 1:
                    draw()
                assert after == random_states()
                assert len(optimizer.state) == 0
                assert all(group["zo_step"] == 0 for group in optimizer.param_groups)
                with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
                    optimizer.step()
        toy.calls = -99
        twin = Toy(dtype)
        optimizer.zero_grad()
        optimizer.step(closure)
        twin.optimizer(mode, **options).step(twin)
        atol = 1e-9 if dtype == torch.float64 else 1e-3  # the restored weight is an ulp off
        torch.testing.assert_close(toy.values(), twin.values(), rtol=0, atol=atol)
        assert not equal(toy.values(), before)


def test_an_exception_leaves_the_first_gradients():
    """As with any closure that fails after backward: the gradients are there, no step is."""
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    (expected,) = torch.autograd.grad(toy.loss(), [toy.y])

    def closure():
        loss = toy()
        if toy.calls == 3:
            raise ValueError("third")
        return loss

    with pytest.raises(ValueError, match="third"):
        optimizer.step(closure)
    assert torch.equal(toy.y.grad, expected)


def test_a_failing_first_order_step_restores_the_weights():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    optimizer.param_groups[1]["lr"] = "fast"
    before = toy.values()
    with pytest.raises(TypeError):
        optimizer.step(toy)
    assert_restored(toy, before, "hybrid")


def test_a_hook_that_raises_leaves_the_weights():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    before = toy.values()

    def hook(*_):
        raise KeyError("pre")

    optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyError, match="pre"):
        optimizer.step(toy)
    assert equal(toy.values(), before)
    assert toy.calls == 0


@pytest.mark.parametrize("call", ["step", "backward"])
def test_ctrl_c_while_weights_are_written_restores_all_groups(call, monkeypatch):
    """SIGINT is held back during a pass and raised after it, here in every pass of a step."""
    original, left = in_place.perturb_, []

    def interrupted(*args, **options):
        original(*args, **options)
        if left and left.pop() == "last":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(in_place, "perturb_", interrupted)
    hit = 0
    for k in range(1, 7):
        toy = Toy()
        before, left[:] = toy.values(), ["last", *range(k - 1)]
        optimizer = HybridZOFO([{"params": [toy.x]}, {"params": [toy.y]}], mode="zo", lr=1e-3)
        try:
            getattr(optimizer, call)(toy)
        except KeyboardInterrupt:
            hit += 1
            assert_restored(toy, before, "zo")
    # two groups, two moves; backward() also restores them, step() does that in its update
    assert hit == {"step": 4, "backward": 6}[call]


def test_ctrl_c_between_evaluations_leaves_a_usable_optimizer(monkeypatch):
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    restore = evaluation.GlobalRandomState.restore

    def interrupted(state):
        monkeypatch.setattr(evaluation.GlobalRandomState, "restore", restore)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.GlobalRandomState, "restore", interrupted)
    before = toy.values()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(toy)
    assert_restored(toy, before, "hybrid")
    optimizer.zero_grad()
    optimizer.step(toy)
    assert not equal(toy.values(), before)
