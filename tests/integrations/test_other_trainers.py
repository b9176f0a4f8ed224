"""HybridTrainerMixin on trainers that count for themselves, and on sentence-transformers'."""

import math
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from tiny_llama import TOKENS, arguments, base_model, lora, vars_of, word_tokenizer  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402
from zofo_optim.trainer import HybridTrainer, HybridTrainerMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TEXTS = [[f" w{i}" for i in row] for row in TOKENS.tolist()]


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_metrics_that_compute_loss_stores(name, tmp_path, monkeypatch):
    """One entry a step, of the first evaluation; they were logged as means over all three."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    base, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")

    class Hybrid(HybridTrainerMixin, base):
        def log(self, logs, *args, **kwargs):
            if "loss" in logs:
                counts.append({len(found) for found in self._stored_metrics["train"].values()})
            super().log(logs, *args, **kwargs)

    counts = []
    rows = [
        dict(prompt="".join(t[:4]), chosen="".join(t[4:6]), rejected="".join(t[6:])) for t in TEXTS
    ]
    done = Hybrid(
        base_model(),
        args=config(**{**vars_of(arguments(tmp_path)), "max_steps": 2, "max_length": 16}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2),
        zo=dict(lr=1e-3),
    )
    done.train()
    assert counts == [{1}, {1}]


def sentence_model(folder, adapter=True):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    if adapter:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    return model


def sentence_trainer(folder, model, loss, **more):
    sentence_transformers = pytest.importorskip("sentence_transformers")

    class Hybrid(HybridTrainerMixin, sentence_transformers.SentenceTransformerTrainer):
        pass

    rows = [dict(a="".join(t[:4]), b="".join(t[4:]), label=i % 2) for i, t in enumerate(TEXTS)]
    chosen = {"max_steps": 2, "learning_rate": 0.1, "report_to": [], "use_cpu": True, **more}
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        str(folder),
        optim="sgd",
        logging_steps=1,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        **{"save_strategy": "no", **chosen},
    )
    return Hybrid(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        loss=loss,
        zo=dict(lr=1e-3),
    )


def test_sentence_transformers(tmp_path):
    """The base model, the adapter and the loss's own weights train; checkpoints hold them."""
    losses = pytest.importorskip("sentence_transformers.losses")
    model = sentence_model(tmp_path / "base")
    loss = losses.SoftmaxLoss(model, 16, num_labels=2)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    done = sentence_trainer(tmp_path, model, loss, save_strategy="steps", save_steps=1)
    done.train()
    groups = done.hybrid_optimizer.param_groups
    assert [group["mode"] for group in groups].count("zo") == 1
    assert sum(len(group["params"]) for group in groups) == len(before)
    moved = {name for name, p in loss.named_parameters() if not torch.equal(p, before[name])}
    assert "classifier.weight" in moved
    assert any("lora_B" in name for name in moved)
    assert any("base_layer" in name for name in moved)
    assert all(math.isfinite(entry["loss"]) for entry in done.state.log_history if "loss" in entry)

    reason = "by transformers 4 sentence-transformers cannot read a folder of an adapter"
    pytest.importorskip("transformers", "5", reason=reason)
    fresh = sentence_model(tmp_path / "base")
    again = sentence_trainer(tmp_path, fresh, losses.SoftmaxLoss(fresh, 16, num_labels=2))
    again.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    again._load_best_model()
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_sentence_transformers_by_zeroth_order_alone(tmp_path):
    losses = pytest.importorskip("sentence_transformers.losses")
    model = sentence_model(tmp_path / "base", adapter=False).requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    done = sentence_trainer(tmp_path, model, losses.CoSENTLoss(model))
    done.train()
    assert [group["mode"] for group in done.hybrid_optimizer.param_groups] == ["zo"]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hybrid=dict(estimator="spsa")), r"estimator must .*hybrid=dict\(estimator='spsa'\)"),
        (dict(hybrid=dict(num_samples=0)), r"hybrid=dict\(num_samples=0\)"),
        (dict(zo=dict(lr=1e-3, mu=-1)), r"Invalid mu value: -1 .*zo=dict\(mu=-1\)"),
        (dict(zo=dict(lr=-1)), r"Invalid learning rate.*zo=dict\(lr=-1\)"),
        (dict(zo=dict(lr=1e-3, num_samples=2)), r"give options of HybridZOFO as hybrid=dict\("),
    ],
)
def test_errors_name_the_arguments_of_the_trainer(options, message, tmp_path):
    made = HybridTrainer(lora(), arguments(tmp_path), **{"zo": dict(lr=1e-3), **options})
    with pytest.raises(ValueError, match=message):
        made.create_optimizer()


def test_include_that_matches_unused_weights_only():
    model = peft.get_peft_model(base_model(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    model.set_adapter("second")
    message = r"include .*got 'lora', which matches only unused ones such as '.*lora_A\.default"
    for more in ({}, {"zo": dict(lr=1e-6)}):
        with pytest.raises(ValueError, match=message):
            hybrid_param_groups(model, include="lora", **more)
    groups = hybrid_param_groups(model, include="embed", verbose=False)
    HybridZOFO(groups, lr=1e-3)
