"""save_hybrid and load_hybrid: what was trained comes back, and training goes on to the bit."""

import copy
import inspect
import json
import os
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import needs_compiler, same_bits
from torch import nn

from zofo_optim import (
    HybridZOFO,
    Journal,
    hybrid_param_groups,
    load_base_weights,
    load_hybrid,
    replay,
    save_base_weights,
    save_hybrid,
)
from zofo_optim.journal import JournalError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 30, (4, 3, 8), generator=torch.Generator().manual_seed(0))


def base_model(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    "pissa": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights="pissa"),
    "head": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
}


def wrapped(kind="lora", **options):
    torch.manual_seed(1)
    return peft.get_peft_model(base_model(), CONFIGS[kind](), **options)


def optimizer_of(model, **options):
    zo, fo = dict(lr=1e-3, mu=1e-2), dict(lr=1e-1, momentum=0.9)
    groups = hybrid_param_groups(model, zo=zo, fo=fo, verbose=False)
    return HybridZOFO(groups, **{"distribution": "rademacher", **options})


def train(model, optimizer, first, last):
    for step in range(first, last):
        ids = IDS[step % len(IDS)]
        optimizer.zero_grad()
        optimizer.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss)
    optimizer.zero_grad()


def contents(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, wanted):
    found = contents(model)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS[0]).logits


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


def test_a_journal_in_place_of_base_weights(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    folder = tmp_path / "here"
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        save_hybrid(model, optimizer, folder, journal=journal)
        wanted = contents(model)
        train(model, optimizer, 2, 3)  # the journal goes on; the folder is of step 2
    assert not (folder / "zo_weights.safetensors").exists()
    fresh, state = load_hybrid(folder, base_model())
    assert_same(fresh, wanted)
    assert state["param_groups"][0]["zo_step"] == 2

    moved = tmp_path / "there" / "deep"
    shutil.copytree(folder, moved)
    with pytest.raises(OSError, match=r"run\.zofo"):
        load_hybrid(moved, base_model())
    shutil.copy(tmp_path / "run.zofo", tmp_path / "there" / "run.zofo")
    assert_same(load_hybrid(moved, base_model())[0], wanted)
    with pytest.raises(JournalError, match="weights that"):
        load_hybrid(folder, base_model(seed=1))


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


def test_for_use_alone(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    save_hybrid(model, optimizer, tmp_path)
    fresh, _ = load_hybrid(tmp_path, base_model(), trainable=False)
    assert not any(p.requires_grad for p in fresh.parameters())
    assert torch.equal(logits(fresh), logits(model))
    torch.testing.assert_close(logits(fresh.merge_and_unload()), logits(model))


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


def test_a_folder_of_a_version_that_named_no_files(tmp_path):
    model = wrapped()
    save_hybrid(model, optimizer_of(model), tmp_path)
    summary = json.loads((tmp_path / "hybrid.json").read_text())
    del summary["files"]
    (tmp_path / "hybrid.json").write_text(json.dumps(summary))
    assert_same(load_hybrid(tmp_path, base_model())[0], contents(model))


def test_a_journal_that_is_gone(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 1)
        save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    (tmp_path / "run.zofo").unlink()
    with pytest.raises(FileNotFoundError, match=r"the journal \S+/run\.zofo is missing"):
        load_hybrid(tmp_path / "tuned", base_model())


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


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_going_on_with_a_journal(kind, perturbation, tmp_path):
    """The journal of the loaded run reaches from the base model to the end."""
    model = wrapped(kind)
    start = copy.deepcopy(model)
    optimizer = optimizer_of(model, perturbation=perturbation)
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    train(model, optimizer, 2, 4)

    fresh, state = load_hybrid(tmp_path / "tuned", base_model())
    other = optimizer_of(fresh, perturbation=perturbation)
    other.load_state_dict(state)
    with Journal(tmp_path / "run.zofo", resume=True).attach(other):
        train(fresh, other, 2, 4)
    assert_same(fresh, contents(model))
    assert replay(start, tmp_path / "run.zofo").verified


def test_a_dropped_estimate_leaves_its_rounding(tmp_path):
    """Moves round; no record of a journal holds them before the next step."""
    model = wrapped()
    start = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    folder = tmp_path / "tuned"
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        at_step = contents(model)
        optimizer.backward(lambda: model(input_ids=IDS[0], labels=IDS[0]).loss)
        optimizer.zero_grad()
        wanted = contents(model)
        assert any(not same_bits(wanted[name], at_step[name]) for name in wanted)
        save_hybrid(model, optimizer, folder, journal=journal)
        shutil.copy(tmp_path / "run.zofo", tmp_path / "as_saved.zofo")
    train(model, optimizer, 2, 3)

    fresh, state = load_hybrid(folder, base_model())
    assert_same(fresh, wanted)
    other = optimizer_of(fresh)
    other.load_state_dict(state)
    with Journal(tmp_path / "as_saved.zofo", resume=True).attach(other):
        train(fresh, other, 2, 3)
    assert_same(fresh, contents(model))
    assert replay(start, tmp_path / "as_saved.zofo").verified


def test_a_journal_of_another_run_is_refused(tmp_path):
    """Of the same base model, at the same place: it would replay well, to other weights."""
    for seed in (1, 2):
        model = wrapped()
        optimizer = optimizer_of(model, seed=seed)
        run = tmp_path / str(seed)
        run.mkdir()
        with Journal(run / "run.zofo").attach(optimizer) as journal:
            train(model, optimizer, 0, 2)
            save_hybrid(model, optimizer, run / "tuned", journal=journal)
    shutil.copy(tmp_path / "1" / "run.zofo", tmp_path / "2" / "run.zofo")
    with pytest.raises(JournalError, match="is not the journal that"):
        load_hybrid(tmp_path / "2" / "tuned", base_model())
    load_hybrid(tmp_path / "1" / "tuned", base_model())


def test_a_journal_that_was_cut_back_is_refused(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    start, beginning = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        train(model, optimizer, 0, 2)
        save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
        model.load_state_dict(start)
        with pytest.warns(UserWarning, match="is cut at the optimizer's step 0"):
            optimizer.load_state_dict(beginning)
        train(model, optimizer, 1, 4)  # other batches than before
    with pytest.raises(JournalError, match="is not the journal that"):
        load_hybrid(tmp_path / "tuned", base_model())


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


def test_a_journal_that_begins_later_does_not_replace_the_weights(tmp_path):
    model = wrapped()
    optimizer = optimizer_of(model)
    with Journal(tmp_path / "first.zofo").attach(optimizer) as journal:
        assert journal.start == 0
        train(model, optimizer, 0, 2)
    with Journal(tmp_path / "second.zofo").attach(optimizer) as journal:
        assert journal.start == 2
        train(model, optimizer, 2, 3)
        folder = save_hybrid(model, optimizer, tmp_path / "tuned", journal=journal)
    loaded, _ = load_hybrid(folder, base_model())
    assert_same(loaded, contents(model))
    with pytest.raises(RuntimeError, match="has no start before attach"):
        _ = Journal(tmp_path / "third.zofo").start
