"""What HybridTrainer saves: it resumes to the bit, and base weights are with the adapter."""

import copy
import warnings

import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import (  # noqa: E402
    TOKENS,
    base_model,
    lora,
)
from torch import nn  # noqa: E402
from trained_llama import (  # noqa: E402
    assert_equal,
    assert_moved,
    contents,
    logged,
    the_second_is_best,
    trainer,
)

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    Journal,
    hybrid_param_groups,
    replay,
)
from zofo_optim.base_weights import load_base_weights, save_base_weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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


def test_base_weights_are_not_rounded(tmp_path):
    model = lora()
    save_base_weights(
        HybridZOFO(hybrid_param_groups(model, verbose=False), lr=1e-3), model, tmp_path
    )
    with pytest.raises(ValueError, match=r"holds the torch.float32 weights"):
        load_base_weights(base_model().bfloat16(), tmp_path)
    load_base_weights(base_model().double(), tmp_path)
