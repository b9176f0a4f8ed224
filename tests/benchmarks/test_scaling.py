"""The model of scaling, term by term, and the benchmark whose measurements it is held against."""

import itertools
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import needs_cpu_sharding

for package in ("rich", "matplotlib", "transformers", "peft"):
    pytest.importorskip(package, reason="the benchmarks need it")

from zofo_bench import projections, scaling  # noqa: E402
from zofo_bench.cluster import ETHERNET, GPU, INFINIBAND, NVLINK  # noqa: E402
from zofo_bench.ranks import FURTHER, SUMMED, TINY  # noqa: E402
from zofo_bench.scaling import LLAMA_7B, LLAMA_70B, STRATEGIES, Work, projected  # noqa: E402
from zofo_bench.scaling_check import fitted, modelled, predicted  # noqa: E402
from zofo_bench.traffic import Traffic  # noqa: E402

ROOT = Path(__file__).parents[2]
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
ZO = [name for name in STRATEGIES if name.startswith("ZO")]
BY_SCALARS = [name for name in ZO if "FSDP" not in name and "tensor" not in name]


def step(name, gpus, model=LLAMA_7B, network=INFINIBAND, gpu=None, work=None):
    return STRATEGIES[name](model, gpu or GPU(), network, gpus, work or Work())


# ---- collectives --------------------------------------------------------------------------------


def test_a_large_sum_takes_its_bytes_over_the_bandwidth():
    """Twice (n - 1) / n of them, as a ring sends; between nodes over all of a node's links."""
    for gpus, bandwidth in ((2, NVLINK), (8, NVLINK), (64, 8 * INFINIBAND.between)):
        bandwidth = min(bandwidth, NVLINK)
        wanted = 2 * (gpus - 1) / gpus * 1e12 / bandwidth
        assert INFINIBAND.all_reduce(gpus, 1e12) == pytest.approx(wanted, rel=0.01)
        assert INFINIBAND.all_gather(gpus, 1e12 / gpus) == pytest.approx(wanted / 2, rel=0.01)


def test_small_ones_take_their_steps():
    """By NCCL's numbers: a ring of 8 has 7 steps; of 1,024 it has 127 between nodes."""
    assert INFINIBAND.all_gather(8, 32) == pytest.approx(3.6e-6 + 7 * 0.47e-6, rel=0.01)
    wanted = 3.6e-6 + 896 * 0.47e-6 + 127 * 2.7e-6
    assert INFINIBAND.all_gather(1024, 32) == pytest.approx(wanted, rel=0.01)
    tree = 4.4e-6 + 14 * 0.52e-6 + 14 * 5.0e-6
    assert INFINIBAND.all_reduce(1024, 32) == pytest.approx(tree, rel=0.01)


def test_collectives_of_one_gpu_and_of_one_node_cost_nothing():
    assert INFINIBAND.all_gather(1, 1e9) == INFINIBAND.all_reduce(1, 1e9) == 0.0
    assert INFINIBAND.replicas(1, 1e9) == 0.0


def test_what_arithmetic_hides():
    half = replace(INFINIBAND, hidden=0.5)
    assert [INFINIBAND.exposed(3.0, beside) for beside in (1.0, 5.0)] == [2.0, 0.0]
    assert [half.exposed(3.0, beside) for beside in (1.0, 5.0)] == [2.5, 1.5]


# ---- one GPU ------------------------------------------------------------------------------------


def test_the_passes_of_a_step_in_place():
    """12 bytes a parameter in bf16 at 4.3 TB/s: 7 billion in 20 ms; the last one is at the edge
    between memory and instructions."""
    model = replace(LLAMA_7B, parameters=7e9)
    found = step("ZO, data parallel", 1, model)
    assert found.passes == pytest.approx(84e9 / 4.32e12, rel=0.03)
    assert found.compute == pytest.approx(2 * 2 * 7e9 * 2048 / (0.5 * 989e12))
    assert found.memory == pytest.approx(14e9 + 2048 * (10 * 32000 + 34 * 4096))


def test_a_sweep_is_bound_by_memory_or_by_instructions():
    gpu = GPU(bandwidth=10.0, issue=100.0)
    assert gpu.sweep(50.0, 100.0) == 5.0
    assert gpu.sweep(50.0, 1000.0) == 10.0


def test_first_order_holds_states_and_activations():
    more = step("FO, DDP", 1).memory - step("ZO, data parallel", 1).memory
    kept = 34 * 2048 * 4096 * 32
    assert more == pytest.approx(14 * LLAMA_7B.parameters + kept)


# ---- many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [2, 8, 1024])
@pytest.mark.parametrize("name", BY_SCALARS)
def test_bytes_of_zeroth_order_do_not_depend_on_the_model(name, gpus):
    assert step(name, gpus).sent == step(name, gpus, LLAMA_70B).sent <= 64


@pytest.mark.parametrize("name", ["FO, DDP", "FO, FSDP2", "ZO, FSDP2"])
def test_bytes_of_gradients_and_of_gathered_weights_do(name):
    twice = replace(LLAMA_7B, parameters=2 * LLAMA_7B.parameters)
    one, two = (step(name, 8, model).sent for model in (LLAMA_7B, twice))
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert one > LLAMA_7B.parameters / 8


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_gpu_sends_nothing(name):
    found = step(name, 1)
    assert found.sent == found.exposed == 0.0


@pytest.mark.parametrize("network", [INFINIBAND, ETHERNET], ids=lambda network: network.name)
@pytest.mark.parametrize("name", STRATEGIES)
def test_more_gpus_do_not_make_communication_cheaper(name, network):
    """But where each has a smaller shard to send."""
    found = [step(name, gpus, network=network).exposed for gpus in GPUS]
    sharded = "FO, FSDP2" in name
    for before, after in itertools.pairwise(found):
        assert after >= before * (1 - 1e-9) or sharded
    assert found[-1] >= found[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_slower_network_or_gpu_is_never_faster(name):
    for gpus in GPUS:
        fast = step(name, gpus).seconds
        assert step(name, gpus, network=ETHERNET).seconds >= fast
        assert step(name, gpus, gpu=GPU(bandwidth=1e12)).seconds > fast
        assert step(name, gpus, gpu=GPU(flops=1e14)).seconds > fast


def test_where_scalars_are_exchanged_the_slow_network_costs_what_the_fast_one_does():
    for name in BY_SCALARS:
        slow, fast = (step(name, 1024, network=n).seconds for n in (ETHERNET, INFINIBAND))
        assert slow == pytest.approx(fast, rel=1e-3)
    assert step("FO, DDP", 1024, network=ETHERNET).seconds > 5 * step("FO, DDP", 1024).seconds


def test_an_update_by_the_samples_of_all_gpus_grows_with_them():
    """Each draws the directions of all: that is what ends this way of scaling."""
    for name, instructions in (("ZO, samples in parallel", 6.2), ("ZO, samples of rank 1", 2.0)):
        passes = [step(name, gpus).passes for gpus in (512, 1024)]
        more = 512 * instructions * LLAMA_7B.parameters / GPU().issue
        assert passes[1] - passes[0] == pytest.approx(more)
        assert step(name, 1024).compute == step(name, 1).compute


def test_examples_with_directions_of_their_own_count_as_samples():
    one = scaling.zo_per_example(4)(LLAMA_7B, GPU(), INFINIBAND, 256, Work())
    assert one.passes == step("ZO, samples of rank 1", 1024).passes


def test_shards():
    """Of a node, or of as many GPUs more as the weights need; a layer at a time is whole."""
    whole = step("ZO, FSDP2", 1, LLAMA_70B).memory
    sharded = step("ZO, FSDP2", 64, LLAMA_70B).memory
    layers = 2 * LLAMA_70B.weights / 80
    assert whole - sharded == pytest.approx(7 / 8 * LLAMA_70B.weights - layers)
    first_order = step("FO, FSDP2", 1024, LLAMA_70B)
    assert first_order.memory < GPU().memory
    assert first_order.memory > 16 * LLAMA_70B.parameters / 16


def test_tensor_parallelism_sums_two_activations_a_layer():
    found = step("ZO, tensor parallel", 8)
    sums, size = 2 * 32 * 2, 8 * 2048 * 4096 * 2
    assert found.sent == pytest.approx(sums * size, rel=1e-6)
    wanted = sums * INFINIBAND.all_reduce(8, size) + INFINIBAND.all_gather(8, 32)
    assert found.exposed == pytest.approx(wanted)


def test_what_does_not_fit_is_not_projected():
    assert projected(STRATEGIES["ZO, data parallel"], LLAMA_70B, INFINIBAND, 1024) is None
    assert projected(STRATEGIES["FO, FSDP2"], LLAMA_70B, INFINIBAND, 8) is None
    assert projected(STRATEGIES["ZO, FSDP2"], LLAMA_70B, INFINIBAND, 8) is not None
    for point in projections.points():
        assert point["memory"] <= GPU().memory
        assert point["seconds"] > 0


def test_projections_are_written(tmp_path):
    """With their assumptions; the committed ones are those of the code."""
    projections.write(tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    written, committed = (
        json.loads((folder / "scaling.json").read_text())
        for folder in (tmp_path, ROOT / "benchmarks" / "results" / "projected")
    )
    assert written == committed
    assert "nothing was measured" in written["projected"]
    assert written["gpu"]["flops"] == 0.5 * 989e12


# ---- the check ----------------------------------------------------------------------------------

SIZES = {
    "model": "made up",
    "parameters": 1_000_000,
    "rows_and_columns": 8000,
    "adapter": 4000,
    "layers": 4,
    "width": 64,
    "vocabulary": 100,
    "rows": 4,
    "tokens": 64,
}
PARTS = {
    "forward": 0.1,
    "forward and backward": 0.4,
    "recover and perturb": 0.003,
    "restore and update": 0.004,
    "SGD": 0.002,
    "all-gather of 32 bytes": 0.001,
    "all-reduce of 16 MiB": 0.017,
    "all-gather of 16 MiB": 0.033,
    **{f"update, 1 direction, {kind}": 0.002 for kind in ("gaussian", "rademacher", "rank 1")},
    f"update, {FURTHER} directions, gaussian": 0.009,
    f"update, {FURTHER} directions, rademacher": 0.009,
    f"update, {FURTHER} directions, rank 1": 0.0055,
}
STEPS = {  # by hand, for 2 processes
    "ZO, data parallel": 2 * 0.1 + 2 * 0.003 + 0.004 + 0.001,
    "ZO, samples in parallel": 2 * 0.1 + 2 * 0.002 + 0.003 + 0.001,
    "FO, DDP": 0.4 + 0.002 + 0.001 + 4e6 / SUMMED * 0.016,
    "ZO, FSDP2": 2 * (0.1 + 4 * 0.001 + 4e6 / SUMMED * 0.032) + 0.005 + 0.001,
}


def made_up():
    def timed(seconds):
        return {name: {"seconds": {"median": value}} for name, value in seconds.items()}

    steps = {name: STEPS.get(name, 1.0) for name in modelled(SIZES)}
    return {"sizes": SIZES, "parts": timed(PARTS), "steps": timed(steps)}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_known_parts_is_their_sum(name):
    assert predicted(made_up(), 2)[name]["over_measured"] == pytest.approx(1.0, rel=1e-3)


def test_one_process_has_no_collectives():
    model, gpu, network, work = fitted(made_up(), 1)
    found = scaling.zo_fsdp(model, gpu, network, 1, work)
    assert found.exposed == found.sent == 0.0
    assert math.isinf(network.within)


@pytest.fixture
def alone(tmp_path):
    """A group of this process."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # torch 2.13 renamed some
def test_traffic(alone):
    one, every = torch.zeros(3), [torch.zeros(5)]
    with Traffic() as traffic:
        dist.all_reduce(one)
        dist.all_gather(every, torch.zeros(5))
        dist.all_gather_into_tensor(torch.zeros(2), torch.zeros(2))
        dist.reduce_scatter_tensor(torch.zeros(4), torch.zeros(4))
        dist.broadcast(one, 0)
    assert (traffic.collectives, traffic.bytes) == (5, 4 * (3 + 5 + 2 + 4 + 3))
    with pytest.raises(NotImplementedError, match="c10d::alltoall"), Traffic():
        dist.all_to_all_single(torch.zeros(2), torch.zeros(2))


@needs_cpu_sharding
def test_two_processes(tmp_path):
    """Bytes are those of the model; seconds are whatever they are."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "distributed.py"))
    words = ["--quick", "--rounds", "1", "--ranks", "2", "--out", str(tmp_path)]
    assert script["main"](words) == 0
    result = json.loads((tmp_path / "cpu" / "distributed.json").read_text())
    found = result["ranks"]["2"]
    weights = 4 * found["sizes"]["parameters"]
    sent = {name: one["bytes"] for name, one in found["steps"].items()}
    assert found["sizes"]["model"] == TINY.name
    assert 0 < sent["ZO, data parallel"] <= 64
    assert 0 < sent["ZO, samples in parallel"] <= 64
    assert 0 < sent["ZO, per example"] <= 128
    assert sent["FO, DDP"] == pytest.approx(weights, rel=0.01)
    assert sent["ZO, FSDP2"] == pytest.approx(2 * weights / 2, rel=0.01)
    adapter = 4 * found["sizes"]["adapter"]
    assert sent["hybrid, LoRA under DDP"] == pytest.approx(adapter, rel=0.05)
    for one in found["steps"].values():
        assert one["over_first"] == 1.0
        assert one["predicted"]["seconds"] > 0
