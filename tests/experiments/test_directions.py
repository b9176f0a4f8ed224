"""The grid that compares kinds of directions: its cells, its runs, times and report."""

import json

import pytest
from small_models import SIZES, quick_collections, tiny, words

from experiments.directions import __main__ as command
from experiments.directions import grid, report, runs

__all__ = ["quick_collections", "tiny", "words"]


def every_cell(study):
    return [cell for some in grid.cells(study) for cell in some]


def test_cells_have_folders_of_their_own_and_three_rates_or_more():
    for study in grid.STUDIES:
        found = every_cell(study)
        assert len({cell.folder for cell in found}) == len(found)
        for cell in found:
            assert len(set(cell.rates)) >= 3
            assert cell.steps % cell.eval_every == 0
            assert (cell.after is None) == (not cell.method.startswith("hybrid"))
            if cell.after is not None:
                assert cell.after.method.split("-")[1] == cell.method.split("-")[1]


@pytest.fixture
def small(monkeypatch):
    """Two rates of two kinds and of one adapter."""
    kinds = (grid.BASELINE, grid.BESIDE_ADAPTERS, grid.NORMALIZED)
    study = grid.Study(
        "tiny", {"copa": (4, kinds)}, evaluations=2, zo=(1e-4, 1e-3), beside=(1e-4,), fo=(1e-3,)
    )
    for module in (grid, command):
        monkeypatch.setattr(module, "STUDIES", (study,))
    monkeypatch.setattr(grid, "ADAPTERS", ("prompt",))
    monkeypatch.setattr(grid, "ADAPTER_RATES", (1e-2, 1e-1))
    monkeypatch.setattr(grid, "NORMALIZED_RATES", (1e-3, 1e-2))
    return study


@pytest.mark.parametrize("given", [["--methods", "zo"], ["--steps", "2"], ["--rank", "4"]])
def test_what_the_grid_sets_cannot_be_given(given, small, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*given, "--out", str(tmp_path)])
    assert f"{given[0]} cannot be given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert given[0] not in capsys.readouterr().out


def test_a_report_needs_runs(small, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--do", "report", "--out", str(tmp_path / "none")])
    assert "--out must be a folder with runs" in capsys.readouterr().err


def test_a_rate_that_diverges_with_another_seed_is_left_out(small, tmp_path):
    cell = next(cell for some in grid.cells(small) for cell in some)
    losses = {1e-4: {0: (3.0, 2.0), 1: (3.0, 2.1)}, 1e-3: {0: (3.0, 1.0), 1: (3.0, 3.1)}}
    for rate, by_seed in losses.items():
        for seed, (start, end) in by_seed.items():
            folder = tmp_path / cell.folder / f"{rate:g}" / f"seed-{seed}"
            folder.mkdir(parents=True)
            result = dict(best=dict(loss=min(start, end)), curve=[dict(loss=start), dict(loss=end)])
            (folder / "result.json").write_text(json.dumps(result))
    assert runs.Searches(None, tmp_path, [0]).best(cell) == 1e-3
    searches = runs.Searches(None, tmp_path, [0, 1])
    assert searches.best(cell) == 1e-4
    assert [run["curve"][-1]["loss"] for run in searches.results(cell)] == [2.0, 2.1]


def test_a_grid_is_run_timed_and_rendered(small, tiny, words, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = [*SIZES, "--model", str(tiny), "--data", str(words), "--seeds", "0", "1"]
    arguments += ["--rounds", "2", "--out", str(out)]
    for share in ("1", "2"):
        assert command.main([*arguments, "--do", "runs", "--share", share, "2"]) == 0
    made = sorted(path.parent for path in out.rglob("result.json"))
    # rates on one seed and the best on the other, of three kinds, an adapter, hybrid and full
    least = 3 * (2 + 1) + (2 + 1) + (1 + 1) + (1 + 1)
    assert least <= len(made) <= least + 4  # more where the best diverges on the other
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert command.main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}

    searches = runs.Searches(None, out / "tiny", [0, 1])
    by_name = {cell.name: cell for cell in every_cell(small)}
    for cell in by_name.values():
        losses = {rate: run["best"]["loss"] for rate, run in searches.searched(cell).items()}
        (first, second) = searches.results(cell)
        ends = [run["curve"][-1]["loss"] for run in (first, second)]
        if losses[searches.best(cell)] > min(losses.values()):  # the lowest one has diverged
            starts = [run["curve"][0]["loss"] for run in (first, second)]
            assert all(end <= start for start, end in zip(starts, ends, strict=True))
        assert (first["seed"], second["seed"]) == (0, 1)
        assert first["settings"]["estimator"] == (
            "one_sided" if cell.method.startswith("hybrid") else "two_sided"
        )
    hybrid = by_name["hybrid-prompt, rank 1, per example"]
    (run, _) = searches.results(hybrid)
    assert run["settings"]["lr_fo"] == searches.best(by_name["fo-prompt"])

    times = json.loads((out / "tiny" / "times-copa.json").read_text())["steps"]
    assert set(times) == {*by_name, report.RECIPE}
    assert all(step["seconds"] > 0 for step in times.values())
    table = (out / "table.md").read_text()
    for name in by_name:
        assert f"| {name} |" in table
    assert "One rate for several models" in table
    assert (out / "tiny-copa.png").stat().st_size > 1000
    lines = (out / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + least


def test_steps_and_seconds_to_a_loss():
    cell = every_cell(grid.STUDIES[0])[0]

    def run(seed, *losses):
        curve = [dict(step=10 * i, loss=loss) for i, loss in enumerate(losses)]
        settings = {cell.rate: 1e-4, "seed": seed}
        scores = dict(loss=2.0, accuracy=0.5)
        return dict(curve=curve, seed=seed, settings=settings, test=scores, steps=20, scored=False)

    found = [run(0, 5.0, 3.0, 1.0), run(1, 5.0, 4.0, 2.0)]
    times = {cell.name: dict(seconds=0.5), report.RECIPE: dict(seconds=2.0)}
    one = report.Found("a task", [cell], {cell: {1e-4: found[0]}}, {cell: found}, times)
    assert one.reached(cell, 3.5) == 10
    assert one.reached(cell, 1.4) is None
    assert one.end(cell) == 1.5
    text = report.alone(one)
    assert "MeZO's recipe ends at 1.500 after 20 steps of 2000 ms, 40.0 s" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {cell.name}"))
    cells = [part.strip() for part in row.strip("| ").split("|")]
    assert cells == [
        cell.name,
        "0.0001",
        "1.500 ± 0.707",
        "2.000 ± 0.000",
        "500",
        "20",
        "10.0",
        "4.0",
    ]


def test_models_without_a_study_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--model", "gpt2", "--out", str(tmp_path)])
    assert "--model must be one of stories260k, minilm, got 'gpt2'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--share", "3", "2", "--out", str(tmp_path)])
    assert "--share must be" in capsys.readouterr().err
