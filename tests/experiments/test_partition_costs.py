"""What steps cost at budgets: what is measured, and the tables."""

import json

import pytest
from rich.console import Console
from small_models import quick_collections

from experiments.partition import __main__ as command
from experiments.partition import costs, setups
from experiments.partition.problems import longest_batch
from experiments.partition.recipes import ALL, LORA, PARTITION, PLAIN, SAVINGS, Recipe, step_name
from experiments.partition.steps import cost, ready

__all__ = ["quick_collections"]


@pytest.fixture(scope="module")
def small():
    return costs.llama(layers=2, width=64, length=32)


def test_rows_are_random_tokens_of_one_length(small):
    batch = longest_batch(small, 4)
    assert batch["input_ids"].shape == (4, 32)
    assert batch["input_ids"].unique().numel() > 64
    losses = small.train.losses(small.base, batch)
    assert losses.shape == (4,)


def test_every_step_is_measured_once_and_rendered(small, tmp_path, monkeypatch, capsys):
    seen = []

    def measured(problem, recipe, saving, **given):
        seen.append(step_name(recipe, saving))
        share = recipe.budget or {ALL: 1.0, LORA: 0.4}.get(recipe.first, 0.2)
        found = dict(seconds=share, peak_bytes=int(1e6 * share) + 1, predicted={})
        if recipe.first == PARTITION:
            found["predicted"] = {"share of FLOPs": share}
        return found

    monkeypatch.setattr(costs, "measured", measured)
    console = Console()
    costs.measure("llama, tiny", small, tmp_path, console, (0.1, 0.5))
    expected = [step_name(*step) for step in costs.steps(True, (0.1, 0.5))]
    assert seen == expected
    assert len(set(seen)) == len(seen)
    costs.measure("llama, tiny", small, tmp_path, console, (0.1, 0.5))
    assert seen == expected
    found = costs.read(tmp_path)
    assert list(found["llama, tiny"]) == expected

    assert command.main(["report", "--models", "minilm", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "costs.md").read_text()
    assert "| full by SGD, in backward, checkpointed | 1000 | 1.0 |" in text
    for lines in (3, 4):
        assert "| 0.5 | 0.5 | " + " | ".join(["500 ms, 1 MB"] * lines) + " |\n" in text
    assert "- less memory than LoRA: rest frozen: 0.1; rest by ZO Gaussian: 0.1;" in text
    assert "- less time than full: rest frozen: 0.1, 0.5;" in text
    for of in costs.OF:
        assert (tmp_path / f"costs-llama-{of}.png").stat().st_size > 1000


def test_steps_that_save_memory_take_less(small):
    batch = longest_batch(small, 8)

    def peak(recipe, saving):
        return cost(ready(small, recipe, saving, [batch]), [batch], batch, rounds=1)

    full = {saving: peak(Recipe(ALL), saving) for saving in SAVINGS}
    assert all(one["seconds"] > 0 for one in full.values())
    plain, in_backward, checkpointed, both = (one["peak_bytes"] for one in full.values())
    assert both <= in_backward <= plain  # the same where activations are at their most
    assert both <= checkpointed < plain
    half = peak(Recipe(PARTITION, of="memory", budget=0.5), PLAIN)
    assert half["predicted"]["share of memory"] <= 0.5
    assert half["peak_bytes"] < plain
    weights = sum(4 * p.numel() for p in small.base.parameters())
    assert half["peak_bytes"] > weights
    predicted = 1e6 * half["predicted"]["peak MB"]
    assert half["peak_bytes"] == pytest.approx(predicted, rel=0.1)


def test_tables_of_no_costs_are_not_written(tmp_path):
    assert costs.read(tmp_path) == {}
    assert command.main(["report", "--models", "minilm", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "costs.json").write_text(json.dumps({"models": {}}))
    assert costs.read(tmp_path) == {}
