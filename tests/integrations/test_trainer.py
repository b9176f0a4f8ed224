"""transformers' Trainer with HybridZOFO: steps, logs, and what the loop may do to them."""

import re

import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import (  # noqa: E402
    DATA,
    arguments,
    base_model,
    lora,
)
from torch import nn  # noqa: E402
from trained_llama import (  # noqa: E402
    assert_equal,
    assert_moved,
    batches,
    contents,
    logged,
    trainer,
)

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    hybrid_param_groups,
)
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_as_a_plain_loop(accumulate, tmp_path):
    """The same batches, losses and clipping in a loop of our own: the same bits."""
    options = dict(gradient_accumulation_steps=accumulate, max_grad_norm=0.5, max_steps=3)
    done = trainer(tmp_path, options=options)
    done.train()
    model = lora().train()
    optimizer = HybridZOFO(
        hybrid_param_groups(model, zo=dict(lr=1e-3, mu=1e-3), verbose=False), lr=0.1, seed=1
    )
    data = batches(trainer(tmp_path, options=options))
    for step in range(3):
        for batch in data[step * accumulate : (step + 1) * accumulate]:
            optimizer.backward(lambda batch=batch: model(**batch).loss / accumulate)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(contents(done.model), contents(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert_moved(model, contents(lora()))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_log_and_report_are_of_the_whole_batch(accumulate, tmp_path):
    """However it is divided: the Trainer divides each micro-batch's loss by their number."""
    size = dict(gradient_accumulation_steps=accumulate, per_device_train_batch_size=4 // accumulate)
    done = trainer(tmp_path, options=dict(**size, max_steps=2))
    done.train()
    whole = trainer(tmp_path, options=dict(per_device_train_batch_size=4, max_steps=2))
    whole.train()
    for key in ("loss", "projected_grad"):
        assert logged(done, key) == pytest.approx(logged(whole, key), rel=1e-2)
    said = re.search(r"loss (\S+), slope (\S+),", done.hybrid_optimizer.report())
    assert float(said[1]) == pytest.approx(logged(done, "loss")[-1], abs=2e-4)
    assert float(said[2]) == pytest.approx(logged(done, "projected_grad")[-1], rel=1e-2)


def test_without_frozen_weights_it_is_the_trainer(tmp_path):
    theirs = transformers.Trainer(base_model(), arguments(tmp_path), train_dataset=DATA)
    theirs.train()
    ours = trainer(tmp_path, base_model(), zo=None)
    ours.train()
    assert_equal(ours.model, theirs.model)
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert logged(ours, "grad_norm") == logged(theirs, "grad_norm")


def test_zeroth_order_alone(tmp_path):
    model = base_model().requires_grad_(False)
    before = contents(model)
    done = trainer(tmp_path, model)
    done.train()
    assert all(p.grad is None for p in model.parameters())
    assert not any(same_bits(a, b) for a, b in zip(before, contents(model), strict=True))
    assert len(logged(done, "projected_grad")) == 4


def test_schedulers_drive_both_groups(tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    done = trainer(tmp_path, options=dict(lr_scheduler_type="linear"), callbacks=[Watch()])
    done.train()
    for step, rates in enumerate(seen):
        assert rates == pytest.approx([0.1 * (1 - step / 4), 1e-3 * (1 - step / 4)])
    assert len(seen) == 4


def test_logs(tmp_path):
    done = trainer(tmp_path)
    done.train()
    assert all(value > 0 for value in logged(done, "projected_grad"))
    assert logged(done, "skipped_steps") == [0] * 4


def test_bf16(tmp_path):
    """Autocast keeps no 16-bit copies of weights from before they moved."""
    done = trainer(tmp_path, options=dict(bf16=True))
    done.train()
    assert all(value > 0 for value in logged(done, "projected_grad"))
    assert logged(done, "loss")[0] == pytest.approx(4.2, abs=0.3)


def test_a_skipped_step_leaves_no_coefficients(tmp_path, monkeypatch):
    """As where a GradScaler finds infinite gradients: the next step starts anew."""
    done = trainer(tmp_path, options=dict(max_steps=2))
    calls = []

    def step(self, closure=None):
        calls.append(self.accumulated is not None)
        if len(calls) == 1:
            return None
        assert float(self.accumulated[0, 0]) == float(self.projected_grads[0, 0])
        return plain(self, closure)

    plain = HybridZOFO.step
    monkeypatch.setattr(HybridZOFO, "step", step)
    done.train()
    assert calls == [True, True]


def test_a_step_cut_off_leaves_no_coefficients(tmp_path):
    """An error between the batches of a step, then training again: as if from the start."""

    class Failing(HybridTrainer):
        calls = 0

        def training_step(self, *args, **kwargs):
            Failing.calls += 1
            if Failing.calls == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    options = dict(gradient_accumulation_steps=2, max_steps=2)
    cut, whole = trainer(tmp_path, cls=Failing, options=options), trainer(tmp_path, options=options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.train()
    whole.train()
    for a, b in zip(contents(cut.model), contents(whole.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_scaling_without_first_order_groups(tmp_path):
    made = trainer(tmp_path, base_model().requires_grad_(False))
    made.accelerator.scaler = torch.amp.GradScaler("cpu")
    before = contents(made.model)
    made.train()
    assert not any(same_bits(a, b) for a, b in zip(before, contents(made.model), strict=True))


def test_modes_of_the_first_order_optimizer(tmp_path):
    """Schedule-free optimizers must be told when training stops for an evaluation."""
    calls = []

    class Free(torch.optim.SGD):
        def train(self):
            calls.append("train")

        def eval(self):
            calls.append("eval")

    options = dict(max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer(tmp_path, options=options, hybrid=dict(fo_optimizer=Free)).train()
    assert calls[0] == "train"
    assert calls.count("eval") == 2
    HybridZOFO(base_model().parameters(), lr=0.1).eval()  # SGD has no modes


def test_buffers_change_once_a_step(tmp_path):
    model = lora()
    model.register_buffer("count", torch.zeros(()))

    def counted(module, args):
        module.count += 1

    model.register_forward_pre_hook(counted)
    done = trainer(tmp_path, model)
    done.train()
    assert model.count == done.state.global_step > 0
