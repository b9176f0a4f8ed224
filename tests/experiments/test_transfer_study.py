"""The study of adapters of small models: slices, texts, the guard against graphs, and its grid."""

import copy
import json

import pytest
import torch
from small_models import base_model, quick_collections, tiny, word_tokenizer, words
from torch import nn

from experiments.models import ModelError
from experiments.partition import problems
from experiments.training import RunError
from experiments.transfer import __main__ as command
from experiments.transfer import costs, grid, methods, runs, variants
from experiments.transfer.guard import GraphError, no_graph
from experiments.transfer.large import zeroth_order
from experiments.transfer.slices import evenly, sliced
from experiments.transfer.small import lora
from experiments.transfer.texts import unlabelled

__all__ = ["quick_collections", "tiny", "words"]

SIZES = problems.Sizes(24, 16, 16)
IDS = torch.arange(3, 15)[None]


def llama(layers):
    config = copy.deepcopy(base_model().config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = type(base_model())(config)
    with torch.no_grad():
        for parameter in model.parameters():  # or layers would hardly change what goes through
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A Llama of 4 layers in a folder."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    llama(4).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problem(deep, words):
    return problems.load(str(deep), "sst2", str(words), SIZES)


# ---- slices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "of", "layers"),
    [(3, 6, (0, 2, 5)), (2, 6, (0, 5)), (3, 5, (0, 2, 4)), (2, 2, (0, 1))],
)
def test_slices_have_the_first_and_the_last_layer(count, of, layers):
    assert evenly(count, of) == layers


@pytest.mark.parametrize("count", [1, 7])
def test_a_slice_of_too_few_or_too_many_layers_is_refused(count):
    with pytest.raises(ModelError, match=f"2 to 6 layers, got {count}"):
        evenly(count, 6)


def test_a_slice_is_the_model_without_the_other_layers():
    large = llama(4).eval()
    without = copy.deepcopy(large)
    without.model.layers = nn.ModuleList([without.model.layers[0], without.model.layers[2]])
    without.config.num_hidden_layers = 2
    small = sliced(large, (0, 2)).eval()
    with torch.no_grad():
        wanted = without(input_ids=IDS, use_cache=False).logits
        assert torch.equal(small(input_ids=IDS).logits, wanted)
        assert not torch.allclose(large(input_ids=IDS).logits, wanted, atol=1e-2)
    assert small.config.num_hidden_layers == 2
    assert large.config.num_hidden_layers == 4


def test_a_slice_has_memory_of_its_own():
    large = llama(2)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    small = sliced(large, (0, 1))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ModelError, match=r"0 to 1, got \[0, 2\]"):
        sliced(llama(2), (0, 2))


# ---- the guard -------------------------------------------------------------------------------


def test_a_graph_of_the_model_is_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(GraphError, match="weight requires a gradient"), no_graph(model):
        pass
    model.requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(GraphError, match="saved for a backward"), no_graph(model):
        model(x)
    with no_graph(model):
        model(x.detach())


def test_a_model_that_begins_to_require_gradients_is_an_error():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(GraphError, match="bias requires"), no_graph(model):
        model.bias.requires_grad_(True)


# ---- texts, and steps ------------------------------------------------------------------------


def test_texts_end_where_the_answer_would_begin(problem):
    prompts = sorted(ids[:-count] for (ids, count), *_ in problem.train.options)
    rows = []
    for batch in unlabelled(problem, 5):
        assert set(batch) == {"input_ids", "attention_mask"}
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(row[: int(mask.sum())].tolist())
    assert sorted(rows) == prompts
    assert len({len(row) for row in rows}) == 1  # the answer's length is not in them


def test_zeroth_order_moves_base_and_adapter_without_a_graph(problem):
    model = lora(problem, 1e-3, 0).model.requires_grad_(False)
    setup = zeroth_order(problem, model, 1e-3, 1e-2, 0)
    assert [group["lr"] for group in setup.optimizer.param_groups] == [1e-3, 1e-2]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with no_graph(model):
        setup.step(problem.train.batch([0, 1, 2]))
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert any("lora_B" in name for name in moved)
    assert any("mlp" in name for name in moved)
    assert setup.count("zo") == sum(p.numel() for p in model.parameters())


# ---- the grid --------------------------------------------------------------------------------


def test_a_cell_comes_after_those_that_it_needs():
    for study in grid.STUDIES:
        order = list(grid.cells(study))
        assert len({cell.name for cell in order}) == len(order)
        place = order.index(grid.REFINEMENT)
        assert order.index(grid.BRIDGED) < place
        assert order.index(grid.ZO_ALONE) < place
        assert (grid.Cell(grid.PROBE) in order) == study.head


def test_an_unknown_model_is_refused():
    with pytest.raises(ModelError, match="must be of minilm, stories260k, got 'opt-125m'"):
        grid.study_of("opt-125m")


@pytest.fixture
def shallow(monkeypatch):
    """A grid of one rate, and few steps."""
    starts = dict.fromkeys((grid.LORA, grid.PLUGGED), 1e-2)
    starts |= dict.fromkeys((grid.ZO, grid.REFINED), 1e-4)
    study = grid.Study("deep", ("sst2",), 4, 4, 2, 1.5, False, starts)
    monkeypatch.setattr(grid, "STUDIES", (study,))
    monkeypatch.setattr("experiments.search.MOST_TRIED", 1)
    return study


@pytest.fixture(scope="module")
def given(deep, words):
    sizes = ["--train-size", "24", "--dev-size", "16", "--test-size", "16"]
    return ["--models", str(deep), "--data", str(words), "--tasks", "sst2", *sizes]


def test_all_parts_make_what_is_not_there(given, shallow, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path)]
    ways = [(name, way) for name, way in variants.ways(grid.BRIDGED, 4) if name == "own, same"]
    monkeypatch.setattr(variants, "ways", lambda cell, layers: iter(ways))
    assert command.main([*given, "--seeds", "0", "1", *out]) == 0

    folder = tmp_path / "deep" / "sst2"
    searched = sorted(file.parent.name for file in folder.glob("small-3/*/seed-0.json"))
    assert searched == ["0.01"]
    result = json.loads((folder / "no-adapter" / "seed-0.json").read_text())
    assert result["seconds"] == {}
    plugged = json.loads(next(folder.glob("bridge-3/*/seed-1.json")).read_text())
    assert plugged["small"]["curve"][0]["step"] == 0
    assert set(plugged["seconds"]) == {"small", "transfer"}
    assert set(plugged["report"]["layers"].values()) == {0, 1, 2}
    refined = json.loads(next(folder.glob("bridge-3+ZO/*/seed-1.json")).read_text())
    assert refined["parameters_fo"] == 0
    assert refined["curve"][0]["loss"] == pytest.approx(plugged["best"]["loss"], rel=1e-5)
    assert refined["curve"][-1]["step"] == 6

    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    for cell in grid.cells(shallow):
        assert f"| {cell.name}" in rows
    found = json.loads((folder / "costs.json").read_text())["bytes"]
    assert found[costs.WEIGHTS] < found[costs.FORWARD] < found[grid.LORA]
    assert found["bridge 3, no text"] < found["bridge 3, 1024 rows"]
    (line,) = (line for line in lines if line.startswith(f"| {grid.REFINEMENT.name} |"))
    carried, there = found[costs.rows(grid.BRIDGED, 4096)], found[grid.REFINED]
    assert f"| {max(carried, there) / 1e6:.1f} | {there / 1e6:.1f} |" in line

    def made(*args):
        raise AssertionError("a run that is there was made again")

    monkeypatch.setattr(runs.Searches, "_made", made)
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    assert command.main([*given, "--seeds", "0", "1", *out]) == 0
    assert {file: file.read_bytes() for file in folder.rglob("*.json")} == before

    with pytest.raises(SystemExit):  # 20 examples are other runs
        command.main(["runs", *given, "--train-size", "20", *out])


def test_a_scale_of_1_is_the_adapter_and_0_the_head_alone(problem):
    model = lora(problem, 1e-3, 0).model.requires_grad_(False)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_B" in name:
                part.normal_(0, 0.5)
    wanted = methods.scored(problem, model)
    found = methods.scales(problem, model, variants.SCALES)
    assert methods.scored(problem, model) == wanted
    assert found["1"]["test"] == wanted["test"]
    assert found["1"]["dev"]["loss"] == wanted["best"]["loss"]
    without = methods.untrained(problem)
    assert found["0"]["test"] == without["test"] != wanted["test"]
    best = found[f"{methods.best_scale(found):g}"]
    assert best["dev"]["loss"] == min(one["dev"]["loss"] for one in found.values())
    assert "test" in best
