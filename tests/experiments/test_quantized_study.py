"""The study of quantised bases: its formats, what learns in each cell, and its files."""

import json

import pytest
import torch
from small_models import quick_collections, tiny, words
from torch import nn

from experiments.partition import problems
from experiments.quantized import __main__ as command
from experiments.quantized import bases, grid, runs

pytest.importorskip("torchao", reason="formats of it are studied")
pytest.importorskip("bitsandbytes", reason="formats of it are studied")

__all__ = ["quick_collections", "tiny", "words"]

SIZES = problems.Sizes(24, 16, 16)


@pytest.fixture(scope="module")
def problem(tiny, words):
    found = problems.load(str(tiny), "sst2", str(words), SIZES)
    with torch.no_grad():  # or layers would hardly change what goes through
        for name, parameter in found.base.named_parameters():
            if "proj" in name:
                parameter.mul_(5)
    return found


@pytest.fixture(scope="module", params=bases.FORMATS)
def of_format(request, problem):
    return request.param, bases.with_base(problem, request.param)


def test_formats_change_the_linear_weights(of_format, problem):
    format, other = of_format
    names = [n for n, m in problem.base.named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        weight = other.base.get_submodule(name).weight
        if format == bases.BF16:
            assert weight.dtype == torch.bfloat16
        else:
            assert (type(weight) is nn.Parameter) == (name == "lm_head"), name
    near, far = problem.dev.mean_loss(problem.base), other.dev.mean_loss(other.base)
    assert near != far
    assert abs(near - far) < 0.2 * near


@pytest.mark.parametrize("method", [grid.ZO, grid.LORA, grid.HYBRID])
def test_what_learns(of_format, method):
    format, problem = of_format
    cell = grid.Cell(format, method)
    adapter = 1e-3 if method == grid.HYBRID else None
    setup = runs.set_up(problem, cell, 1e-3, adapter, seed=0)
    modes = {group["mode"]: group for group in setup.optimizer.param_groups}
    assert set(modes) == {grid.ZO: {"zo"}, grid.LORA: {"fo"}, grid.HYBRID: {"zo", "fo"}}[method]
    if "zo" in modes:
        names = [n for g in setup.optimizer.zo_groups() for n in g.names]
        scales = [n for n in names if n.endswith((".scale", ".absmax", ".SCB"))]
        assert (len(scales) == len(names) == 14) if cell.quantised else not scales
    kept = [p.detach().clone() for g in setup.optimizer.param_groups for p in g["params"]]
    setup.step(problem.train.batch([0, 1, 2, 3]))
    now = [p for g in setup.optimizer.param_groups for p in g["params"]]
    assert any(not torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_the_command_makes_reads_and_reports(tiny, words, tmp_path, capsys):
    asked = ["int8 (torchao), no training", "int8 (torchao), ZO"]
    few = ["--train-size", "24", "--dev-size", "8", "--test-size", "8", "--seeds", "0", "1"]
    arguments = ["--models", str(tiny), "--data", str(words), "--out", str(tmp_path), *few]
    starts = dict.fromkeys(grid.STUDIES[0].starts, 1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "STUDIES", (grid.Study("tiny", 2, 4, 1, starts),))
        assert command.main(["runs", *arguments, "--cells", *asked]) == 0
        made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed-*.json")}
        assert command.main([*arguments, "--cells", *asked]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed-*.json")} == made
    table = json.loads((tmp_path / "table.json").read_text())["tiny"]
    assert list(table) == asked
    assert len(table[asked[1]]["test_loss"]) == 2
    searched = {path.parent.name for path in made if "ZO" in str(path)}
    assert 3 <= len(searched) <= 5
    assert f"{table[asked[1]]['rate']:g}" in searched
    assert "| int8 (torchao) | ZO |" in (tmp_path / "table.md").read_text()
