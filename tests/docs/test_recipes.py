"""The recipes of docs/recipes.md run as they stand there, and do what a plain loop does."""

import functools

import pytest
import torch
from doc_blocks import ROOT, sections
from doc_names import ROWS, make_base, make_loader, make_model
from doc_run import fresh_names, run_section

pytest.importorskip("transformers")
pytest.importorskip("peft")

from doc_setup import hub, hub_cache, quiet  # noqa: F401  fixtures

from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("hub", "quiet")]

RECIPES = {section.title: section for section in sections(ROOT / "docs" / "recipes.md")}


def run(title, **given):
    """A recipe's names afterwards, and the weights of the model before."""
    names = fresh_names(given)
    names.setdefault("model", make_model())
    before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    run_section(RECIPES[title], names)
    return names, before


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.detach().view(torch.int32), b.view(torch.int32))


def assert_equal(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(a, b.detach())


def changed(model, before):
    """Names of the weights that are not as before."""
    now = dict(model.named_parameters())
    return {n for n, p in before.items() if not same_bits(now[n], p)}


def assert_base_and_adapter_changed(model, before):
    names = changed(model, before)
    assert any("lora_" in name for name in names)
    assert any("lora_" not in name for name in names)


def test_every_recipe_is_tested():
    with_code = [title for title, section in RECIPES.items() if section.blocks]
    assert with_code == [
        "A plain loop",
        "MeZO",
        "transformers' Trainer",
        "TRL's SFTTrainer",
        "accelerate",
        "fp16 with a GradScaler",
        "Lightning",
        "Objectives without gradients",
        "Scores of generated text",
        "Losses of examples",
        "Another first-order optimizer",
        "Part of the base model",
        "A listener",
    ]
    for section in RECIPES.values():
        for block in section.blocks:
            assert block.language == "python"
            assert len(block.code.splitlines()) <= 20


def test_plain_loop():
    names, before = run("A plain loop")
    assert_base_and_adapter_changed(names["model"], before)
    rates = [group["lr"] for group in names["optimizer"].param_groups]
    assert rates == pytest.approx([1e-6 * 0.991, 1e-3 * 0.991])


def test_mezo():
    names, before = run("MeZO", model=make_base())
    assert changed(names["model"], before) == set(before)
    assert all(p.grad is None for p in names["model"].parameters())


def test_trainer():
    names, before = run("transformers' Trainer")
    assert names["trainer"].state.global_step == 4
    assert_base_and_adapter_changed(names["model"], before)


def test_sft_trainer(monkeypatch):
    """As it stands, but on the CPU: TRL's arguments ask for a GPU unless told otherwise."""
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    on_cpu = functools.partial(trl.SFTConfig, use_cpu=True, bf16=False)
    monkeypatch.setattr(trl, "SFTConfig", on_cpu)
    names, _ = run("TRL's SFTTrainer")
    start = dict(make_base().named_parameters())
    now = dict(names["trainer"].model.get_base_model().named_parameters())
    key = "model.decoder.layers.0.fc1.weight"
    assert now[key].shape == start[key].shape
    assert not torch.equal(now[key].detach(), start[key].detach())


def test_accelerate():
    """As the plain loop, to the bit."""
    pytest.importorskip("accelerate")
    names, before = run("accelerate")
    assert_base_and_adapter_changed(names["model"], before)
    plain, _ = run("A plain loop")
    assert_equal(names["model"], plain["model"])


def test_grad_scaler():
    names, before = run("fp16 with a GradScaler")
    model = names["model"]
    assert_base_and_adapter_changed(model, before)
    weights = dict(model.named_parameters())
    # a coefficient that were still scaled would move the base 65,536 times as far
    assert max((weights[n] - p).abs().max() for n, p in before.items() if "lora_" not in n) < 1e-2


def test_lightning(monkeypatch):
    """As a plain loop, to the bit; three evaluations a step, one of them with gradients.

    The first step evaluates once more, to see whether the loss repeats.
    """
    pytest.importorskip("lightning")
    monkeypatch.setenv("PL_TRAINER_ACCELERATOR", "cpu")
    monkeypatch.setenv("PL_TRAINER_ENABLE_PROGRESS_BAR", "False")
    calls = []
    model = make_model()
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    names, before = run("Lightning", model=model)
    assert calls == [True, False, False, False] + [True, False, False] * 3
    assert_base_and_adapter_changed(names["model"], before)
    plain = make_model()
    optimizer = HybridZOFO(
        hybrid_param_groups(plain, zo=dict(lr=1e-6), fo=dict(lr=1e-3), verbose=False)
    )
    for batch in make_loader():
        optimizer.zero_grad()
        optimizer.step(lambda batch=batch: plain(**batch).loss)
    assert_equal(names["model"], plain)


def test_objectives_without_gradients():
    names, before = run("Objectives without gradients")
    assert any("lora_" in name for name in changed(names["model"], before))
    assert names["optimizer"].param_groups[0]["maximize"] is True


def test_scores_of_generated_text():
    names, _ = run("Scores of generated text")
    optimizer = names["optimizer"]
    assert optimizer.projected_grads.shape == (1, 4)
    assert optimizer.param_groups[0]["zo_step"] == 2


def test_losses_of_examples():
    """As with the model's own loss, which 10 is above; both ways to get them agree."""
    names, before = run("Losses of examples")
    model, batch = names["model"], names["batch"]
    assert_base_and_adapter_changed(model, before)
    plain = make_model()
    optimizer = HybridZOFO(
        hybrid_param_groups(plain, zo=dict(lr=1e-6), fo=dict(lr=1e-3), verbose=False)
    )
    for rows in make_loader():
        optimizer.zero_grad()
        optimizer.step(lambda rows=rows: plain(**rows).loss)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert names["losses"].shape == (3,)
    torch.testing.assert_close(names["losses"].mean(), model(**batch).loss)
    torch.testing.assert_close(names["losses"], example_losses_of(model, batch))


def test_another_first_order_optimizer():
    names, before = run("Another first-order optimizer")
    assert_base_and_adapter_changed(names["model"], before)
    state = names["optimizer"].state
    assert len(state) == sum("lora_" in name for name in before)
    assert all("exp_avg" in entry for entry in state.values())


def test_part_of_the_base_model():
    names, before = run("Part of the base model")
    zeroth = next(g for g in names["groups"] if g["mode"] == "zo")["param_names"]
    assert zeroth
    assert not [name for name in zeroth if "embed" in name or "norm" in name]
    assert any("embed" in name for name in before)


def test_a_listener():
    names, _ = run("A listener")
    steps = len(ROWS) // 3
    assert [tuple(slopes.shape) for slopes in names["slopes"].found] == [(1, 1)] * steps
    names["optimizer"].step(lambda: names["model"](**names["batch"]).loss)
    assert len(names["slopes"].found) == steps


def test_accuracy_is_learnt():
    """A linear classifier learns from its accuracy alone; its features from their own loss."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    labels = (x[:, 0] > 0).long()
    head = torch.nn.Linear(8, 2).requires_grad_(False)
    scale = torch.nn.Parameter(torch.zeros(()))
    optimizer = HybridZOFO(
        [
            dict(params=list(head.parameters()), mode="zo", lr=0.5, mu=0.1, maximize=True),
            dict(params=[scale], lr=0.1),
        ],
        num_samples=4,
    )

    def closure():
        optimizer.zero_grad()
        ((scale - 1) ** 2).backward()
        return (head(x).argmax(-1) == labels).float().mean()

    start = float(closure())
    for _ in range(60):
        last = optimizer.step(closure)
    assert start < 0.7
    assert float(last) > 0.95
    assert float(scale) == pytest.approx(1, abs=0.01)
