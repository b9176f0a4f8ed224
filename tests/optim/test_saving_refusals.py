"""What save_hybrid and load_hybrid refuse: they say why, and nothing is half done."""

import copy
import inspect
import re
import shutil

import pytest
import torch
from torch import nn
from tuned_llama import (
    CONFIGS,
    IDS,
    assert_same,
    base_model,
    contents,
    optimizer_of,
    wrapped,
)

from zofo_optim import (
    Journal,
    load_base_weights,
    load_hybrid,
    save_base_weights,
    save_hybrid,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def test_a_save_that_was_cut_off_is_refused(tmp_path, monkeypatch):
    model = wrapped()
    optimizer = optimizer_of(model)
    save_hybrid(model, optimizer, tmp_path)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_hybrid(model, optimizer, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no hybrid\.json at .* cut off"):
        load_hybrid(tmp_path, base_model())


def test_what_cannot_be_saved(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    with pytest.raises(TypeError, match="optimizer must be a HybridZOFO, got SGD"):
        save_hybrid(model, torch.optim.SGD(model.parameters()), tmp_path)
    with pytest.raises(ValueError, match="model must hold all first-order parameters"):
        save_hybrid(base_model(), optimizer, tmp_path)
    other = optimizer_of(copy.deepcopy(model))
    journal = Journal(tmp_path / "run.zofo").attach(other)
    with pytest.raises(ValueError, match="journal must be attached to optimizer"):
        save_hybrid(model, optimizer, tmp_path, journal=journal)
    journal.close()
    optimizer.backward(lambda: model(input_ids=IDS[0], labels=IDS[0]).loss)
    with pytest.raises(RuntimeError, match="optimizer must not be accumulating"):
        save_hybrid(model, optimizer, tmp_path)
    assert not (tmp_path / "hybrid.json").exists()


@pytest.mark.parametrize(
    ("save", "right"),
    [
        (save_hybrid, r"save_hybrid\(model, optimizer, folder\)"),
        (save_base_weights, r"save_base_weights\(optimizer, model, folder\)"),
    ],
)
def test_swapped_arguments(save, right, tmp_path):
    """The two have the model and the optimizer in different orders."""
    model = wrapped()
    pair = {"model": model, "optimizer": optimizer_of(model)}
    order = list(inspect.signature(save).parameters)[:2]
    save(*(pair[name] for name in order), tmp_path / "right")
    save(**pair, folder=tmp_path / "by name")
    got = "got a HybridZOFO as model and a PeftModelForCausalLM as optimizer"
    with pytest.raises(TypeError, match=f"model and optimizer must .* {right}, {got}"):
        save(*(pair[name] for name in reversed(order)), tmp_path / "wrong")
    plain = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="optimizer must be a HybridZOFO, got SGD"):
        save(model=model, optimizer=plain, folder=tmp_path / "wrong")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        save(model={}, optimizer=pair["optimizer"], folder=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_swapped_arguments_of_loading(tmp_path):
    model = wrapped()
    with pytest.raises(TypeError, match=r"got \w+Path; .* load_base_weights\(model, folder\)"):
        load_base_weights(tmp_path, model)
    with pytest.raises(TypeError, match=r"got \w+Path; .* load_hybrid\(folder, base\)"):
        load_hybrid(model, tmp_path)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(TypeError, match=r"base must be a torch\.nn\.Module, got str"):
        load_hybrid(tmp_path, "facebook/opt-125m")
    with pytest.raises(FileNotFoundError, match=r"no hybrid\.json"):
        load_hybrid(tmp_path, base_model())
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_hybrid(tmp_path / "nowhere", base_model())
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="that is a file, not a folder"):
        load_hybrid(tmp_path / "file", base_model())
    model = wrapped()
    save_hybrid(model, optimizer_of(model), tmp_path)
    summary = tmp_path / "hybrid.json"
    summary.write_text(summary.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="must be of format 1, got 9"):
        load_hybrid(tmp_path, base_model())


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "zo_weights.safetensors",
        "fo_weights.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
    ],
)
def test_a_file_that_is_gone(name, tmp_path):
    model = wrapped()
    model.add_adapter("other", CONFIGS["lora"]())
    next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).requires_grad_(True)
    save_hybrid(model, optimizer_of(model), tmp_path)
    (tmp_path / name).unlink()
    base = base_model()
    before = contents(base)
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(name)} missing in .*copy the whole"):
        load_hybrid(tmp_path, base)
    assert_same(base, before)


def test_a_folder_of_a_trainer(tmp_path):
    trainers = pytest.importorskip("zofo_optim.trainer")
    options = dict(max_steps=1, report_to=[], use_cpu=True, optim="sgd", save_strategy="steps")
    arguments = transformers.TrainingArguments(tmp_path, save_steps=1, **options)
    data = [dict(input_ids=row, labels=row) for row in IDS[0]]
    for model, load in (
        (wrapped(), r"PeftModel\.from_pretrained\(base, folder\), then load_base_weights\(model"),
        (base_model().requires_grad_(False), r"from_pretrained\(folder\)"),
    ):
        done = trainers.HybridTrainer(model, arguments, train_dataset=data, zo=dict(lr=1e-3))
        done.train()
        done.save_model(tmp_path / "final")
        with pytest.raises(FileNotFoundError, match=f"by a Trainer, .*; {load}.*; go on .*train"):
            load_hybrid(tmp_path / "checkpoint-1", base_model())
        with pytest.raises(FileNotFoundError, match=f"by a Trainer, .*; {load}[^;]*$"):
            load_hybrid(tmp_path / "final", base_model())
        with pytest.raises(FileNotFoundError, match="choose a checkpoint, such as checkpoint-1"):
            load_hybrid(tmp_path, base_model())
        shutil.rmtree(tmp_path / "final")
        shutil.rmtree(tmp_path / "checkpoint-1")
    for name in ("training_args.bin", "zo_weights.safetensors"):  # as of torchao's weights
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"Trainer, .*; load_base_weights\(model, folder\)"):
        load_hybrid(tmp_path, base_model())


def test_a_refused_save_leaves_the_one_before(tmp_path):
    model = wrapped()
    save_hybrid(model, optimizer_of(model), tmp_path)
    wanted = contents(model)
    lost = dict(params=[("lost", nn.Parameter(torch.ones(2), False))], mode="zo", lr=1e-3)
    optimizer = optimizer_of(model)
    optimizer.add_param_group(lost)
    with pytest.raises(ValueError, match=r"model must hold all zeroth-order parameters.*lost"):
        save_hybrid(model, optimizer, tmp_path)
    assert_same(load_hybrid(tmp_path, base_model())[0], wanted)


def test_another_base(tmp_path):
    model = wrapped()
    save_hybrid(model, optimizer_of(model), tmp_path / "peft")
    small = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    with pytest.raises((ValueError, RuntimeError), match=r"size mismatch|must have"):
        load_hybrid(tmp_path / "peft", small)

    class Plain(nn.Module):
        def __init__(self, size, head="head"):
            super().__init__()
            self.base = nn.Linear(4, size).requires_grad_(False)
            self.add_module(head, nn.Linear(2, 2))

    plain = Plain(3)
    save_hybrid(plain, optimizer_of(plain), tmp_path / "plain")
    with pytest.raises(ValueError, match="model must have weights of the shapes in"):
        load_hybrid(tmp_path / "plain", Plain(5))
    with pytest.raises(ValueError, match=r"base must have the first-order .*'head\.weight'"):
        load_hybrid(tmp_path / "plain", Plain(3, head="other"))
    with pytest.raises(ValueError, match="dtype that holds"):
        load_hybrid(tmp_path / "plain", Plain(3).to(torch.float16))
