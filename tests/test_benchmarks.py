"""The benchmarks: every one runs on tiny sizes, writes what it says, and refuses wrong results."""

import json
import math

import pytest
import torch

for package in ("rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need it")

from zofo_bench import cli, mezo, registry, report, timing  # noqa: E402

import zofo_kernels  # noqa: E402

CPU = torch.device("cpu")
SPREAD = {"median", "p20", "p80"}
needs_numba = pytest.mark.skipif(
    zofo_kernels.unavailable_reason("cpu") is not None, reason="the CPU backend needs numba"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny sizes gain nothing from threads, and other tests run at the same time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_random_state():
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("name", ["perturb", "many_tensors", "step", "growth"])
def test_quick_run(name, tmp_path, capsys):
    if name in ("many_tensors", "step"):
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    assert cli.main(["--quick", "--repeats", "2", "--only", name, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "not measured" in printed
        assert not (tmp_path / "cuda").exists()
    assert (tmp_path / "cpu" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
    assert result["schema"] == report.SCHEMA
    assert (result["benchmark"], result["device"], result["quick"]) == (name, "cpu", True)
    check_machine(result["machine"])
    assert result["numba_compile_seconds"] >= 0
    assert len({case["name"] for case in result["cases"]}) == len(result["cases"]) > 1
    for case in result["cases"]:
        check_case(case)


def check_machine(machine):
    assert machine["cores"] >= 1
    assert machine["torch_threads"] == 1
    assert machine["cpu"]
    assert machine["python"]
    assert machine["date"].endswith("UTC")
    assert machine["memory_bytes"] > 1 << 20
    assert machine["versions"]["torch"].startswith("2")
    assert {"numba", "numpy"} <= set(machine["versions"])


def check_case(case):
    assert case["sizes"]["dtype"] in ("float32", "bfloat16", "float16")
    for variant in case["variants"].values():
        assert set(variant["seconds"]) == SPREAD
        assert 0 < variant["seconds"]["p20"] <= variant["seconds"]["median"]
        assert variant["seconds"]["median"] <= variant["seconds"]["p80"]
        assert variant["repeats"] == 2
        assert variant["calls_per_repeat"] >= 1
    for comparison in case["comparisons"]:
        assert {comparison["top"], comparison["bottom"]} <= set(case["variants"])
        assert comparison["p20"] <= comparison["median"] <= comparison["p80"]
        targeted = comparison["at_least"] is not None or comparison["at_most"] is not None
        assert isinstance(comparison["met"], bool) == targeted


def wrong(function):
    """The kernel, and then one weight in a thousand is a little off."""

    def kernel(slots, *args):
        function(slots, *args)
        for slot in slots:
            slot.tensor.view(-1)[::1000] += 1e-2

    return kernel


@needs_numba
@pytest.mark.parametrize("kernel", ["perturb", "update"])
@pytest.mark.parametrize("name", ["perturb", "many_tensors", "step", "growth"])
def test_wrong_kernel_is_not_timed(name, kernel, tmp_path, capsys, monkeypatch):
    if name in ("many_tensors", "step"):
        pytest.importorskip("transformers")
    from zofo_kernels import cpu

    def never(*_):
        raise AssertionError("timed a wrong result")

    monkeypatch.setattr(cpu, kernel, wrong(getattr(cpu, kernel)))
    if kernel == "perturb":  # else the cases before the first update are right
        monkeypatch.setattr(cli, "interleave", never)
    old = tmp_path / "cpu" / f"{name}.json"
    old.parent.mkdir()
    old.write_text("{}")
    assert cli.main(["--quick", "--repeats", "1", "--only", name, "--out", str(tmp_path)]) == 1
    assert "refused" in capsys.readouterr().out
    assert not old.exists()


def test_wrong_first_order_weights_are_found(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from zofo_optim import first_order

    step = registry.REGISTRY["step"].cases(registry.Context(CPU, quick=True))
    case = next(case for case in step if case.name.startswith("FO-LoRA"))
    monkeypatch.setattr(first_order.FirstOrder, "step", lambda self: None)
    with pytest.raises(registry.WrongResult, match="first-order"):
        case.check()


def test_mezo_recipe_displaces_by_eps_and_comes_back():
    start = torch.randn(100_000) * 0.02
    weights = start.clone()
    mezo.perturb([weights], 1e-3, seed=3, scaling_factor=1)
    moved = (weights - start) / 1e-3
    assert abs(float(moved.mean())) < 0.02
    assert abs(float(moved.std()) - 1) < 0.02
    mezo.perturb([weights], 1e-3, seed=3, scaling_factor=-2)
    torch.testing.assert_close((start - weights) / 1e-3, moved, atol=1e-4, rtol=0)
    mezo.perturb([weights], 1e-3, seed=3, scaling_factor=1)
    torch.testing.assert_close(weights, start, atol=1e-7, rtol=0)
    mezo.update([weights], projected_grad=2.0, lr=1e-3, seed=3, weight_decay=0.1)
    expected = start - 1e-3 * (2.0 * moved + 0.1 * start)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def test_mezo_step_descends_along_its_direction():
    weights = torch.ones(1000)
    step = mezo.MeZO([weights], lambda: (weights**2).sum(), lr=1e-4, eps=1e-3)
    before = float((weights**2).sum())
    for _ in range(20):
        step.step()
    assert float((weights**2).sum()) < before


def test_variants_are_timed_in_turn():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    samples = timing.interleave(variants, CPU, timing.Effort(repeats=5, sample=0.0))
    assert calls[-10:] == ["a", "b"] * 5
    assert {len(s.seconds) for s in samples.values()} == {5}


def test_slow_cases_get_fewer_repeats_within_the_budget(monkeypatch):
    monkeypatch.setattr(timing, "_sample", lambda run, calls, device: run())
    samples = timing.interleave({"a": lambda: 1.0}, CPU, timing.Effort(repeats=50, budget=0.0))
    assert len(samples["a"].seconds) == timing.LEAST_REPEATS


def test_comparisons_are_taken_round_by_round():
    comparison = registry.Comparison("overhead", "a", "b", "a", plus=-1, percent=True, at_most=0.35)
    case = registry.Case("c", {}, {}, lambda: None, [comparison])
    drifting = {
        "a": timing.Samples((1.2, 2.4, 12.0), 1),
        "b": timing.Samples((1.0, 2.0, 10.0), 1),
    }
    found = report.case_result(case, drifting)["comparisons"][0]
    assert all(math.isclose(found[key], 0.2) for key in SPREAD)
    assert found["met"] is True
    assert "20.0%" in report.comparison_text(found)
    assert "target <= 35.0%" in report.comparison_text(found)


def test_arguments_are_checked(capsys):
    for arguments in (["--only", "nothing"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
    assert "perturb, many_tensors, step, growth" in capsys.readouterr().err
