"""Tuned scales in files: the format's own, zo_weights.safetensors, journals, a Trainer's."""

import copy

import pytest
import torch
from quantized_models import INT4, bnb, layers, quantised, scales

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_llama import DATA, TOKENS, arguments  # noqa: E402
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig  # noqa: E402
from torchao.quantization.granularity import PerGroup  # noqa: E402

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    Journal,
    hybrid_param_groups,
    load_base_weights,
    load_hybrid,
    replay,
    save_base_weights,
    save_hybrid,
)
from zofo_optim.quantized import prepare  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
CONFIGS = {
    "nf4": lambda: transformers.BitsAndBytesConfig(**NF4),
    "nf4 double": lambda: transformers.BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
    "bnb int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2)),
    "intx int4": lambda: transformers.TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(32))
    ),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of one layer, wide enough for blocks of 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(base, kind, dtype=torch.float32):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=CONFIGS[kind](), dtype=dtype, device_map="cpu"
    )
    return model.requires_grad_(False).train()


def with_lora(model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))


def optimizer_of(model, **options):
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=0.1, mu=1e-2),
        fo=dict(lr=0.1) if any(p.requires_grad for p in model.parameters()) else None,
        quantized="scales",
        verbose=False,
    )
    return HybridZOFO(groups, **{"seed": 3, **options})


def trained(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
    return model


def check_equal(model, other):
    """The scales, to the bit, and what the models compute."""
    ours, theirs = scales(model), scales(other)
    assert len(ours) == len(theirs) >= 7
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        logits = [m.train()(input_ids=TOKENS).logits for m in (model, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@KINDS
def test_save_pretrained(kind, dtype, base, tmp_path):
    model = loaded(base, kind, dtype)
    optimizer = optimizer_of(model)
    before = {name: scale.clone() for name, scale in scales(model).items()}
    trained(model, optimizer)
    assert all(not torch.equal(scale, before[name]) for name, scale in scales(model).items())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, device_map="cpu"
    )
    check_equal(model, again)


@KINDS
def test_base_weights_of_an_adapter(kind, base, tmp_path):
    """Saved beside the adapter; loaded into the base model, with or without one."""
    model = with_lora(loaded(base, kind))
    optimizer = optimizer_of(model)
    trained(model, optimizer)
    file = save_base_weights(optimizer, model, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(base, kind)
    load_base_weights(again, file)
    check_equal(model, peft.PeftModel.from_pretrained(again, tmp_path / "adapter"))
    again = with_lora(loaded(base, kind))
    load_base_weights(again, tmp_path)
    assert all(map(torch.equal, scales(model).values(), scales(again).values()))


@pytest.mark.parametrize(
    ("kind", "recorded"),
    [("nf4 double", False), ("nf4 double", True), ("bnb int8", False), ("intx int4", True)],
)
def test_save_hybrid(kind, recorded, base, tmp_path):
    model = with_lora(loaded(base, kind))
    optimizer = optimizer_of(model)
    journal = None
    if recorded:
        journal = Journal(tmp_path / "run.journal").attach(optimizer, model=model)
    trained(model, optimizer)
    save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    again, state = load_hybrid(tmp_path / "tuned", loaded(base, kind))
    check_equal(model, again)
    other = optimizer_of(again)
    other.load_state_dict(state)
    if journal is not None:
        journal.close()
    check_equal(trained(model, optimizer), trained(again, other))


@KINDS
def test_a_journal_remakes_the_scales(kind, base, tmp_path):
    model = loaded(base, kind)
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run.journal").attach(optimizer, model=model):
        trained(model, optimizer, steps=3)
    again = loaded(base, kind)
    done = replay(again, tmp_path / "run.journal")
    assert done.verified
    assert done.stop == 3
    check_equal(model, again)


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


def test_a_dense_model_of_trained_scales(base):
    """transformers' own way from 4 bits to dense weights knows the tuned scales."""
    model = loaded(base, "nf4 double")
    trained(model, optimizer_of(model))
    weights = [
        bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for layer in layers(model)
        if hasattr(layer, "quant_state")
    ]
    dense = copy.deepcopy(model).dequantize()
    found = [layer.weight for layer in layers(dense)][: len(weights)]
    assert len(weights) == 7
    for weight, other in zip(weights, found, strict=True):
        torch.testing.assert_close(other.to(weight.dtype), weight, rtol=2**-8, atol=0.0)
