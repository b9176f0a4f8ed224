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
from quantized_models import quantised, scales
from tiny_llama import DATA, arguments

from zofo_optim.quantized import prepare
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


def test_trainer_takes_no_partition_with_it(base, tmp_path):
    with pytest.raises(ValueError, match=r"quantized must be left out where partition is given"):
        HybridTrainer(
            with_lora(loaded(base, "nf4")),
            arguments(tmp_path),
            train_dataset=DATA,
            quantized="scales",
            partition=dict(budget=0.5),
        )
