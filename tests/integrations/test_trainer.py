"""transformers' Trainer and TRL's SFTTrainer with HybridZOFO."""

import copy
import itertools
import math
import re
import warnings

import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import (  # noqa: E402
    DATA,
    TOKENS,
    arguments,
    base_model,
    lora,
    vars_of,
    word_tokenizer,
)
from torch import nn  # noqa: E402

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    Journal,
    example_losses_of,
    hybrid_param_groups,
    replay,
)
from zofo_optim.base_weights import load_base_weights, save_base_weights  # noqa: E402
from zofo_optim.trainer import HybridTrainer, HybridTrainerMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def trainer(folder, model=None, options=None, cls=HybridTrainer, **more):
    model = lora() if model is None else model
    more = {"zo": dict(lr=1e-3, mu=1e-3), **more}
    return cls(
        model, arguments(folder, **(options or {})), train_dataset=DATA, eval_dataset=DATA, **more
    )


def contents(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(model, other):
    for a, b in zip(contents(model), contents(other), strict=True):
        assert same_bits(a, b)


def assert_moved(model, before):
    """Every base weight, and the adapter.

    The adapter only as a whole: at the start B is small, and so is the gradient of A, whose
    update may round away. Which tensors this concerns depends on the CPU.
    """
    named = zip(model.named_parameters(), before, contents(model), strict=True)
    moved = {name: not same_bits(old, new) for (name, _), old, new in named}
    assert all(value for name, value in moved.items() if "lora_" not in name), moved
    assert any(value for name, value in moved.items() if "lora_" in name), moved


def logged(done, key):
    return [entry[key] for entry in done.state.log_history if key in entry]


def batches(done):
    """The batches that a trainer of this seed sees."""
    transformers.set_seed(1)
    return list(copy.copy(done).get_train_dataloader())


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


PER_EXAMPLE = dict(structure="low_rank", perturbation="streamed", directions="per_example")


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


def test_updates_in_the_backward_are_refused(tmp_path):
    """The Trainer clips between backward and step."""
    hybrid = dict(optimizer_in_backward=True, nonfinite="raise")
    with pytest.raises(ValueError, match="hybrid must not have optimizer_in_backward=True"):
        trainer(tmp_path, hybrid=hybrid).create_optimizer()


def test_pairs_are_refused(tmp_path):
    hybrid = dict(PER_EXAMPLE, estimator="antithetic")
    made = trainer(tmp_path, base_model().requires_grad_(False), hybrid=hybrid)
    with pytest.raises(ValueError, match="hybrid must not have estimator='antithetic'"):
        made.create_optimizer()


def test_groups_are_those_of_the_arguments(tmp_path):
    options = dict(optim="adamw_torch", weight_decay=0.1, adam_beta2=0.9)
    made = trainer(tmp_path, options=options, exclude="norm", hybrid=dict(num_samples=2))
    optimizer = made.create_optimizer()
    assert made.hybrid_optimizer is optimizer
    decaying, zeroth = optimizer.param_groups
    assert (decaying["mode"], decaying["lr"], decaying["weight_decay"]) == ("fo", 0.1, 0.1)
    assert decaying["betas"] == (0.9, 0.9)
    assert (zeroth["mode"], zeroth["lr"], zeroth["weight_decay"]) == ("zo", 1e-3, 0)
    assert not any("norm" in name for name in zeroth["param_names"])
    assert "num_samples=2" in repr(optimizer)
    assert "AdamW" in repr(optimizer)


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


@pytest.mark.parametrize(
    ("perturbation", "rule"), [("in_place", "sgd"), ("streamed", "normalized")]
)
def test_resume(perturbation, rule, tmp_path):
    """To the bit, dropout included: the adapter, the base weights, the optimizer."""
    options = dict(save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    hybrid = dict(perturbation=perturbation, zo_rule=rule)
    whole = trainer(tmp_path / "a", lora(0.5), options, hybrid=hybrid)
    whole.train()
    cut = trainer(tmp_path / "b", lora(0.5), {**options, "max_steps": 2}, hybrid=hybrid)
    cut.train()
    resumed = trainer(tmp_path / "b", lora(0.5), options, hybrid=hybrid)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="state_dict was saved")
        resumed.train(resume_from_checkpoint=True)
    assert_equal(whole.model, resumed.model)
    assert whole.hybrid_optimizer.zo_groups()[0].options["zo_step"] == 4
    assert whole.hybrid_optimizer.settings.zo_rule == rule


def the_second_is_best(**options):
    """Options that save three checkpoints, and a metric by which the second one is the best."""
    ranks = itertools.chain([1, 0], itertools.count(2))
    saved = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    best = dict(load_best_model_at_end=True, metric_for_best_model="rank", greater_is_better=False)
    return {
        "options": dict(max_steps=3, **saved, **best, **options),
        "compute_metrics": lambda prediction: {"rank": next(ranks)},
    }


def test_the_best_model_has_its_base_weights(tmp_path):
    done = trainer(tmp_path, **the_second_is_best(learning_rate=0.0), zo=dict(lr=1e-2, mu=1e-3))
    before = contents(done.model)
    done.train()
    assert done.state.best_model_checkpoint.endswith("checkpoint-2")
    losses = logged(done, "eval_loss")
    assert losses[1] != pytest.approx(losses[2], rel=1e-4)
    assert done.evaluate()["eval_loss"] == pytest.approx(losses[1], rel=1e-6)
    assert not same_bits(before[0], contents(done.model)[0])


def test_saved_weights_load_into_base_and_peft_models(tmp_path):
    done = trainer(tmp_path)
    done.train()
    done.save_model(tmp_path / "out")
    expected = done.model(TOKENS).logits
    base = base_model()
    load_base_weights(base, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(model(TOKENS).logits, expected)
    model = peft.PeftModel.from_pretrained(base_model(), tmp_path / "out")
    load_base_weights(model, tmp_path / "out" / "zo_weights.safetensors")
    assert torch.equal(model(TOKENS).logits, expected)


def test_weights_that_cannot_be_loaded(tmp_path):
    model = lora()
    optimizer = HybridZOFO(hybrid_param_groups(model, verbose=False), lr=1e-3)
    with pytest.raises(FileNotFoundError, match=r"zo_weights\.safetensors"):
        load_base_weights(model, tmp_path)
    save_base_weights(optimizer, model, tmp_path)
    with pytest.raises(ValueError, match="has none of"):
        load_base_weights(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="must hold all zeroth-order parameters"):
        save_base_weights(optimizer, nn.Linear(2, 2), tmp_path)
    other = base_model()
    other.lm_head = nn.Linear(3, 64, bias=False)
    before = contents(other)
    with pytest.raises(ValueError, match=r"\(64, 3\) for 'lm_head.weight' of shape \(64, 16\)"):
        load_base_weights(other, tmp_path)
    for a, b in zip(before, contents(other), strict=True):
        assert same_bits(a, b)


def test_a_journal(tmp_path):
    done = trainer(tmp_path)
    base = copy.deepcopy(done.model)
    done.create_optimizer()
    with Journal(tmp_path / "run.zofo").attach(done.hybrid_optimizer):
        done.train()
    assert replay(base, tmp_path / "run.zofo") == (0, 4, True)


def test_bf16(tmp_path):
    """Autocast keeps no 16-bit copies of weights from before they moved."""
    done = trainer(tmp_path, options=dict(bf16=True))
    done.train()
    assert all(value > 0 for value in logged(done, "projected_grad"))
    assert logged(done, "loss")[0] == pytest.approx(4.2, abs=0.3)


def test_an_optimizer_of_ones_own(tmp_path):
    model = lora()
    groups = hybrid_param_groups(model, verbose=False)
    optimizer = HybridZOFO(groups, lr=1e-3, distribution="rademacher")
    done = trainer(tmp_path, model, zo=None, optimizers=(optimizer, None))
    done.train()
    assert done.hybrid_optimizer is optimizer
    for bad in (dict(zo=dict(lr=1e-3)), dict(zo=None, hybrid=dict(seed=1))):
        with pytest.raises(ValueError, match="must be left out"):
            trainer(tmp_path, model, optimizers=(optimizer, None), **bad)
    sgd = torch.optim.SGD(optimizer.param_groups[1]["params"])
    with pytest.raises(TypeError, match=r"must hold a HybridZOFO.*got SGD"):
        trainer(tmp_path, model, zo=None, optimizers=(sgd, None))


def test_the_trainer_of_transformers_itself(tmp_path):
    """It passes no closure to the optimizer: the error says what does."""
    model = lora()
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    plain = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=DATA, optimizers=(HybridZOFO(groups), None)
    )
    with pytest.raises(RuntimeError, match=r"use zofo_optim\.trainer\.HybridTrainer"):
        plain.train()


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


def test_trl(tmp_path):
    """The mixin on SFTTrainer; its counts are of one evaluation a step."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class HybridSFTTrainer(HybridTrainerMixin, trl.SFTTrainer):
        pass

    texts = [" ".join(f"w{i}" for i in row) for row in TOKENS.tolist()]
    data = datasets.Dataset.from_dict(dict(text=texts))

    def run(cls, **more):
        config = trl.SFTConfig(**{**vars_of(arguments(tmp_path)), "max_length": 16})
        done = cls(
            base_model(),
            args=config,
            train_dataset=data,
            processing_class=word_tokenizer(),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2),
            **more,
        )
        done.train()
        return done

    ours, theirs = run(HybridSFTTrainer, zo=dict(lr=1e-3)), run(trl.SFTTrainer)
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert logged(ours, "loss")[0] == logged(theirs, "loss")[0]
    assert logged(ours, "entropy")[0] == logged(theirs, "entropy")[0]
    assert logged(ours, "loss")[1:] != logged(theirs, "loss")[1:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(is_deepspeed_enabled=True), "deepspeed must not be used"),
        (dict(is_fsdp_enabled=True), "fsdp must not be used"),
    ],
)
def test_what_is_not_supported(flags, message, tmp_path):
    class Other(HybridTrainer):
        def add_callback(self, callback):
            pass

    made = trainer(tmp_path)
    for name, value in flags.items():
        setattr(made, name, value)
    with pytest.raises(ValueError, match=message):
        made._check_supported()


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


def test_the_best_model_of_an_adapter_with_a_name(tmp_path):
    """The Trainer finds no adapter that is not called "default"; base and adapter must agree."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    model = peft.get_peft_model(base_model(), config, adapter_name="mine")
    saved = {}

    class Snapshots(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved[f"checkpoint-{state.global_step}"] = contents(model)

    done = trainer(tmp_path, model, **the_second_is_best(), callbacks=[Snapshots()])
    done.train()
    assert done.state.best_model_checkpoint.endswith("checkpoint-2")
    for now, then in zip(contents(model), saved["checkpoint-2"], strict=True):
        assert same_bits(now, then)
    assert_moved(model, saved["checkpoint-3"])


def test_seeds_reach_the_directions(tmp_path):
    for seed in (1, 2):
        made = trainer(tmp_path, options=dict(seed=seed))
        made.create_optimizer()
        assert {g["seed"] for g in made.hybrid_optimizer.param_groups if g["mode"] == "zo"} == {
            seed
        }
    made = trainer(tmp_path, hybrid=dict(seed=7))
    made.create_optimizer()
    assert {g["seed"] for g in made.hybrid_optimizer.param_groups if g["mode"] == "zo"} == {7}


def test_the_base_needs_a_rate_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="zo must have the learning rate"):
        trainer(tmp_path, zo=dict(mu=1e-3)).create_optimizer()
    with pytest.raises(ValueError, match=r"zo must be left out .*requires_grad_\(False\)"):
        trainer(tmp_path, base_model()).train()  # forgotten to freeze


def test_an_optimizer_class_given_to_the_trainer(tmp_path):
    given = dict(optimizer_cls_and_kwargs=(torch.optim.Adam, dict(lr=7e-3)))
    made = trainer(tmp_path, **given)
    made.create_optimizer()
    assert made.hybrid_optimizer.param_groups[0]["lr"] == 7e-3
    assert "betas" in made.hybrid_optimizer.param_groups[0]
    given = dict(optimizer_cls_and_kwargs=(torch.optim.Adam, dict(params=[])))
    with pytest.raises(ValueError, match=r"which sets \['params'\]"):
        trainer(tmp_path, **given).create_optimizer()


def test_no_optimizer_yet(tmp_path):
    with pytest.raises(RuntimeError, match=r"call create_optimizer\(\) or train\(\)"):
        _ = trainer(tmp_path).hybrid_optimizer


def test_gradient_scaling_without_first_order_groups(tmp_path):
    made = trainer(tmp_path, base_model().requires_grad_(False))
    made.accelerator.scaler = torch.amp.GradScaler("cpu")
    before = contents(made.model)
    made.train()
    assert not any(same_bits(a, b) for a, b in zip(before, contents(made.model), strict=True))


def test_pushed_files_include_the_base_weights(tmp_path, monkeypatch):
    pushed = {}

    def push(self, folder):
        pushed.update({f.name: f.read_bytes() for f in tmp_path.glob("*.safetensors")})

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
    options = dict(save_strategy="steps", save_steps=2, max_steps=2, push_to_hub=False)
    done = trainer(tmp_path, options=options)
    done.train()
    done._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    there = (tmp_path / "checkpoint-2" / "zo_weights.safetensors").read_bytes()
    assert pushed["zo_weights.safetensors"] == there


def preferences():
    datasets = pytest.importorskip("datasets")
    texts = [[f" w{i}" for i in row] for row in TOKENS.tolist()]
    return datasets.Dataset.from_list(
        [
            dict(prompt="".join(t[:4]), chosen="".join(t[4:6]), rejected="".join(t[6:]))
            for t in texts
        ]
    )


def test_preference_losses_need_a_reference_of_their_own(tmp_path):
    trl = pytest.importorskip("trl")

    class HybridDPOTrainer(HybridTrainerMixin, trl.DPOTrainer):
        pass

    def make(**options):
        return HybridDPOTrainer(
            base_model(),
            args=trl.DPOConfig(**vars_of(arguments(tmp_path, learning_rate=0.0)), **options),
            train_dataset=preferences(),
            processing_class=word_tokenizer(),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2),
            zo=dict(lr=1e-3),
        )

    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        make()
    done = make(precompute_ref_log_probs=True)
    done.train()
    assert all(slope > 0 for slope in logged(done, "projected_grad"))


def test_trainers_that_buffer_batches_are_refused(tmp_path):
    class Buffering(HybridTrainer):
        _buffered_inputs = None

    with pytest.raises(TypeError, match="Buffering cannot train by HybridZOFO"):
        trainer(tmp_path, cls=Buffering)
    trl = pytest.importorskip("trl")
    assert "_buffered_inputs" in trl.GRPOTrainer.__init__.__code__.co_names


def test_base_weights_are_not_rounded(tmp_path):
    model = lora()
    save_base_weights(
        HybridZOFO(hybrid_param_groups(model, verbose=False), lr=1e-3), model, tmp_path
    )
    with pytest.raises(ValueError, match=r"holds the torch.float32 weights"):
        load_base_weights(base_model().bfloat16(), tmp_path)
    load_base_weights(base_model().double(), tmp_path)


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
