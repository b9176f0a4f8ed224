"""The Trainer with quantised models: their scales, or side updates."""

import pytest
import torch
from quantized_llama import (
    check_equal,
    loaded,
    saved_llama,
    transformers,
    with_lora,
)
from quantized_models import FORMATS, layers, quantised, quantize_, scales
from tiny_llama import DATA, TOKENS, arguments

from zofo_optim import load_base_weights
from zofo_optim.quantized import add_side_updates, prepare
from zofo_optim.trainer import HybridTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", ["nf4 double", "bnb int8", "intx int4"])
def test_trainer(kind, base, tmp_path):
    """Hybrid QLoRA by the Trainer, and a checkpoint that goes on as if there had been none."""

    def trainer(folder, **options):
        if kind.startswith("intx"):  # transformers' own torchao models are refused by its Trainer
            model = quantised(transformers.AutoModelForCausalLM.from_pretrained(base), kind)
        else:
            model = loaded(base, kind)
        prepare(model)
        return HybridTrainer(
            with_lora(model),
            arguments(folder, save_strategy="steps", save_steps=2, **options),
            train_dataset=DATA,
            zo=dict(lr=0.1, mu=1e-2),
            quantized="scales",
            hybrid=dict(seed=3),
        )

    whole = trainer(tmp_path / "whole")
    before = {name: scale.clone() for name, scale in scales(whole.model).items()}
    whole.train()
    assert all(not torch.equal(scale, before[name]) for name, scale in scales(whole.model).items())
    part = trainer(tmp_path / "part", max_steps=2)
    part.train()
    again = trainer(tmp_path / "part")
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    check_equal(whole.model, again.model)


def test_trainer_resumes_side_updates(base, tmp_path):
    """They are added before a checkpoint is read, which would have no place for them."""

    def trainer(folder, **options):
        model = quantised(transformers.AutoModelForCausalLM.from_pretrained(base), "intx int8")
        return HybridTrainer(
            with_lora(model),
            arguments(folder, save_strategy="steps", save_steps=2, **options),
            train_dataset=DATA,
            zo=dict(lr=0.1, mu=1e-2),
            quantized="low_rank",
            hybrid=dict(seed=3),
        )

    def learnt(trained):
        return {n: p for n, p in trained.model.named_parameters() if "side_update" in n}

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "part", max_steps=2).train()
    again = trainer(tmp_path / "part")
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    found = learnt(again)
    assert found
    for name, wanted in learnt(whole).items():
        assert wanted.abs().max() > 0
        assert torch.equal(found[name], wanted), name


def alone(base, kind, folder, quantized, frozen=True, **options):
    """A trainer of a model that torchao's quantize_ made, without an adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).requires_grad_(not frozen)
    quantize_(model.model.layers, FORMATS[kind])
    for layer in layers(model.model.layers):
        layer.requires_grad_(False)
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1) | options
    return HybridTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        zo=None if quantized == "frozen" else dict(lr=1e-3, mu=1e-2),
        quantized=quantized,
        hybrid=dict(seed=3),
    )


def logits(trainer):
    with torch.no_grad():
        return trainer.model(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("kind", "quantized", "frozen"),
    [
        ("torchao int8", "scales", True),
        ("intx int8", "scales", False),
        ("intx int8", "low_rank", True),
        ("torchao int8", "low_rank", False),
        ("intx int4", "frozen", False),
    ],
)
def test_torchao_models_without_an_adapter_are_saved_and_resumed(
    kind, quantized, frozen, base, tmp_path
):
    """transformers cannot write them: checkpoints hold what learns."""
    whole = alone(base, kind, tmp_path / "whole", quantized, frozen)
    before = logits(whole)
    whole.train()
    assert not torch.equal(logits(whole), before)
    alone(base, kind, tmp_path / "part", quantized, frozen, max_steps=1).train()
    checkpoint = tmp_path / "part" / "checkpoint-1"
    files = {file.name for file in checkpoint.iterdir()}
    assert "config.json" in files
    assert "model.safetensors" not in files
    assert ("zo_weights.safetensors" in files, "fo_weights.safetensors" in files) == (
        quantized != "frozen",
        not frozen,
    )
    again = alone(base, kind, tmp_path / "part", quantized, frozen)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(again), logits(whole))


def test_the_best_of_their_checkpoints_comes_back(base, tmp_path):
    trainer = alone(
        base,
        "intx int8",
        tmp_path,
        "low_rank",
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1"), "another one than the last"
    again = alone(base, "intx int8", tmp_path / "again", "low_rank")
    add_side_updates(again.model)
    load_base_weights(again.model, best)
    assert torch.equal(logits(trainer), logits(again))


def test_a_checkpoint_without_their_files_is_refused(base, tmp_path):
    trainer = alone(base, "intx int8", tmp_path, "low_rank")
    with pytest.raises(FileNotFoundError, match=r"no zo_weights.* and no fo_weights"):
        trainer.train(resume_from_checkpoint=str(base))


def test_the_rank_of_side_updates_is_add_side_updates_own(base, tmp_path):
    with pytest.raises(TypeError, match=r"call add_side_updates\(model, rank=\.\.\.\) before"):
        HybridTrainer(
            with_lora(loaded(base, "nf4")), arguments(tmp_path), quantized="low_rank", rank=4
        )


def test_trainer_takes_no_partition_with_it(base, tmp_path):
    with pytest.raises(ValueError, match=r"quantized must be left out where partition is given"):
        HybridTrainer(
            with_lora(loaded(base, "nf4")),
            arguments(tmp_path),
            train_dataset=DATA,
            quantized="scales",
            partition=dict(budget=0.5),
        )
