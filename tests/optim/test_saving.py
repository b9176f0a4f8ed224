"""save_hybrid and load_hybrid: what was trained comes back, and training goes on to the bit."""

import copy
import shutil

import pytest
import torch
from conftest import same_bits
from torch import nn

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, load_hybrid, save_hybrid
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
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
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


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(TypeError, match=r"base must be a torch\.nn\.Module, got str"):
        load_hybrid(tmp_path, "facebook/opt-125m")
    with pytest.raises(FileNotFoundError, match=r"no hybrid\.json"):
        load_hybrid(tmp_path / "nowhere", base_model())
    model = wrapped()
    save_hybrid(model, optimizer_of(model), tmp_path)
    summary = tmp_path / "hybrid.json"
    summary.write_text(summary.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="must be of format 1, got 9"):
        load_hybrid(tmp_path, base_model())
