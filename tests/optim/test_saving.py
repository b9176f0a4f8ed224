"""save_hybrid and load_hybrid: what was trained comes back, and training goes on to the bit."""

import json
import os
import socket

import numpy as np
import pytest
import torch
from conftest import needs_compiler
from torch import nn
from tuned_llama import (
    CONFIGS,
    assert_same,
    base_model,
    contents,
    logits,
    optimizer_of,
    train,
    wrapped,
)

from zofo_optim import (
    HybridZOFO,
    Journal,
    load_hybrid,
    save_hybrid,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_goes_on_to_the_bit(kind, perturbation, tmp_path):
    model = wrapped(kind)
    optimizer = optimizer_of(model, perturbation=perturbation)
    train(model, optimizer, 0, 3)
    assert save_hybrid(model, optimizer, tmp_path / "tuned") == tmp_path / "tuned"
    at_save = contents(model)
    train(model, optimizer, 3, 5)

    torch.manual_seed(7)  # nothing may depend on a fresh adapter's random start
    fresh, state = load_hybrid(tmp_path / "tuned", base_model())
    assert_same(fresh, at_save)
    other = optimizer_of(fresh, perturbation=perturbation)
    other.load_state_dict(state)
    train(fresh, other, 3, 5)
    assert_same(fresh, contents(model))


def test_a_module_without_peft(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.base, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
            self.base.requires_grad_(False)

        def forward(self, x):
            return self.head(self.base(x).tanh())

    def step(model, optimizer):
        x = torch.linspace(-1, 1, 20).reshape(5, 4)
        optimizer.step(lambda: model(x).square().mean())
        optimizer.zero_grad()

    model = Two()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    save_hybrid(model, optimizer, tmp_path)
    fresh, state = load_hybrid(tmp_path, Two().requires_grad_(True))
    assert fresh.head.weight.requires_grad
    assert not fresh.base.weight.requires_grad
    other = optimizer_of(fresh)
    other.load_state_dict(state)
    for each in ((model, optimizer), (fresh, other)):
        step(*each)
    assert_same(fresh, contents(model))


def test_adapters_with_names(tmp_path):
    model = wrapped(adapter_name="one")
    model.add_adapter("two", CONFIGS["lora"]())
    model.set_adapter("two")
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    fresh, _ = load_hybrid(tmp_path, base_model())
    assert list(fresh.active_adapters) == ["two"]
    assert list(fresh.peft_config) == ["one", "two"]
    assert_same(fresh, contents(model))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trains


def test_weights_unfrozen_by_hand_are_saved_too(tmp_path):
    model = wrapped()
    norm = next(p for name, p in model.named_parameters() if name.endswith("norm.weight"))
    norm.requires_grad_(True)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    fresh, _ = load_hybrid(tmp_path, base_model())
    assert_same(fresh, contents(model))


def test_saving_again_replaces_all(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    for _ in range(2):
        train(model, optimizer, 0, 1)
        save_hybrid(model, optimizer, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = wrapped()  # another run, with a journal from its first step on
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 1)
        save_hybrid(model, optimizer, tmp_path, journal=journal)
    assert not (tmp_path / "zo_weights.safetensors").exists()  # of the earlier save
    assert (tmp_path / "notes.txt").read_text() == "mine"
    save_hybrid(model, optimizer, tmp_path)
    assert_same(load_hybrid(tmp_path, base_model())[0], contents(model))


def test_for_use_alone(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    fresh, _ = load_hybrid(tmp_path, base_model(), trainable=False)
    assert not any(p.requires_grad for p in fresh.parameters())
    assert torch.equal(logits(fresh), logits(model))
    torch.testing.assert_close(logits(fresh.merge_and_unload()), logits(model))


def test_a_folder_of_a_version_that_named_no_files(tmp_path):
    model = wrapped()
    save_hybrid(model, optimizer_of(model), tmp_path)
    summary = json.loads((tmp_path / "hybrid.json").read_text())
    del summary["files"]
    (tmp_path / "hybrid.json").write_text(json.dumps(summary))
    assert_same(load_hybrid(tmp_path, base_model())[0], contents(model))


def test_an_adapter_with_another_name(tmp_path):
    model = wrapped(adapter_name="mine")
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    fresh, state = load_hybrid(tmp_path, base_model())
    assert list(fresh.peft_config) == ["mine"]
    other = optimizer_of(fresh)
    other.load_state_dict(state)
    for each in ((model, optimizer), (fresh, other)):
        train(*each, 2, 4)
    assert_same(fresh, contents(model))


def test_two_active_adapters(tmp_path):
    model = wrapped(adapter_name="one")
    model.add_adapter("two", CONFIGS["lora"]())
    model.base_model.set_adapter(["one", "two"])
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    fresh, _ = load_hybrid(tmp_path, base_model())
    assert list(fresh.active_adapters) == ["one", "two"]
    assert_same(fresh, contents(model))
    assert torch.equal(logits(fresh), logits(model))


def test_first_order_alone(tmp_path):
    model = wrapped()
    optimizer = HybridZOFO([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    assert not (tmp_path / "zo_weights.safetensors").exists()
    assert_same(load_hybrid(tmp_path, base_model())[0], contents(model))


def test_a_folder_behind_a_link(tmp_path):
    (tmp_path / "runs" / "7").mkdir(parents=True)
    os.symlink(tmp_path / "runs" / "7", tmp_path / "latest")
    model = wrapped()
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 1)
        save_hybrid(model, optimizer, tmp_path / "latest", journal=journal)
    for folder in ("latest", "runs/7"):
        assert_same(load_hybrid(tmp_path / folder, base_model())[0], contents(model))


@pytest.mark.parametrize(
    "wrapper", [pytest.param(torch.compile, marks=needs_compiler), nn.DataParallel]
)
def test_a_wrapped_model(wrapper, tmp_path):
    model = wrapped("head")
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 1)
    save_hybrid(wrapper(model), optimizer, tmp_path)
    fresh, _ = load_hybrid(tmp_path, base_model())
    assert_same(fresh, contents(model))
    trains = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in fresh.parameters()] == trains
    assert any(trains)


def test_sixteen_bits(tmp_path):
    """An adapter that was cast too, after it was made: peft would load it as fp32."""
    model = wrapped("head").bfloat16()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    fresh, state = load_hybrid(tmp_path, base_model().bfloat16())
    other = optimizer_of(fresh)
    other.load_state_dict(state)
    for each in ((model, optimizer), (fresh, other)):
        train(*each, 2, 4)
    assert_same(fresh, contents(model))


def test_a_learning_rate_of_numpy(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = np.linspace(0.1, 0.2, 3)[1]
    save_hybrid(model, optimizer, tmp_path)
    _, state = load_hybrid(tmp_path, base_model())
    assert [group["lr"] for group in state["param_groups"]] == [
        group["lr"] for group in optimizer.param_groups
    ]


def test_the_base_is_not_downloaded(tmp_path, monkeypatch):
    """Though the adapter names a model of the Hub, and the Hub may be asked."""
    hub = pytest.importorskip("huggingface_hub")
    name = "facebook/opt-125m"
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = name
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 1)
    save_hybrid(model, optimizer, tmp_path)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == name
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    getattr(hub.utils, "reset_sessions", bool)()  # version 0 made its sessions offline
    assert_same(load_hybrid(tmp_path, base_model())[0], contents(model))
    assert asked == []
    with pytest.raises(Exception, match="no network"):  # such a request would be seen
        hub.file_exists(name, "config.json")
    assert asked
