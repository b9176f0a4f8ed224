"""The benchmarks: every one runs on tiny sizes, writes what it says, and refuses wrong results."""

import contextlib
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

for package in ("rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmarks need it")

from zofo_bench import (  # noqa: E402
    check,
    cli,
    foreach,
    machine,
    measure,
    mezo,
    perturb,
    plots,
    registry,
    report,
    timing,
)
from zofo_bench.check_step import check_step  # noqa: E402

import zofo_kernels  # noqa: E402
from zofo_optim import HybridZOFO  # noqa: E402
from zofo_optim.perturbation.base import Perturbation  # noqa: E402

CPU = torch.device("cpu")
BENCHMARKS = ["perturb", "step", "causal_lm", "streamed", "directions", "population", "journal"]
BENCHMARKS += ["growth", "many_tensors"]
NEED_TRANSFORMERS = ["step", "causal_lm", "streamed", "directions", "population", "journal"]
NEED_TRANSFORMERS += ["many_tensors"]
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


@pytest.fixture
def name(request):
    """A benchmark's name; its test is skipped where the models that it needs cannot be made."""
    if request.param in NEED_TRANSFORMERS:
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    return request.param


@pytest.fixture
def no_timed_verification(monkeypatch):
    """Fails where a closure is verified in any sample but its variant's first, the warm-up.

    Yields the list of those that verified.
    """
    verify, take = Perturbation._verify_once, timing._sample
    warm, samples, verified = set(), [], []

    def sample(run, *args):
        if run not in warm:
            warm.add(run)
            return take(run, *args)
        before = len(verified)
        seconds = take(run, *args)
        assert len(verified) == before, "timed a verification"
        samples.append(seconds)
        return seconds

    def spied(self, *args):
        verified.append(self)
        verify(self, *args)

    monkeypatch.setattr(timing, "_sample", sample)
    monkeypatch.setattr(Perturbation, "_verify_once", spied)
    yield verified
    assert samples


@pytest.mark.parametrize("name", BENCHMARKS, indirect=True)
def test_quick_run(name, tmp_path, capsys, no_timed_verification):
    assert cli.main(["--quick", "--repeats", "2", "--only", name, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "not measured" in printed
        assert [folder.name for folder in tmp_path.iterdir()] == ["cpu"]
    assert (tmp_path / "cpu" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
    assert result["schema"] == report.SCHEMA
    assert (result["benchmark"], result["device"], result["quick"]) == (name, "cpu", True)
    check_machine(result["machine"])
    assert result["numba_compile_seconds"] >= 0
    assert len({case["name"] for case in result["cases"]}) == len(result["cases"]) > 1
    for case in result["cases"]:
        check_case(case)
        for variant in case["variants"].values():
            assert ("torch_operations" in variant) == (name == "many_tensors")
            assert ("bytes_per_second" in variant) == (name == "perturb")
        if name in ("step", "causal_lm"):
            assert set(case["peak_bytes"]) == {"inference", *case["variants"]}
            peaks = dict(case["peak_bytes"])
            inference = peaks.pop("inference")
            assert 0 < inference <= min(peaks.values())
    assert bool(no_timed_verification) == (name not in ("perturb", "many_tensors"))


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
        known = {*case["variants"], *case.get("peak_bytes", {})}
        assert {comparison["top"], comparison["bottom"]} <= known
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
@pytest.mark.parametrize("name", BENCHMARKS, indirect=True)
def test_wrong_kernel_is_not_timed(name, kernel, tmp_path, capsys, monkeypatch):
    from zofo_kernels import cpu

    def never(*_):
        raise AssertionError("timed a wrong result")

    monkeypatch.setattr(cpu, kernel, wrong(getattr(cpu, kernel)))
    if kernel == "perturb":  # else the cases before the first update are right
        monkeypatch.setattr(cli, "measure", never)
    old = tmp_path / "cpu" / f"{name}.json"
    old.parent.mkdir()
    old.write_text("{}")
    assert cli.main(["--quick", "--repeats", "1", "--only", name, "--out", str(tmp_path)]) == 1
    assert "refused" in capsys.readouterr().out
    assert not old.exists()


def quick_case(name, start):
    """The first case of a benchmark's quick run whose name starts so."""
    cases = registry.REGISTRY[name].cases(registry.Context(CPU, quick=True))
    return next(case for case in cases if case.name.startswith(start))


@needs_numba
@pytest.mark.parametrize("name", ["streamed"], indirect=True)
def test_wrong_copies_are_found(name, monkeypatch):
    from zofo_kernels import cpu

    case = quick_case(name, "ZO, two-sided")
    monkeypatch.setattr(cpu, "perturb_copy", wrong(cpu.perturb_copy))
    with pytest.raises(registry.WrongResult, match="streamed loss"):
        case.check()


@pytest.mark.parametrize("name", ["step", "causal_lm"], indirect=True)
def test_wrong_first_order_weights_are_found(name, monkeypatch):
    from zofo_optim import first_order

    case = quick_case(name, "FO-LoRA")
    monkeypatch.setattr(first_order.FirstOrder, "step", lambda self: None)
    with pytest.raises(registry.WrongResult, match="first-order"):
        case.check()


@pytest.mark.parametrize("name", ["step"], indirect=True)
def test_evaluations_with_other_random_draws_are_found(name, monkeypatch):
    from zofo_optim import evaluation

    case = quick_case(name, "ZO, two-sided")  # with dropout
    monkeypatch.setattr(evaluation.GlobalRandomState, "restore", lambda self: None)
    with (
        pytest.warns(UserWarning, match="two losses at the same point"),
        pytest.raises(registry.WrongResult, match="random draws"),
    ):
        case.check()


def test_a_wrong_slope_is_found(monkeypatch):
    from zofo_optim import estimators

    case = quick_case("growth", "1,000")
    right = estimators.Estimator.differences
    monkeypatch.setattr(estimators.Estimator, "differences", lambda *args: 1.01 * right(*args))
    with pytest.raises(registry.WrongResult, match="projected gradient"):
        case.check()


def test_evaluations_at_the_wrong_weights_are_found(monkeypatch):
    from zofo_optim.perturbation import InPlacePerturbation

    case = quick_case("growth", "1,000")
    right = InPlacePerturbation.move
    monkeypatch.setattr(
        InPlacePerturbation, "move", lambda self, sample, sign: right(self, sample, -sign)
    )
    with pytest.raises(registry.WrongResult, match="weights of the evaluation"):
        case.check()


@pytest.mark.parametrize("verifications", [0, 2])
def test_evaluations_missing_or_too_many_are_found(verifications, monkeypatch):
    case = quick_case("growth", "1,000")
    right = Perturbation._verify_once

    def verify(self, *args):
        for _ in range(verifications):
            right(self, *args)

    monkeypatch.setattr(Perturbation, "_verify_once", verify)
    found = f"{2 + verifications} evaluations, should be 3"
    with pytest.raises(registry.WrongResult, match=found):
        case.check()


def test_verification_in_every_step_is_found(monkeypatch):
    case = quick_case("growth", "1,000")
    right = Perturbation.over

    def over(self, groups):
        self._verified = {}
        return right(self, groups)

    monkeypatch.setattr(Perturbation, "over", over)
    with pytest.raises(registry.WrongResult, match="second step: 3 evaluations, should be 2"):
        case.check()


def test_a_loss_that_does_not_repeat_is_found():
    weights = torch.ones(10)
    group = {"params": [weights], "param_names": ["w"], "mode": "zo", "lr": 1e-6, "mu": 1e-3}
    optimizer, calls = HybridZOFO([group]), []

    def closure():
        calls.append(1)
        return weights.sum() + len(calls)

    with (
        pytest.warns(UserWarning, match="two losses at the same point"),
        pytest.raises(registry.WrongResult, match="when repeated"),
    ):
        check_step("it", optimizer, closure, signs=(1, -1), distribution="gaussian")


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


def test_foreach_baseline_displaces_and_updates():
    start = [torch.randn(20_000) * 0.02, torch.randn(7)]
    weights = [w.clone() for w in start]
    foreach.perturb(weights, 1e-3, seed=3)
    moved = [(w - s) / 1e-3 for w, s in zip(weights, start, strict=True)]
    assert abs(float(moved[0].mean())) < 0.05
    assert abs(float(moved[0].std()) - 1) < 0.05
    foreach.restore_and_update(weights, -1e-3, 2.0, lr=1e-3, seed=3, weight_decay=0.1)
    for w, s, z in zip(weights, start, moved, strict=True):
        torch.testing.assert_close(w, s - 1e-3 * (2.0 * z + 0.1 * s), atol=1e-6, rtol=0)


def test_stock_triton_baseline_displaces(interpreted):
    from zofo_bench import stock_triton

    weights = [torch.randn(5_003) * 0.02, torch.randn(17)]
    tail = weights[1].clone()
    check.require_displacement(
        "tl.randn4x", lambda: stock_triton.perturb(weights, 1e-3, 7), weights, 1e-3
    )
    assert (weights[1] != tail).all()


@pytest.mark.parametrize("scale", [0.0, 0.9e-3, -1e-3, math.nan])
def test_a_baseline_that_displaces_wrongly_is_refused(scale):
    weights = [torch.zeros(100_000)]
    noise = torch.randn(100_000)
    if scale == -1e-3:
        noise += 0.1
    with pytest.raises(registry.WrongResult, match="deviation"):
        check.require_displacement("it", lambda: weights[0].add_(scale * noise), weights, 1e-3)


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


def test_host_time_ends_when_the_call_returns(monkeypatch):
    busy = []

    def wait(device):
        if busy:
            busy.clear()
            time.sleep(0.01)

    monkeypatch.setattr(timing, "synchronise", wait)
    variants, effort = {"launch": lambda: busy.append(1)}, timing.Effort(repeats=3, sample=0.0)
    whole = timing.interleave(variants, CPU, effort)["launch"]
    host = timing.interleave(variants, CPU, effort, host=True)["launch"]
    assert min(whole.seconds) >= 0.01 > max(host.seconds)


def test_operations_are_counted():
    counted = measure.count(lambda: torch.ones(2) + 1, CPU)
    assert counted == {"torch_operations": 2, "launches": None}


def test_launches_are_kernels_alone(monkeypatch):
    names = ["pass_kernel", "Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "pass_kernel"]

    class Profile(contextlib.nullcontext):
        def events(self):
            kinds = {"CUDA": names, "CPU": ["cuLaunchKernel"]}
            return [
                SimpleNamespace(name=name, device_type=SimpleNamespace(name=kind))
                for kind, found in kinds.items()
                for name in found
            ]

        def __enter__(self):
            return self

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    monkeypatch.setattr(measure, "synchronise", lambda device: None)
    assert measure.launches(lambda: None, torch.device("cuda")) == 2
    names.clear()
    assert measure.launches(lambda: None, torch.device("cuda")) is None


def test_targets_belong_to_a_device():
    def targets(kind, case, variants):
        found = perturb._comparisons(case, variants, kind)
        return {(c.name, c.shown_at): c.at_least for c in found if c.at_least is not None}

    variants = ["MeZO", "copy_", "add_"]
    assert targets("cpu", "perturb float32", variants) == {
        ("MeZO / this =", "zofo gaussian"): 20,
        ("MeZO / this =", "zofo rademacher"): 50,
    }
    assert targets("cpu", "perturb bfloat16", variants) == {}
    assert targets("cuda", "perturb bfloat16", variants) == {
        ("of copy bandwidth", "zofo gaussian"): 0.9,
        ("of copy bandwidth", "zofo rademacher"): 0.95,
        ("MeZO / this =", "zofo gaussian"): 10,
        ("MeZO / this =", "zofo rademacher"): 10,
    }


def example_case(**kwargs):
    """A case with one variant, compared with another's memory and host time."""
    memory = registry.Comparison(
        "memory", "a", "inference", "a", plus=-1, percent=True, at_most=0.01, of="peak_bytes"
    )
    host = registry.Comparison("host", "a", "a", "a", of="host_seconds")
    return registry.Case("c", {}, {"a": lambda: None}, lambda: None, [memory, host], **kwargs)


def test_memory_and_host_time_are_compared_where_measured():
    seconds = {"a": timing.Samples((1.0, 1.0), 1)}
    bare = report.case_result(example_case(), measure.Measured(seconds))
    assert bare["comparisons"] == []
    peaks = {"inference": 1000, "a": 1020}
    found = report.case_result(example_case(), measure.Measured(seconds, seconds, peaks))
    memory, host = found["comparisons"]
    assert math.isclose(memory["median"], 0.02)
    assert memory["met"] is False
    assert report.comparison_text(memory) == "memory 2.0%; target <= 1.0% [red]missed[/red]"
    assert host["median"] == 1
    assert found["peak_bytes"] == peaks
    assert found["variants"]["a"]["host_seconds"]["median"] == 1


def test_what_fits_in_memory_is_kept(tmp_path, capsys, monkeypatch):
    def cases(context):
        yield example_case(peaks=lambda: {"inference": 1000, "a": 1000})
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    entry = registry.Benchmark("large", "it is large", cases, plots.steps, ("cpu",), False)
    monkeypatch.setattr(registry, "REGISTRY", {"large": entry})
    assert cli.main(["--quick", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert "out of memory" in capsys.readouterr().out
    result = json.loads((tmp_path / "cpu" / "large.json").read_text())
    assert [case["name"] for case in result["cases"]] == ["c"]
    assert result["stopped"].startswith("out of memory")
    assert (tmp_path / "cpu" / "large.png").exists()


def test_only_the_device_asked_for(capsys, monkeypatch):
    asked = []
    entry = registry.Benchmark(
        "any", "it is", lambda c: iter(asked.append(c) or ()), plots.steps, ("cpu", "cuda"), False
    )
    monkeypatch.setattr(registry, "REGISTRY", {"any": entry})
    assert cli.main(["--device", "cpu"]) == 0
    assert [context.device for context in asked] == [CPU]
    assert "cuda" not in capsys.readouterr().out


def test_comparisons_are_taken_round_by_round():
    comparison = registry.Comparison("overhead", "a", "b", "a", plus=-1, percent=True, at_most=0.35)
    case = registry.Case("c", {}, {}, lambda: None, [comparison])
    drifting = {
        "a": timing.Samples((1.2, 2.4, 12.0), 1),
        "b": timing.Samples((1.0, 2.0, 10.0), 1),
    }
    found = report.case_result(case, measure.Measured(drifting))["comparisons"][0]
    assert all(math.isclose(found[key], 0.2) for key in SPREAD)
    assert found["met"] is True
    assert "20.0%" in report.comparison_text(found)
    assert "target <= 35.0%" in report.comparison_text(found)


def test_arguments_are_checked(capsys):
    for arguments in (["--only", "nothing"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
    assert ", ".join(BENCHMARKS) in capsys.readouterr().err


def test_results_of_a_gpu_go_to_a_folder_of_its_name(monkeypatch):
    assert machine.folder(CPU) == "cpu"
    for name, expected in (("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert machine.folder(torch.device("cuda", 0)) == expected
