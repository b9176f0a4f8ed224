"""HybridTrainer with a partition: made on its batches, saved, resumed, made anew."""

import itertools
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import DATA, arguments, base_model, lora  # noqa: E402

from zofo_optim import HybridZOFO, Journal, example_losses_of, hybrid_param_groups  # noqa: E402
from zofo_optim.partition import Partition, hi_zfo, importance_partition  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PARTITION = dict(budget=0.6)
ZO = dict(lr=1e-3, mu=1e-3)


def trainer(folder, partition=PARTITION, model=None, options=None, cls=HybridTrainer, **more):
    model = base_model() if model is None else model
    arguments_ = arguments(folder, **(options or {}))
    more = {"zo": ZO, "partition": partition, **more}
    return cls(model, arguments_, train_dataset=DATA, eval_dataset=DATA, **more)


def contents(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def modes(optimizer):
    return {n: g["mode"] for g in optimizer.param_groups for n in g["param_names"]}


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_it_is_made_of_the_first_training_batches(tmp_path):
    done = trainer(tmp_path, options=dict(weight_decay=0.1))
    before = contents(done.model)
    assert done.partition is None
    optimizer = done.create_optimizer()
    assert same(before, contents(done.model))
    assert not any(p.grad is not None for p in done.model.parameters())
    partition = done.partition
    assert modes(optimizer) == {row.name: row.mode for row in partition.rows}
    decays = [(g["mode"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups]
    assert decays == [("fo", 0.1, 0.1), ("fo", 0.0, 0.1), ("zo", 0.0, 1e-3)]

    transformers.set_seed(1)
    other = trainer(tmp_path)
    batches = []
    for batch in other.get_train_dataloader():
        batches.append(dict(batch))
        if len(batches) == 4:
            break
    expected = importance_partition(
        other.model.train(),
        [lambda b=b: other.model(**b).loss for b in batches],
        fo=dict(lr=0.1),
        verbose=False,
    )[1]
    assert partition == expected


@pytest.mark.parametrize("options", [{}, dict(gradient_accumulation_steps=2)])
def test_training_is_that_of_the_same_groups_given(tmp_path, options):
    """The batches that were profiled come again, and dropout draws what it would have drawn."""
    model = base_model()
    model.config.attention_dropout = 0.2
    done = trainer(tmp_path, model=model, options=options)
    done.train()

    model = base_model()
    model.config.attention_dropout = 0.2
    groups = done.partition.groups(model, ZO, dict(lr=0.1), verbose=False)
    given = trainer(
        tmp_path,
        None,
        model=model,
        options=options,
        zo=None,
        optimizers=(HybridZOFO(groups, seed=1), None),
    )
    given.train()
    assert losses(done) == losses(given)
    assert same(contents(done.model), contents(given.model))


def test_a_partition_that_was_made_before(tmp_path):
    made = trainer(tmp_path)
    made.create_optimizer()
    made.partition.save(tmp_path / "partition.json")
    loaded = trainer(tmp_path, Partition.load(tmp_path / "partition.json"))
    loaded.train()
    assert loaded.partition == made.partition
    assert modes(loaded.hybrid_optimizer) == modes(made.hybrid_optimizer)


@pytest.mark.parametrize("partition", [PARTITION, dict(budget=0.6, every=1, batches=1)])
def test_resuming_goes_on_with_the_checkpoints_partition(tmp_path, partition):
    options = dict(max_steps=-1, num_train_epochs=3, save_strategy="epoch", optim="adamw_torch")
    options["learning_rate"] = 3e-2
    straight = trainer(tmp_path, partition, options=options)
    straight.train()
    saved = json.loads((tmp_path / "checkpoint-12" / "partition.json").read_text())
    assert saved["budget"] == 0.6

    resumed = trainer(tmp_path, partition, options=options)
    with torch.no_grad():  # at which the profile would be another
        for p in resumed.model.parameters():
            p.mul_(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert modes(resumed.hybrid_optimizer) == modes(straight.hybrid_optimizer)
    assert same(contents(straight.model), contents(resumed.model))


def test_it_is_made_anew_every_so_many_epochs(tmp_path, capsys):
    found = []

    class Counted(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            found.append(done.partition)

    options = dict(max_steps=-1, num_train_epochs=5, learning_rate=0.5)
    done = trainer(tmp_path, dict(budget=0.5, every=2), options=options)
    done.add_callback(Counted())
    done.train()
    assert [a is b for a, b in itertools.pairwise(found)] == [True, False, True, False]
    assert capsys.readouterr().out.count("policy importance") == 3
    assert found[-1] != found[0]
    assert modes(done.hybrid_optimizer) == {row.name: row.mode for row in found[-1].rows}
    assert len(done.hybrid_optimizer.param_groups) == 3


def test_a_frozen_model_keeps_its_candidates(tmp_path):
    options = dict(max_steps=-1, num_train_epochs=3)
    model = base_model().requires_grad_(False)
    done = trainer(tmp_path, dict(budget=0.3, every=1), model=model, options=options)
    done.train()
    assert len(done.partition.rows) == len(list(model.parameters()))
    assert len(done.partition.first_order) > 0


def test_adapters_and_hi_zfo(tmp_path):
    preset = hi_zfo(budget=0.7)
    model = lora()
    done = trainer(
        tmp_path,
        {**preset.trainer, "policy": "adapters"},
        model=model,
        zo=preset.zo,
        hybrid=preset.hybrid,
        options=dict(optim="adamw_torch", learning_rate=1e-3, save_strategy="steps", save_steps=2),
    )
    done.train()
    assert all("layers.1" in name and "lora" in name for name in done.partition.first_order)
    assert all("lora" in name for name in done.partition.zeroth_order)
    groups = hybrid_param_groups(model, verbose=False)
    assert modes(done.hybrid_optimizer).keys() == {n for g in groups for n in g["param_names"]}
    assert Partition.load(tmp_path / "checkpoint-2" / "partition.json") == done.partition


def test_own_losses_and_directions_for_each_example(tmp_path):
    class Weighted(HybridTrainer):
        def example_losses(self, model, inputs, num_items_in_batch):
            losses = example_losses_of(model, inputs)
            return losses * torch.arange(1.0, len(losses) + 1)

    hybrid = dict(directions="per_example", structure="low_rank", perturbation="streamed")
    done = trainer(tmp_path, hybrid=hybrid, cls=Weighted)
    done.train()
    plain = trainer(tmp_path, hybrid=hybrid)
    plain.create_optimizer()
    assert done.partition.directions == "per_example"
    assert done.partition.rows != plain.partition.rows


@pytest.mark.parametrize(
    ("partition", "error", "message"),
    [
        (0.6, TypeError, "partition must be a Partition, or a mapping .*got float"),
        (dict(share=0.6), ValueError, "options of .*got 'share'"),
        (dict(budget=7.5), ValueError, "budget must be a share"),
        (dict(policy="best"), ValueError, "policy in partition must be one of .*got 'best'"),
        (dict(seed=-1), ValueError, "seed must be in"),
        (dict(every=0), ValueError, "every in partition must be an int >= 1, got 0"),
        (dict(batches=1.5), ValueError, "batches in partition must be an int >= 1, got 1.5"),
    ],
)
def test_refusals(tmp_path, partition, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, partition)


def test_a_rate_is_asked_for_before_the_profile(tmp_path):
    for zo in (None, dict(mu=1e-3)):
        with pytest.raises(ValueError, match="zo must have the learning rate"):
            trainer(tmp_path, zo=zo)
    made = trainer(tmp_path)
    made.create_optimizer()
    with pytest.raises(ValueError, match="zo must have the learning rate"):
        trainer(tmp_path, made.partition, zo=None)
    with pytest.raises(ValueError, match="zo must be left out where no tensor is zeroth-order"):
        trainer(tmp_path, dict(budget=1.0, policy="last_layers")).create_optimizer()
    trainer(tmp_path, dict(budget=1.0, policy="last_layers"), zo=None).create_optimizer()


def test_gradient_checkpointing_is_off_while_costs_are_counted(tmp_path):
    plain = trainer(tmp_path)
    plain.train()
    checkpointed = trainer(tmp_path, options=dict(gradient_checkpointing=True))
    seen = []

    class Looks(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(all(m.gradient_checkpointing for m in checkpointed.model.model.layers))

    checkpointed.add_callback(Looks())
    checkpointed.train()
    assert checkpointed.partition == plain.partition
    assert seen == [True] * 4
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)


def test_another_model_gets_another_partition(tmp_path):
    models = []

    def model_init():
        model = base_model()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + len(models))
        models.append(model)
        return model

    done = HybridTrainer(
        model_init=model_init,
        args=arguments(tmp_path),
        train_dataset=DATA,
        zo=ZO,
        partition=PARTITION,
    )
    done.train()
    first = done.partition
    done.train()
    assert done.model is models[-1]
    assert len(models) > 1
    assert done.partition != first
    assert modes(done.hybrid_optimizer) == {row.name: row.mode for row in done.partition.rows}


def test_batches_that_come_once_are_not_taken(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.rows = iter(DATA)

        def __iter__(self):
            return self.rows

    data = Once()
    done = HybridTrainer(
        base_model(), arguments(tmp_path), train_dataset=data, zo=ZO, partition=PARTITION
    )
    with pytest.raises(ValueError, match=r"must begin anew with each iter.*got Once"):
        done.create_optimizer()
    assert len(list(data.rows)) == len(DATA)


def test_a_journal_and_new_partitions_exclude_each_other(tmp_path):
    done = trainer(tmp_path, dict(budget=0.6, every=1), options=dict(num_train_epochs=2))
    done.create_optimizer()
    before = contents(done.model)
    with Journal(tmp_path / "run.zofo").attach(done.hybrid_optimizer):
        with pytest.raises(ValueError, match=r"every= with a journal.*every=1 and .*run\.zofo"):
            done.train()
        assert same(before, contents(done.model))


def test_coupling_is_the_optimizers(tmp_path):
    peaks = []
    for coupling in (0.0, 0.1):
        partition = dict(budget="1GB", policy="last_layers")
        hybrid = dict(estimator="one_sided", coupling=coupling)
        made = trainer(tmp_path, {**partition, "of": "memory"}, hybrid=hybrid, zo=None)
        made.create_optimizer()
        peaks.append(made.partition.peak)
    assert peaks[1] > peaks[0]


def test_an_optimizer_of_ones_own_has_its_groups(tmp_path):
    model = lora()
    optimizer = HybridZOFO(hybrid_param_groups(model, ZO, verbose=False), lr=0.1)
    with pytest.raises(ValueError, match="hybrid and partition must be left out"):
        trainer(tmp_path, model=model, zo=None, optimizers=(optimizer, None))


def test_resuming_says_that_another_partition_was_asked_for(tmp_path):
    options = dict(max_steps=2, save_steps=1, save_strategy="steps")
    trainer(tmp_path, dict(budget=0.6), options=options).train()
    other = trainer(tmp_path, dict(budget=0.9, of="flops"), options=options)
    with pytest.warns(UserWarning, match=r"which has budget=0\.6, not 0\.9; begin a training"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_costs_are_those_of_the_largest_batch(tmp_path):
    def forward(lengths):
        rows = [[*range(3, 3 + n)] for n in lengths]
        done = HybridTrainer(
            base_model(),
            arguments(tmp_path, per_device_train_batch_size=1),
            train_dataset=[dict(input_ids=row, labels=row) for row in rows],
            zo=ZO,
            partition=dict(budget=0.6, batches=3),
        )
        done.create_optimizer()
        return done.partition.forward_flops

    assert forward([4, 16, 4]) == forward([16, 16, 16]) > 3 * forward([4, 4, 4])
