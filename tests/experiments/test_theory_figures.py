"""Figures of theory: Example 2.3 against its closed form, and all of them on a small model."""

import json
import math
from itertools import islice, pairwise

import pytest
import torch
from small_models import quick_collections, tiny, words

from experiments.partition.problems import batches
from experiments.theory import __main__ as command
from experiments.theory import example23, fig2, numbers, scatter, studies, trajectory
from experiments.theory.options import FIGURES

__all__ = ["quick_collections", "tiny", "words"]

A, B = example23.A, example23.B
STUDY = studies.Study("sst2-sentences", 0.1, 5, 2, 2, 4, (1e-4, 0.1), 2)


def test_example_23_is_the_papers():
    """One step takes both to 0 with a rate each; one rate is slow in y, or diverges in x."""
    small, large, both = (
        list(example23.descend(1, *rates, seed=3, steps=3)) for rates in example23.RATES.values()
    )
    assert both[1] == pytest.approx({"x": 0, "y": 0}, abs=1e-12)
    for step, point in enumerate(small):
        assert point["y"] == pytest.approx((1 - B / A) ** step)
    assert small[1]["x"] == pytest.approx(0, abs=1e-12)
    for before, after in pairwise(large):
        assert after["x"] == pytest.approx((A / B - 1) * before["x"])
        assert after["y"] == pytest.approx(0, abs=1e-12)


def test_a_diverging_run_ends_early():
    points = list(example23.descend(1, 1 / (2 * B), 1 / (2 * B), seed=0, steps=100))
    assert len(points) < 10
    assert points[-1]["x"] > example23.DIVERGED > points[-2]["x"]


@pytest.mark.parametrize(("d", "share"), [(3, 1.0), (9, 1.0), (9, 2.0)])
def test_the_factor_of_zeroth_order_in_d_dimensions(d, share):
    lr = share / (2 * A * d)
    mean, error = example23.factors(d, lr, repeats=20)
    expected = example23.expected_factor(d, lr)
    assert abs(mean - expected) < 4 * error
    assert expected == pytest.approx(1 - 1 / d if share == 1.0 else 1)


def test_points_of_a_run():
    assert trajectory.places(300, 3) == [0, 75, 300]
    assert trajectory.places(2, 5) == [0, 1, 2]
    assert trajectory.places(7, 1) == [0]


def test_pairs_have_the_norm_of_the_whole_gradient():
    def row(step, block, gradient, largest):
        return {"seed": 0, "step": step, "block": block} | {
            "gradient_norm": gradient,
            "largest": largest,
        }

    rows = [row(0, "base", 3.0, -5.0), row(0, "adapter", 4.0, 1.0), row(2, "base", 1.0, 2.0)]
    rows.append(row(5, "base", 1.0, None))  # an eigenvalue that was not found
    assert scatter.pairs_of(rows) == {"base": ([5.0, 1.0], [5.0, 2.0]), "adapter": ([5.0], [1.0])}
    assert scatter.log_correlation([1, 10, 100], [3, 30, 300]) == pytest.approx(1)


@pytest.fixture(scope="module")
def arguments(tiny, words):
    given = ["--models", str(tiny), "--data", str(words), "--seeds", "0", "--vectors", "2"]
    return [*given, "--train-size", "24", "--dev-size", "8", "--batch-size", "4"]


@pytest.fixture(scope="module")
def made(arguments, tmp_path_factory):
    """All figures."""
    out = tmp_path_factory.mktemp("theory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(studies.STUDIES, "tiny", (STUDY,))
        patch.setattr(example23, "REPEATS", 2)
        assert command.main([*FIGURES, *arguments, "--out", str(out)]) == 0
    return out


def contents(out, name):
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


def test_what_is_written(made, tiny):
    pictures = {path.stem for path in made.glob("*.png")}
    assert pictures == {
        *("example23", "displacement", "fig2-tiny", "fig1a-tiny", "fig1b-tiny"),
        "scatter-tiny-sst2-sentences",
    }
    assert all(path.stat().st_size > 1000 for path in made.glob("*.png"))
    text = (made / "table.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"## {name}\n" in text
        assert str(tiny.parent) not in json.dumps(contents(made, name))
    for line in text.splitlines():
        assert "nan" not in line


def test_rows_of_figure_1(made):
    (whole,) = contents(made, "fig1a")["result"].values()
    assert [(row["step"], row["batch"], row["block"]) for row in whole] == [
        (step, kind, "model") for step in (0, 5) for kind in ("next", "same")
    ]
    parts = contents(made, "fig1b")["result"]
    assert list(parts) == [f"tiny, sst2-sentences, {adapter}" for adapter in ("lora", "prompt")]
    for rows in parts.values():
        assert [(row["step"], row["block"]) for row in rows] == [
            (step, block) for step in (0, 5) for block in ("base", "adapter")
        ]
        for row in rows:
            # the largest eigenvalue is at most the Frobenius norm, which has an error here
            assert 0 < abs(row["largest"]) < row["frobenius"] + 6 * row["frobenius_error"]


def test_the_run_is_plain_sgd(made, tiny, words):
    """Loss and gradient of the last point, by hand: on the next batch and on the same one."""
    given = command.TheoryOptions(data=str(words), train_size=24, dev_size=8, batch_size=4)
    problem = trajectory.problem_of(given, str(tiny), STUDY)
    model, blocks = trajectory.blocks_of(problem, "fo", 0)
    taken = list(islice(batches(problem, 4, 0), 6))
    (whole,) = contents(made, "fig1a")["result"].values()

    def gradients(batch):
        model.zero_grad()
        loss = problem.train.losses(model, batch).mean()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in blocks["model"]]).norm()
        return pytest.approx((loss.item(), norm.item()), rel=1e-4)

    def seen(row):
        return row["loss"], row["gradient_norm"]

    same = next(batches(problem, 4, trajectory.APART))
    first, first_same, last, last_same = whole
    assert seen(first_same) == gradients(same)
    assert seen(first) == gradients(taken[0])
    for batch in taken[:5]:
        gradients(batch)
        with torch.no_grad():
            for p in blocks["model"]:
                p -= 0.1 * p.grad
    assert seen(last) == gradients(taken[5])
    assert seen(last_same) == gradients(same)


def test_figure_2_has_three_panels(made):
    (panels,) = contents(made, "fig2")["result"].values()
    three = ["zo", "fo-prompt", "hybrid-prompt"]
    assert {heading: list(lines) for heading, lines in panels.items()} == {
        "small rate, 0.0001": three,
        "large rate, 0.1": three,
        "base 0.0001, adapter 0.1": ["hybrid-prompt"],
    }
    folder = made / "runs" / "fig2" / "tiny" / "sst2-sentences" / "rates"
    for file in folder.glob("*/seed-0/settings.json"):
        settings = json.loads(file.read_text())
        assert (settings["optimizer"], settings["schedule"]) in (
            ("sgd", "constant"),
            ("adamw", "constant"),  # zo has no use for one
        )
        assert (settings["optimizer"] == "sgd") == (settings["method"] != "zo")


def test_runs_that_diverge_are_told(made):
    content = contents(made, "fig2")
    (panels,) = content["result"].values()
    (run,) = panels["large rate, 0.1"]["zo"]
    for loss in (None, math.nan, 1e9):
        last = {**run["curve"][-1], "train_loss": loss, "loss": loss}
        broken = {**run, "curve": [*run["curve"][:-1], last]}
        panels["large rate, 0.1"]["zo"] = [broken, broken]
        (line,) = [x for x in fig2.table(content).splitlines() if "large rate, 0.1 | zo" in x]
        assert line.endswith("| diverges | diverges |")


def test_displacements_of_medium_length_are_exact(made):
    result = contents(made, "displacement")["result"]
    (blocks,) = result["models"].values()
    assert set(blocks) == {"base", "adapter"}
    for block in blocks.values():
        norms = dict(zip(result["lengths"], block["norms"], strict=True))
        assert norms[1e-2] == pytest.approx(block["exact"], rel=0.02)


def test_scatter_has_fits_of_all_points(made):
    (blocks,) = contents(made, "scatter")["result"].values()
    assert set(blocks) == {"base", "adapter"}
    for one in blocks.values():
        norms, curvatures = one["points"]
        fit = one["fit"]
        assert fit["points"] == len(norms) == 4
        for norm, curvature in zip(norms, curvatures, strict=True):
            bound = fit["factor"] * (fit["constant"] + fit["slope"] * norm ** fit["exponent"])
            assert curvature <= bound * (1 + 1e-9)


def test_runs_there_are_not_made_again(made, arguments, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "tiny", (STUDY,))

    def refuse(*given):
        raise AssertionError("loaded")

    for module in (trajectory, scatter, command.fig1):
        monkeypatch.setattr(module, "problem_of", refuse)
    before = {name: contents(made, name)["result"] for name in ("fig1a", "fig1b", "scatter")}
    assert command.main(["fig1a", "fig1b", "scatter", *arguments, "--out", str(made)]) == 0
    assert {name: contents(made, name)["result"] for name in before} == before
    with pytest.raises(SystemExit):
        command.main(["fig1a", *arguments, "--out", str(made), "--steps", "2"])
    assert "holds a run with other settings" in capsys.readouterr().err


def test_too_few_points_for_a_fit_are_refused(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(studies.STUDIES, "tiny", (STUDY,))
    with pytest.raises(SystemExit):
        command.main(["scatter", *arguments, "--points", "3", "--out", str(tmp_path)])
    assert "--points and --seeds must give at least 4 points, got 3" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_model_without_a_study_is_refused(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["fig1a", *arguments, "--out", str(tmp_path)])
    assert "--models must be of all-minilm-l6-v2, stories260k, got" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--vectors", "--points", "--steps"])
def test_numbers_must_be_in_range(flag, capsys):
    with pytest.raises(SystemExit):
        command.main(["example23", flag, "0"])
    assert f"{flag} must be at least" in capsys.readouterr().err


def test_numbers_are_short():
    shown = [numbers.short(value) for value in (2217.4, 0.01961, -3.0, 1234567.0, 1e-9)]
    assert shown == ["2,220", "0.0196", "-3", "1.23e+06", "1e-09"]
    assert numbers.with_error(390.4, 13) == "390 ± 10"


def test_geometric_means():
    assert command.fig1.size([{"h": -2.0}, {"h": 8.0}], "h") == pytest.approx(4)
    assert command.fig1.size([{"h": 2.0}, {"h": None}], "h") == 2
    assert command.fig1.size([{"h": 0.0}, {"h": 8.0}], "h") == 0
    assert math.isfinite(command.fig1.size([{"h": 1e-30}, {"h": 1e30}], "h"))
