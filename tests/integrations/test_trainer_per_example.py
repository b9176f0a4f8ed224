"""HybridTrainer with one direction for each example of a batch."""

import math

import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import (  # noqa: E402
    DATA,
    base_model,
    lora,
)
from trained_llama import (  # noqa: E402
    PER_EXAMPLE,
    batches,
    contents,
    logged,
    trainer,
)

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    example_losses_of,
    hybrid_param_groups,
)
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("accumulate", "frozen", "smoothing"), [(1, False, 0.0), (2, False, 0.1), (3, True, 0.0)]
)
def test_one_direction_an_example(accumulate, frozen, smoothing, tmp_path):
    """As a plain loop with losses of examples; 10 rows make a last step of fewer."""

    def model():
        return base_model().requires_grad_(False) if frozen else lora()

    options = dict(gradient_accumulation_steps=accumulate, label_smoothing_factor=smoothing)
    options.update(max_grad_norm=1e9, num_train_epochs=1, max_steps=-1)
    done = trainer(tmp_path, model(), options, hybrid=PER_EXAMPLE)
    done.train_dataset = DATA[:10]
    done.train()
    plain = model().train()
    groups = hybrid_param_groups(plain, dict(lr=1e-3), directions="per_example", verbose=False)
    optimizer = HybridZOFO(groups, lr=0.1, seed=1, **PER_EXAMPLE)
    data, estimates = batches(done), []
    for low in range(0, len(data), accumulate):
        step = data[low : low + accumulate]
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
        for batch in step:
            optimizer.backward(
                lambda batch=batch, labels=labels: example_losses_of(
                    plain, batch, num_items_in_batch=labels, label_smoothing=smoothing
                )
            )
        estimates.append(optimizer.accumulated.abs().sum().item())
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(contents(done.model), contents(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert min(estimates) > 0
    assert len(logged(done, "projected_grad")) == len(estimates)
    assert not all(map(same_bits, contents(done.model), contents(model())))


def test_one_direction_an_example_needs_the_models_own_loss(tmp_path):
    class Other(HybridTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, inputs, **kwargs)

    for cls, more, what in (
        (Other, {}, "Other.compute_loss"),
        (HybridTrainer, dict(compute_loss_func=lambda *a, **k: 0), "compute_loss_func"),
    ):
        done = trainer(tmp_path, cls=cls, hybrid=PER_EXAMPLE, **more)
        with pytest.raises(ValueError, match=f"directions must be 'shared' with {what}"):
            done.create_optimizer()
        model = lora()
        groups = hybrid_param_groups(model, dict(lr=1e-3), directions="per_example", verbose=False)
        made = HybridZOFO(groups, lr=0.1, **PER_EXAMPLE)
        with pytest.raises(ValueError, match=f"directions must be 'shared' with {what}"):
            trainer(tmp_path, model, cls=cls, zo=None, optimizers=(made, None), **more)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_row_voids_its_own_slope(accumulate, tmp_path):
    class OneBad(HybridTrainer):
        def example_losses(self, model, inputs, num_items_in_batch):
            losses = super().example_losses(model, inputs, num_items_in_batch)
            return losses + torch.tensor([0.0, float("nan")])

    frozen = base_model().requires_grad_(False)
    options = dict(gradient_accumulation_steps=accumulate, logging_nan_inf_filter=False)
    done = trainer(tmp_path, frozen, options, cls=OneBad, hybrid=PER_EXAMPLE)
    slopes = []
    taken = HybridZOFO.backward

    def spy(self, closure):
        loss = taken(self, closure)
        slopes.append(self.projected_grads[0].tolist())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridZOFO, "backward", spy)
        done.train()
    assert all(bad == 0 != good for good, bad in slopes)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_slopes_of_examples_in_the_log_are_of_the_whole_batch(accumulate, tmp_path):
    """As those of a batch that is not divided."""
    frozen = base_model().requires_grad_(False)
    size = dict(gradient_accumulation_steps=accumulate, per_device_train_batch_size=4 // accumulate)
    done = trainer(tmp_path, frozen, dict(**size, max_steps=1), hybrid=PER_EXAMPLE)
    done.train()
    whole = dict(per_device_train_batch_size=4, max_steps=1)
    other = trainer(tmp_path, base_model().requires_grad_(False), whole, hybrid=PER_EXAMPLE)
    other.train()
    (ours,), (theirs,) = (logged(one, "projected_grad") for one in (done, other))
    assert ours == pytest.approx(theirs, rel=5e-2)


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_losses_of_a_subclass_are_trained(directions, tmp_path):
    """Whatever the directions are; here thrice the model's, which the loss in the log shows."""

    class Thrice(HybridTrainer):
        def example_losses(self, model, inputs, num_items_in_batch):
            seen.append(num_items_in_batch)
            return 3 * super().example_losses(model, inputs, num_items_in_batch)

    seen = []
    chosen = dict(PER_EXAMPLE, directions=directions)
    made = [trainer(tmp_path, cls=cls, hybrid=chosen) for cls in (Thrice, HybridTrainer)]
    for done in made:
        done.args.max_grad_norm = 1e9
        done.train()
    ours, theirs = (logged(done, "loss") for done in made)
    assert ours[0] == pytest.approx(3 * theirs[0], rel=1e-4)
    assert seen
    (ours, theirs) = (logged(done, "projected_grad") for done in made)
    assert ours[0] == pytest.approx(3 * theirs[0], rel=1e-2)


def test_regression_has_no_count_of_labels(tmp_path):
    """Also where the Trainer counts, as it does for models that take further arguments."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, pad_token_id=0, num_labels=1, problem_type="regression"
    )
    model = transformers.LlamaForSequenceClassification(config).requires_grad_(False)
    done = trainer(tmp_path, model, dict(gradient_accumulation_steps=2), hybrid=PER_EXAMPLE)
    done.train_dataset = [
        dict(input_ids=row["input_ids"], labels=float(i)) for i, row in enumerate(DATA)
    ]
    done.train()
    assert all(math.isfinite(loss) for loss in logged(done, "loss"))
    assert min(logged(done, "projected_grad")) > 0
