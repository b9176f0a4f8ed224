"""The page of evidence is what is drawn; runs are taken over, and who is ahead is told right."""

import json
import math
from dataclasses import replace
from itertools import islice

import pytest
from small_models import quick_collections, tiny, words

from experiments.evidence import found, grid, kinds, page, paper, runs, sentences, steps, tables
from experiments.evidence.found import Entry, Found
from experiments.partition import problems, setups
from experiments.partition.recipes import (
    ALL,
    GAUSSIAN,
    LORA,
    PER_EXAMPLE,
    PLAIN,
    PREFIX,
    PROMPT,
    Recipe,
)
from experiments.partition.regions import ALONE, LOSES, TIES, WINS

__all__ = ["quick_collections", "tiny", "words"]

STUDY = replace(grid.STUDIES[1], steps=10)


def entry(recipe, losses, mb, *, passes=2.0, curve=((0, 4.0), (10, 3.0)), saved=None):
    points = [{"step": step, "loss": loss} for step, loss in curve]
    results = [{"test": {"loss": loss}, "curve": points, "scored": False} for loss in losses]
    costs = {PLAIN: {"passes": passes, "peak_bytes": mb * 10**6}}
    if saved is not None:
        costs[grid.CHECKPOINTED] = {"passes": 2 * passes, "peak_bytes": saved * 10**6}
    return Entry(recipe, results, False, costs)


ZO = entry(Recipe(kind=GAUSSIAN), [2.0, 2.2], 5, passes=2.0)
ADAPTER = entry(Recipe(LORA), [1.0, 1.1], 20, passes=4.0, saved=10)
HYBRID = entry(Recipe(LORA, PER_EXAMPLE), [0.5, 0.6], 30, passes=6.0)
FOUND = Found(STUDY, [ADAPTER, ZO, HYBRID], None)


@pytest.fixture(scope="module")
def problem(tiny, words):
    return problems.load(str(tiny), "sst2-sentences", str(words), problems.Sizes(24, 16, 16))


# ---- the page --------------------------------------------------------------------------------


def test_the_page_is_what_the_command_draws():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(page.committed()), (
        "python -m experiments.evidence"
    )


def test_unknown_places_are_refused():
    with pytest.raises(ValueError, match=r"places must be of .*, got weather"):
        page.text(page.Evidence([FOUND], [FOUND]), "{{weather}}")


def test_all_parts_have_a_place():
    places = set(page.PLACE.findall(page.TEMPLATE.read_text(encoding="utf-8")))
    assert places == set(page.PARTS)


def test_what_is_not_run_is_said():
    said = sentences.unfinished([Found(grid.STUDIES[0], [ZO], None)])
    assert "copa on stories260k (all)" in said
    first = said.split(";")[0]
    assert first.startswith("Of the grid, not run yet and blank below: sst2 on all-minilm-l6-v2 (")
    assert "LoRA" in first
    assert "ZO Gaussian" not in first.split("coupling")[0].replace("+ ZO Gaussian", "")


# ---- who is ahead ----------------------------------------------------------------------------


@pytest.mark.parametrize(("passes", "loss"), [(0.0, 4.0), (10.0, 3.5), (20.0, 3.0), (1000.0, 3.0)])
def test_losses_between_evaluations_lie_on_a_line(passes, loss):
    assert ZO.after(passes) == pytest.approx([loss, loss])


def test_a_loss_that_rises_again_does_not_count():
    up = entry(Recipe(ALL), [1.0], 1, passes=1.0, curve=((0, 4.0), (5, 2.0), (10, 9.0)))
    assert up.after(8.0) == [2.0]
    broken = entry(Recipe(ALL), [1.0], 1, passes=1.0, curve=((0, 4.0), (5, math.nan)))
    assert broken.after(5.0) == [4.0]


def test_equal_time_is_that_of_the_quickest_run():
    assert FOUND.shortest == 20.0
    assert tables.at_equal_time(FOUND, ADAPTER) == pytest.approx([3.5, 3.5])


def test_the_best_that_fits():
    (_, least), (_, lora), (_, everything) = tables.amounts(FOUND)
    assert (least, lora, everything) == (5e6, 10e6, math.inf)
    told = [tables.at_memory(FOUND, amount) for amount in (least, lora, everything)]
    assert [tables.verdict(*pair) for pair in told] == [ALONE, LOSES, WINS]
    assert told[1][1].name == "LoRA, checkpointed"
    close = Found(STUDY, [ADAPTER, replace(HYBRID, runs=ADAPTER.runs)], None)
    assert tables.verdict(*tables.best(close.entries, lambda one: one.losses)) == TIES


def test_bold_is_what_nothing_beats_by_more_than_the_spread():
    table = tables.by_task([FOUND], tables.test_losses)
    (bold,) = [line for line in table.splitlines() if "**" in line]
    assert bold == "| LoRA + ZO per example | **0.550 ± 0.071** |"


def test_gains_are_beside_the_same_part():
    assert "| LoRA + ZO per example | **+0.500 (0.071)** |" in tables.gains([FOUND])


# ---- committed results -----------------------------------------------------------------------


def test_the_paper_s_differences():
    assert paper.differences("OPT-1.3B")[1] == pytest.approx([3, 1, 0])
    assert paper.means() == pytest.approx([8.59 / 9, 16.47 / 9, -3.42 / 9])
    assert "| the same without the 74 | +1.0 | +0.8 | \N{MINUS SIGN}0.4 |" in paper.table()


def test_kinds_are_chosen_as_their_study_chooses():
    table = (runs.RESULTS / "directions" / "table.md").read_text(encoding="utf-8")
    own = kinds.chosen("stories260k", "sst2", "fo", "")
    assert own[0]["rate"] == "0.003"  # lower ones have a seed that diverges, or lose
    losses = [float(run["test_loss"]) for run in own]
    assert f"| fo | 0.003* | 0.223 ± 0.032 | {tables.mean(losses, 3)} |" in table


def test_runs_are_taken_over_and_collected_once(tmp_path):
    known = runs.committed([runs.OTHERS])
    runs.restore(known, tmp_path)
    assert runs.collect(tmp_path, known) == []
    own = next(run for run in known if run["settings"]["task"] == STUDY.task)
    new = {**own, "settings": {**own["settings"], "seed": 7}}
    runs.restore([new], tmp_path)
    (part,) = runs.collect(tmp_path, known)
    assert (part["model"], part["task"]) == (STUDY.model, STUDY.task)
    runs.store([part], tmp_path / "runs.json")
    assert json.loads((tmp_path / "runs.json").read_text()) == [part]
    (kept,) = runs.committed([tmp_path / "runs.json"])
    assert kept == {k: v for k, v in new.items() if k not in runs.DROPPED}


def test_runs_that_diverged_are_stored_as_json_that_every_reader_takes(tmp_path):
    (known, *_) = runs.committed([runs.OTHERS])
    curve = [{"step": 0, "loss": 2.5}, {"step": 40, "loss": math.nan}]
    run = {**known, "curve": curve, "test": {"loss": math.inf}}
    file = tmp_path / "runs.json"
    runs.store([{"model": "m", "task": "t", "runs": [run]}], file)
    (part,) = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert part["runs"][0]["curve"] == [{"step": 0, "loss": 2.5}, {"step": 40, "loss": None}]
    (again,) = runs.committed([file])
    assert again["settings"] == known["settings"]
    assert None in again["settings"].values()  # a method without first order, or without zeroth
    assert again["curve"][0] == curve[0]
    assert math.isnan(again["curve"][1]["loss"])
    assert math.isnan(again["test"]["loss"])


def test_every_searched_rate_is_on_one_grid():
    for study in grid.STUDIES:
        own = grid.cells(study)
        assert all(cell.searched for cell in own)
        assert {cell.recipe for cell in own if cell.recipe.is_hybrid} >= {
            Recipe(name, PER_EXAMPLE) for name in (LORA, PROMPT, PREFIX)
        }
    assert {key: found.key(study) for key, study in enumerate(grid.STUDIES)}[3] == (
        "stories260k, copa"
    )


# ---- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [PROMPT, PREFIX])
def test_prompts_and_prefixes_train_beside_zeroth_order(problem, first):
    setup = setups.set_up(problem, Recipe(first, PER_EXAMPLE), lr_fo=1e-2, lr_zo=1e-5, seed=0)
    before = [p.detach().clone() for g in setup.optimizer.param_groups for p in g["params"]]
    (batch,) = islice(problems.batches(problem, 4, 0), 1)
    setup.step(batch)
    after = [p for g in setup.optimizer.param_groups for p in g["params"]]
    assert setup.count("fo") < setup.count("zo")
    assert any(not old.equal(new) for old, new in zip(before, after, strict=True))


def test_steps_are_measured_against_a_forward_pass(problem):
    study = replace(STUDY, batch=4)
    forward = steps.of_forward(problem, study)
    full = steps.of_step(problem, study, Recipe(ALL), PLAIN)
    assert 0 < full["quartiles"][0] <= full["passes"] <= full["quartiles"][1]
    assert full["peak_bytes"] > forward["peak_bytes"]
    assert set(steps.peaks(problem, study, [Recipe(LORA)])) == {"LoRA, checkpointed"}


# ---- sentences -------------------------------------------------------------------------------


def test_sentences_count_what_the_tables_show():
    behind = Found(STUDY, [ADAPTER, ZO], {"passes": 1.0, "peak_bytes": 4 * 10**6})
    said = sentences.summary([FOUND, behind])
    assert "2 comparisons: gradients alone are ahead on 1, a method with zeroth order" in said
    assert "is ahead on 1, within the spread on 0" in said
    assert "in 2 of 2 comparisons the least memory is enough for zeroth order only" in said
    assert "more than the spread in 1 of 1 comparisons" in said
    assert "in 1.25 times the memory of a forward pass (1 tasks)" in (
        sentences.memory_of_zeroth_order([FOUND, behind])
    )
    assert "4.0 times the least memory that anything takes, checkpointed 2.0 times" in (
        sentences.memory_of_lora([FOUND])
    )
    assert "LoRA 4.0, LoRA, checkpointed 8.0, ZO Gaussian 2.0" in sentences.time_of_steps([FOUND])


def test_directions_are_compared_alone():
    better = entry(Recipe(kind=PER_EXAMPLE), [1.0, 1.1], 6)
    said = sentences.directions([Found(STUDY, [ZO, better], None), FOUND])
    assert "in 1 of 1 comparisons; at a higher one in 0" in said
