"""Smoothness along a training of transformers' Trainer."""

import math

import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import DATA, arguments, lora  # noqa: E402

from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups  # noqa: E402
from zofo_optim.smoothness import SmoothnessRecorder  # noqa: E402
from zofo_optim.smoothness.trainer import SmoothnessCallback  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FEW = dict(directions=2, products=2)


def trainer(folder, callbacks=(), model=None, cls=HybridTrainer, hybrid=None, **options):
    return cls(
        lora(0.1) if model is None else model,
        arguments(folder, **options),
        train_dataset=DATA,
        zo=dict(lr=1e-4, mu=1e-3),
        hybrid=hybrid,
        callbacks=list(callbacks),
    )


def contents(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())


PER_EXAMPLE = dict(structure="low_rank", perturbation="streamed", directions="per_example")


@pytest.mark.parametrize(
    ("method", "accumulate", "hybrid"),
    [("finite_difference", 1, None), ("forward", 2, None), ("forward", 1, PER_EXAMPLE)],
)
def test_logs_and_leaves_the_training_alone(method, accumulate, hybrid, tmp_path):
    options = dict(gradient_accumulation_steps=accumulate, max_steps=3, hybrid=hybrid)
    callback = SmoothnessCallback(every=2, method=method, **FEW)
    watched = trainer(tmp_path / "a", [callback], **options)
    watched.train()
    plain = trainer(tmp_path / "b", **options)
    plain.train()
    assert_equal(watched.model, plain.model)
    histories = [
        [entry["loss"] for entry in done.state.log_history if "loss" in entry]
        for done in (watched, plain)
    ]
    assert histories[0] == histories[1]
    logged = [entry for entry in watched.state.log_history if "smoothness_fo" in entry]
    assert [entry["step"] for entry in logged] == [0, 2]
    for entry, row in zip(logged, callback.recorder.rows, strict=True):
        for name in ("smoothness_fo", "stable_lr_fo", "gradient_norm_zo", "trace_zo"):
            assert entry[name] == row[name]
        assert row["step"] == entry["step"]
        assert row["loss"] == pytest.approx(histories[0][row["step"]], rel=1e-3)
        assert (row["lr_zo"], row["lr_fo"]) == (1e-4, 0.1)


@pytest.mark.parametrize(("accumulate", "hybrid"), [(2, None), (2, PER_EXAMPLE)])
def test_measures_the_loss_of_the_step(accumulate, hybrid, tmp_path):
    """As a recorder does in a loop of one's own, with the batches that the step takes."""
    callback = SmoothnessCallback(every=1, method="forward", **FEW)
    model = lora()
    options = dict(gradient_accumulation_steps=accumulate, max_steps=1, hybrid=hybrid)
    done = trainer(tmp_path, [callback], model=model, **options)
    done.train()
    transformers.set_seed(1)
    batches = list(trainer(tmp_path, model=lora(), **options).get_train_dataloader())[:accumulate]
    model = lora().train()
    per_example = hybrid is not None
    groups = hybrid_param_groups(
        model,
        dict(lr=1e-4),
        directions="per_example" if per_example else "shared",
        verbose=False,
    )
    optimizer = HybridZOFO(groups, lr=0.1, seed=1, **(hybrid or {}))

    def closure_of(batch):
        if per_example:
            return lambda: example_losses_of(model, batch) / accumulate
        return lambda: model(**batch).loss / accumulate

    recorder = SmoothnessRecorder(optimizer, method="forward", **FEW)
    expected = recorder.measure([closure_of(batch) for batch in batches])
    found = callback.recorder.rows[0]
    for name in ("loss", "gradient_norm_fo", "gradient_norm_zo", "smoothness_fo"):
        assert found[name] == pytest.approx(expected[name], rel=0.02), name


def test_what_the_trainer_counts_is_left_alone(tmp_path):
    class Counting(HybridTrainer):
        def compute_loss(self, *args, **kwargs):
            self.seen += 1
            return super().compute_loss(*args, **kwargs)

    seen = []
    for callbacks in ([SmoothnessCallback(every=1, method="forward", **FEW)], []):
        done = trainer(tmp_path, callbacks, cls=Counting, max_steps=1)
        done.seen = 0
        done.train()
        seen.append(done.seen)
    assert seen[0] == seen[1] > 0


def test_a_resumed_training_goes_on_with_its_rows(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    callback = SmoothnessCallback(every=2, **FEW)
    whole = trainer(tmp_path / "whole", [callback], **options)
    whole.train()
    assert [row["step"] for row in callback.recorder.rows] == [0, 2]
    fresh = SmoothnessCallback(every=2, **FEW)
    resumed = trainer(tmp_path / "resumed", [fresh], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert fresh.recorder.rows[0] == callback.recorder.rows[0]
    assert [row["step"] for row in fresh.recorder.rows] == [0, 2]
    later = [callback.recorder.rows[1], fresh.recorder.rows[1]]
    for name in ("loss", "gradient_norm_fo", "trace_zo"):  # Lanczos's vector begins anew
        assert later[0][name] == later[1][name]
    fresh.recorder.save(tmp_path / "rows.json")
    resumed.train()  # from the start: not with earlier rows
    assert [row["step"] for row in fresh.recorder.rows] == [0, 2]
    assert all(math.isfinite(row["smoothness_fo"]) for row in fresh.recorder.rows)


def test_a_checkpoint_without_it_can_be_resumed(tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    trainer(tmp_path, max_steps=1, **options).train()
    callback = SmoothnessCallback(every=1, method="forward", **FEW)
    done = trainer(tmp_path, [callback], max_steps=2, **options)
    done.train(resume_from_checkpoint=True)
    assert [row["step"] for row in callback.recorder.rows] == [1]
    assert (tmp_path / "checkpoint-2").is_dir()


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="every must be an int >= 1, got 0"):
        SmoothnessCallback(every=0)
    done = trainer(tmp_path, [SmoothnessCallback(directions=1)], max_steps=1)
    with pytest.raises(ValueError, match="directions must be an int >= 2, got 1"):
        done.train()
    plain = transformers.Trainer(
        lora(), arguments(tmp_path), train_dataset=DATA, callbacks=[SmoothnessCallback()]
    )
    with pytest.raises(TypeError, match=r"must be given to a HybridTrainer, got one .* SGD"):
        plain.train()
    two = [SmoothnessCallback(), SmoothnessCallback(every=3)]
    with pytest.raises(ValueError, match="callbacks must hold one SmoothnessCallback, got 2"):
        trainer(tmp_path, two, max_steps=1).train()
    done = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(type(done.args), "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"must be used in one process.* got 2"):
        two[0].on_train_begin(done.args, done.state, done.control, done.create_optimizer())


def test_a_training_step_that_shows_no_batches_is_refused(tmp_path):
    class Other(HybridTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.hybrid_optimizer.backward(lambda: model(**self._prepare_inputs(inputs)).loss)
            return torch.zeros(())

    done = trainer(tmp_path, [SmoothnessCallback()], cls=Other, max_steps=1)
    before = contents(done.model)
    with pytest.raises(TypeError, match="shows no batches"):
        done.train()
    for a, b in zip(before, contents(done.model), strict=True):  # in-place moves round
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
