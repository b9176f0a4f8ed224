"""Scores of generated text: what they are, the penalty, the methods' runs, and their report."""

import copy
import json
import math

import pytest
import torch
from small_models import base_model, quick_collections, tiny, word_tokenizer, words

from experiments.kept import Unfinished
from experiments.rewards import __main__ as command
from experiments.rewards import grid, methods, report, runs, scores, texts
from experiments.tasks import DEMO_DATA
from experiments.training import RunError

__all__ = ["quick_collections", "tiny", "words"]


def test_style_is_the_share_of_words_after_the_prompt():
    given = ["Once upon a time, Sue saw a star", "Once upon a time the end", "Once upon a time. 7"]
    assert scores.style(given) == [0.75, 0.0, 0.0]
    assert scores.style(["so it is"]) == [pytest.approx(1 / 3)]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Once upon a time, Tim ran. He was very happy!", 1.0),
        ("  Once upon a time, Tim ran. He was very happy.  ", 1.0),
        ("Once upon a time, Tim ran.", 0.0),  # one sentence
        ("Once upon a time, Tim ran. He was very happy. So", 0.0),  # and more
        ("Once upon a time, Tim ran. He was very happy", 0.0),  # not at its end
        ("Once upon a time, Tim ran. He was happy.", 0.0),  # of three words
        ("One two three four. One two three four. One two three four.", 0.0),
        ("", 0.0),
    ],
)
def test_format_is_two_whole_sentences(text, right):
    assert scores.two_sentences([text]) == [right]


def test_the_graded_format_counts_what_is_right():
    given = {
        "Once upon a time, Tim ran. He was very happy!": 1.0,
        "Once upon a time, Tim ran. He was very happy. So": 2 / 3,
        "Once upon a time, Tim ran.": 2 / 3,
        "Once upon a time, Tim ran. He was happy.": 2 / 3,
        "Once upon a time, Tim ran. No. He": 1 / 3,
        "Once upon a time, Tim": 0.0,
        "": 0.0,
    }
    assert scores.nearly_two_sentences(list(given)) == pytest.approx(list(given.values()))


def test_sentiment_tells_bad_from_good():
    negative = scores.Negative(str(DEMO_DATA), examples=200)
    found = negative(["a terrible, boring film", "a wonderful and great film"])
    assert all(0 <= one <= 1 for one in found)
    assert found[0] > 0.6 > 0.4 > found[1]


@pytest.fixture
def writer():
    torch.manual_seed(0)
    model = base_model()
    with torch.no_grad():
        model.lm_head.weight *= 10
    return texts.Writer(model.requires_grad_(False), word_tokenizer(), tokens=6)


def test_texts_begin_with_the_prompt_and_are_drawn_from_all_tokens(writer):
    ids = writer.sample(64)
    first = writer.prompt.shape[1]
    assert ids.shape[0] == 64
    assert (ids[:, :first] == writer.prompt).all()
    assert ids.shape[1] <= first + 6
    assert ids[:, first:].unique().numel() > 50  # of 64: no top-k
    assert len(writer.texts(ids)) == 64


def test_log_probabilities_are_those_of_the_tokens_up_to_the_end(writer):
    end = writer.ends.item()
    first = writer.prompt.shape[1]
    made = torch.tensor([[9, 10, end, 0, 0], [9, 10, 11, 12, 13]])
    ids = torch.cat([writer.prompt.repeat(2, 1), made], 1)
    logits = writer.model(ids).logits.log_softmax(-1)
    expected = [
        sum(logits[row, first - 1 + i, made[row, i]] for i in range(count))
        for row, count in ((0, 3), (1, 5))
    ]
    assert torch.allclose(writer.log_probabilities(ids), torch.stack(expected), atol=1e-4)


def test_the_penalty_is_beta_times_the_divergence_from_the_start(writer):
    start = copy.deepcopy(writer.model)
    judge = texts.Judge(lambda some: [1.0] * len(some), 0.5, start)
    ids = writer.sample(4)
    assert torch.equal(judge.worth(writer, ids), torch.ones(4))  # nobody has moved yet
    with torch.no_grad():
        writer.model.lm_head.weight.mul_(1.5)
    moved = writer.log_probabilities(ids) - writer.log_probabilities(ids, start)
    assert moved.abs().min() > 1e-3
    assert torch.allclose(judge.worth(writer, ids), 1 - 0.5 * moved)
    free = texts.Judge(judge.score, 0.0, start)
    assert torch.equal(free.worth(writer, ids), torch.ones(4))
    judged = free.judged(writer, ids)
    assert torch.allclose(judged.log_ratios, moved)
    # over many texts the mean is a divergence: positive
    many = writer.sample(512)
    assert judge.judged(writer, many).log_ratios.mean() > 0


def test_each_row_s_penalty_is_that_of_its_own_displaced_weights(writer):
    """Inside a step the writer is displaced, row by row, and the start is not."""
    start = copy.deepcopy(writer.model)
    seen = []

    class Seen(texts.Judge):
        def worth(self, writer, ids):
            seen.append((ids, self.judged(writer, ids).log_ratios))
            return super().worth(writer, ids)

    cell = grid.Cell("style", grid.POPULATION, 1, 1, (0.0,), directions=4, beta=0.1)
    judge = Seen(lambda some: [float(i) for i in range(len(some))], cell.beta, start)
    population = methods.Population(writer, judge, cell, 0.0, 0)
    population.verify()
    assert not seen  # the checks generate nothing
    population.step()
    ((ids, ratios),) = seen
    assert ids.shape[0] == cell.texts == 8
    assert ratios.abs().min() > 0
    # displaced forth and back along the same direction, nearly opposite where texts are the same
    assert len({round(value, 6) for value in ratios.tolist()}) == 8
    rest = writer.log_probabilities(ids) - writer.log_probabilities(ids, start)
    assert torch.equal(rest, torch.zeros(8))


def test_directions_of_a_full_size_step_draw_noise_of_their_own_and_sides_the_same(writer):
    drawn = []

    class Seen(texts.Judge):
        def worth(self, writer, ids):
            drawn.append(ids)
            return super().worth(writer, ids)

    cell = grid.Cell("style", grid.FULL_SIZE, 1, 1, (0.0,), directions=3)
    judge = Seen(lambda some: [0.5] * len(some), 0.0, writer.model)
    full = methods.FullSize(writer, judge, cell, 0.0, 0)
    for group in full.optimizer.param_groups:
        group["mu"] = 1e-9  # so that only the noise tells texts apart
    full.verify()
    assert not drawn
    full.step()
    forth, back = drawn[::2], drawn[1::2]
    assert len(forth) == len(back) == 3
    assert all(torch.equal(a, b) for a, b in zip(forth, back, strict=True))
    assert not torch.equal(forth[0], forth[1])
    again = len(drawn)
    full.step()
    assert not torch.equal(drawn[again], drawn[0])


def test_a_policy_gradient_climbs(writer):
    def score(some):
        return [float(text.endswith("w9")) for text in some]

    cell = grid.Cell("style", grid.POLICY_GRADIENT, 1, 1, (1e-2,), rows=64)
    judge = texts.Judge(score, 0.0, copy.deepcopy(writer.model))
    torch.manual_seed(0)
    gradient = methods.PolicyGradient(writer, judge, cell, 3e-2, 0)
    before = sum(score(writer.texts(writer.sample(512)))) / 512
    for _ in range(20):
        gradient.step()
    assert sum(score(writer.texts(writer.sample(512)))) / 512 > before + 0.3


def test_seconds_to_a_reward_are_interpolated():
    curve = [
        dict(seconds=seconds, samples=10 * seconds, reward=reward)
        for seconds, reward in ((0.0, 0.1), (2.0, 0.3), (4.0, 0.2), (6.0, 0.7))
    ]
    run = dict(curve=curve)
    assert runs.reached(run, 0.1) == 0.0
    assert runs.reached(run, 0.2) == pytest.approx(1.0)
    assert runs.reached(run, 0.45) == pytest.approx(5.0)
    assert runs.reached(run, 0.45, "samples") == pytest.approx(50.0)
    assert runs.reached(run, 0.8) is None


def test_cells_have_folders_of_their_own():
    found = [cell for reward in grid.REWARDS for cell in grid.cells(reward)]
    assert len({cell.folder for cell in found}) == len(found)
    for cell in found:
        assert cell.steps % cell.eval_every == 0
        assert cell.reward in scores.SCORES
        assert cell.reward in report.TARGETS
        assert cell.method in grid.METHODS
    by_name = {cell.name: cell for cell in found if cell.reward == "style"}
    population = by_name["population, 64"]
    assert population.texts == by_name["policy-gradient"].texts == 128
    assert by_name["full-size, 4, 16 texts a side"].texts == 128
    assert not by_name["population, 64, noise of their own"].common


@pytest.fixture
def small(monkeypatch):
    """A cell of each method, for a score that random texts have."""

    def cells(reward):
        zo, fo = (1e-2, 1e-1), (1e-3,)
        yield grid.Cell(reward, grid.POPULATION, 6, 2, zo, directions=2)
        yield grid.Cell(reward, grid.POPULATION, 6, 2, zo, directions=4, rank=2, beta=0.1)
        yield grid.Cell(reward, grid.FULL_SIZE, 6, 1, zo, directions=2)
        yield grid.Cell(reward, grid.POLICY_GRADIENT, 6, 1, fo, rows=8)

    for module in (grid, command):
        monkeypatch.setattr(module, "cells", cells)

    def ends_with_a_small_digit(some):
        return [float(text[-1:] in set("01234")) for text in some]

    monkeypatch.setattr(runs, "TOKENS", 4)
    monkeypatch.setitem(scores.SCORES, "style", lambda data: ends_with_a_small_digit)
    return list(cells("style"))


@pytest.fixture
def arguments(tiny, tmp_path):
    out = tmp_path / "out"
    given = ["--model", str(tiny), "--rewards", "style", "--steps", "2", "--evaluation-texts", "8"]
    return [*given, "--seeds", "0", "1", "--out", str(out)]


def test_a_grid_is_run_measured_resumed_and_rendered(small, arguments, tmp_path):
    out = tmp_path / "out"
    assert command.main([*arguments, "--do", "runs"]) == 0
    made = {path: path.stat().st_mtime_ns for path in out.rglob("seed-*.json")}
    assert len(made) == 3 * (2 + 1) + (1 + 1)  # rates on one seed, the best one on the other
    assert command.main(arguments) == 0
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("seed-*.json")}
    for path in made:
        run = json.loads(path.read_text())
        points = run["curve"]
        assert [points[0]["step"], points[-1]["step"]] == [0, 2]
        assert [point["seconds"] for point in points] == sorted(p["seconds"] for p in points)
        assert (
            points[-1]["samples"]
            == 2
            * grid.Cell(
                **{**{k: run["settings"][k] for k in ("reward", "method", "directions", "rows")}},
                steps=1,
                eval_every=1,
                rates=(),
            ).texts
        )
        assert points[0]["kl"] == 0.0
        assert all(0 <= point["reward"] <= 1 for point in points)
        assert run["seconds_per_step"] > 0
    memory = json.loads((out / "memory.json").read_text())
    assert set(memory) == {cell.kind for cell in small}
    assert all(sizes["step"] >= sizes["plain"] > 0 for sizes in memory.values())
    table = (out / "table.md").read_text()
    for cell in small:
        assert f"| {cell.name} |" in table
    assert "## style-kl" in table
    for name in ("style.png", "style-kl.png"):
        assert (out / name).stat().st_size > 1000
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + len(made)


def test_the_same_run_gives_the_same_curve(small, arguments, tmp_path):
    cell = small[0]
    model = arguments[1]
    found = [
        runs.Runs(tmp_path / str(i), [0], model=model, steps=2, texts=8).run(cell, 0.1, 0)
        for i in range(2)
    ]
    rewards = [[(p["reward"], p["kl"]) for p in run["curve"]] for run in found]
    assert rewards[0] == rewards[1]
    assert not math.isclose(rewards[0][-1][1], 0.0)  # it has moved
    assert found[0]["texts"] == found[1]["texts"]


def test_a_run_by_other_settings_is_refused(small, tiny, tmp_path):
    gradient = small[-1]
    runs.Runs(tmp_path, [0], model=str(tiny), steps=1, texts=8).run(gradient, 1e-3, 0)
    with pytest.raises(RunError, match="a run with other settings"):
        runs.Runs(tmp_path, [0], model=str(tiny), steps=2, texts=8).run(gradient, 1e-3, 0)


def test_what_is_not_there_is_refused_or_left_out(small, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ZOFO_DATA", raising=False)
    with pytest.raises(SystemExit):
        command.main(["--do", "runs", "--out", str(tmp_path / "none")])
    assert "--model must be given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--do", "report", "--out", str(tmp_path / "none")])
    assert "--out must be a folder with runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--steps", "0", "--out", str(tmp_path)])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(Unfinished):
        runs.Runs(tmp_path, [0]).run(small[0], 0.1, 0)


def test_grpo_runs_on_the_same_rewards(tiny, tmp_path):
    pytest.importorskip("trl", reason="GRPO is trl's")
    cell = grid.Cell("style", grid.GRPO, 2, 1, (1e-3,), rows=8)
    run = runs.Runs(tmp_path, [0], model=str(tiny), texts=8).run(cell, 1e-3, 0)
    assert [point["step"] for point in run["curve"]] == [0, 1, 2]
    assert run["curve"][-1]["seconds"] > 0


def test_lines_of_the_table():
    cell = next(iter(grid.cells("style")))

    def run(seed, *rewards):
        curve = [
            dict(step=i, samples=128 * i, seconds=2.0 * i, reward=r, kl=float(i), worth=r)
            for i, r in enumerate(rewards)
        ]
        settings = dict(rate=3e-2, seed=seed)
        some = dict(start=["a"], end=["b"])
        return dict(
            curve=curve, settings=settings, seconds_per_step=2.0, verify_seconds=0.5, texts=some
        )

    results = [run(0, 0.0, 0.4, 0.8), run(1, 0.0, 0.2, 0.6)]
    one = report.Found(cell, {1e-2: results[0], 3e-2: results[0], 1e-1: results[0]}, results)
    sizes = {cell.kind: dict(plain=100, step=103)}
    row = report.table([one], sizes).splitlines()[2]
    assert [part.strip() for part in row.strip("| ").split("|")] == [
        *("population, 64", "0.03", "0.700 ± 0.141", "2.0 ± 0.0", "128", "2.00", "0.5"),
        *("1.5 ± 0.7", "3.0 ± 0.7", "-", "-", "1.03"),
    ]
    slow = [
        {**r, "curve": [{**p, "seconds": 30 * p["seconds"]} for p in r["curve"]]} for r in results
    ]
    full = next(c for c in grid.cells("style") if c.name == "full-size, 16")
    other = report.Found(full, {3e-2: slow[0]}, slow)
    assert "| full-size, 16 | 30.00 | 30.00 | - |" in report.ratios([one, other])
