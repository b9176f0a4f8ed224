"""Streams, devices and graphs on a GPU: nothing waits for the device."""

import pytest
import torch
from arranged import GAUSSIAN, RADEMACHER
from conftest import same_bits, weights
from on_gpu import DEVICE, ON_GPU, SECOND

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    Direction,
    Shift,
    Weights,
    noise,
    perturb_,
    perturbed,
    update_,
)
from zofo_kernels.dispatch import backend_for

pytestmark = pytest.mark.gpu


def test_triton_serves_the_gpu():
    assert backend_for(torch.device("cuda")).__name__ == "zofo_kernels.triton"


def every_pass(tensors, steps=(1, 2), coefficients=None, backend="auto", rank=0):
    """All kinds of passes but for copies; ends where no shift is carried."""
    kinds = zip(steps, DISTRIBUTIONS, strict=True)
    a, b = (Direction(7, step, 0, kind, rank=rank) for step, kind in kinds)
    if coefficients is None:
        coefficients = torch.ones(2)
    options = {"backend": backend}
    for direction in (a, b):
        perturb_(tensors, direction, 1e-2, **options)
        perturb_(tensors, direction, -1e-2, recover=Shift(direction, 1e-2), **options)
        shift = Shift(direction, -1e-2)
        update_(tensors, [direction], coefficients[:1], 0.1, recover=shift, **options)
    update_(tensors, [a, b], coefficients, 0.1, weight_decay=0.1, **options)


def some_weights():
    shapes = [(9000,), (131,), (8,), (40, 200), (9, 5)]
    return [weights(shape, dtype).to(DEVICE) for shape in shapes for dtype in DTYPES]


@pytest.mark.parametrize("rank", [0, 2])
def test_no_pass_waits_for_the_device(rank):
    kept, coefficients = Weights(some_weights()), torch.ones(2, device=DEVICE)
    step = torch.tensor(3, device=DEVICE)

    def passes():
        every_pass(kept, coefficients=coefficients, rank=rank)
        every_pass(kept, (step, step), coefficients, rank=rank)

    def passes_and_tables():
        every_pass(kept.tensors, coefficients=coefficients, rank=rank)
        noise((100,), GAUSSIAN, **ON_GPU)
        perturbed(kept.tensors[0], GAUSSIAN, 0.1)

    passes()
    passes_and_tables()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes_and_tables()
        torch.cuda._sleep(SECOND)
        passes()
        end = torch.cuda.Event()
        end.record()
        waited = end.query()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    assert not waited


def test_passes_run_on_the_current_stream():
    w, start = some_weights(), some_weights()
    kept, coefficients = Weights(w), torch.ones(2, device=DEVICE)
    every_pass(kept, coefficients=coefficients)
    expected = [x.clone() for x in w]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):  # once, for its memory
        every_pass(kept, coefficients=coefficients)
        for x, y in zip(w, start, strict=True):
            x.copy_(y)
    torch.cuda.synchronize()
    torch.cuda._sleep(SECOND)  # on the stream of before
    blocked = torch.cuda.Event()
    blocked.record()
    with torch.cuda.stream(side):
        every_pass(kept, coefficients=coefficients)
    side.synchronize()
    overtook = not blocked.query()
    torch.cuda.synchronize()
    assert all(map(same_bits, w, expected))
    assert overtook


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("steps_are", ["numbers", "counter"])
def test_a_captured_graph_replays_the_passes(steps_are, rank):
    """With the step on the device, each replay takes the next directions."""
    w, other = some_weights(), some_weights()
    kept, coefficients = Weights(w), torch.ones(2, device=DEVICE)
    counter = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run():
        steps = (counter, counter) if steps_are == "counter" else (4, 5)
        every_pass(kept, steps, coefficients, rank=rank)
        counter.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()  # recorded, not run
    for x, y in zip(w, other, strict=True):
        x.copy_(y)
    counter.zero_()
    for step in range(3):
        coefficients.fill_(step + 0.5)
        graph.replay()
        steps = (step, step) if steps_are == "counter" else (4, 5)
        every_pass(other, steps, torch.full((2,), step + 0.5), rank=rank)
    torch.cuda.synchronize()
    assert counter.item() == 3
    assert all(map(same_bits, w, other))


def test_tables_must_be_built_before_a_capture():
    w = [weights((n,), torch.float32).to(DEVICE) for n in (100, 3000)]
    perturb_(w, RADEMACHER, 0.25)  # compiled, but its table is gone
    before = [x.clone() for x in w]
    for tensors in (w, Weights(w)):
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(RuntimeError, match="must be built before a CUDA graph is captured")
        with refused, torch.cuda.graph(graph):
            perturb_(tensors, RADEMACHER, 0.25)
    torch.cuda.synchronize()
    assert all(map(same_bits, w, before))
    kept = Weights(w)
    perturb_(kept, RADEMACHER, 0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        perturb_(kept, RADEMACHER, 0.25)
    graph.replay()
    for index, (x, start) in enumerate(zip(w, before, strict=True)):
        z = noise(x.shape, RADEMACHER, index=index, **ON_GPU)
        assert same_bits(x, start + 0.25 * z + 0.25 * z)


@pytest.mark.parametrize("rank", [0, 2])
def test_steps_on_the_device_are_as_good_as_numbers(rank):
    results, counter = [], torch.tensor(5, device=DEVICE)
    for steps in ((5, 5), (counter, counter), (counter, counter.clone())):
        w = some_weights()
        every_pass(w, steps, rank=rank)
        perturb_(w, Direction(7, steps[0]), 0.1, recover=Shift(Direction(7, steps[1]), 0.1))
        results.append(w)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


def test_weights_that_move_between_devices():
    p = torch.nn.Parameter(weights((3000,), torch.bfloat16))
    q = torch.nn.Parameter(p.detach().clone())
    kept, stays = Weights([p], [3]), Weights([q], [3])
    for step, device in enumerate(("cpu", DEVICE, DEVICE, "cpu", DEVICE)):
        p.data = p.data.to(device)
        for group in (kept, stays):
            direction = Direction(1, step, 0, "rademacher")
            perturb_(group, direction, 0.1)
            update_(group, [direction], torch.ones(1), 0.01, recover=Shift(direction, 0.1))
        assert p.device.type == device
        assert same_bits(p.detach().cpu(), q.detach())


def test_both_devices_in_one_call():
    tensors = [weights((300, 5), dtype, i) for i, dtype in enumerate(DTYPES)]
    mixed = [w.to(DEVICE if i % 2 else "cpu", copy=True) for i, w in enumerate(tensors)]
    for group in (mixed, tensors):
        perturb_(group, RADEMACHER, 0.1)
        update_(group, [RADEMACHER], torch.ones(1), 0.01, recover=Shift(RADEMACHER, 0.1))
    assert all(same_bits(a.cpu(), b) for a, b in zip(mixed, tensors, strict=True))
    with pytest.raises(ValueError, match=r"backend='triton' serves cuda tensors, got .* cpu"):
        perturb_(mixed[::-1], RADEMACHER, 0.1, backend="triton")
    assert all(same_bits(a.cpu(), b) for a, b in zip(mixed, tensors, strict=True))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = f"cuda:{1 - torch.cuda.current_device()}"
    current, results = torch.cuda.current_device(), []
    for places in ((other, DEVICE), (DEVICE, other), ("cpu", "cpu")):
        w = [weights((9000,), dtype).to(places[i % 2]) for i, dtype in enumerate(DTYPES)]
        perturb_(w, RADEMACHER, 0.1)
        directions = [RADEMACHER, RADEMACHER._replace(sample=1)]
        update_(w, directions, torch.ones(2), 0.01, recover=Shift(RADEMACHER, 0.1))
        w += [noise((100,), RADEMACHER, device=places[0]), perturbed(w[0], RADEMACHER, 0.1)]
        results.append([x.cpu() for x in w])
    assert torch.cuda.current_device() == current
    for some in results[:2]:
        assert all(map(same_bits, some, results[2]))
