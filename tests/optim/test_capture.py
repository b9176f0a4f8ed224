"""Steps that CUDA graphs can replay: counters on the device, no host in the loop."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zofo_optim import HybridZOFO, capture, evaluation, watch


def problem(device="cpu", dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
    model.to(device)
    model[0].requires_grad_(False)
    x, y = torch.randn(32, 6, device=device), torch.randn(32, 1, device=device)
    return model, lambda: F.mse_loss(model(x), y)


def groups(model):
    zo = dict(params=list(model[0].parameters()), mode="zo", lr=1e-2)
    return [zo, dict(params=list(model[3].parameters()), lr=1e-1)]


def weights_after(steps, device="cpu", make=groups, **options):
    model, closure = problem(device)
    optimizer = HybridZOFO(make(model), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("samples", [1, 3])
def test_capturable_takes_the_same_path(backend, estimator, samples):
    options = dict(estimator=estimator, num_samples=samples, backend=backend, momentum=0.9)
    plain, _ = weights_after(4, **options)
    counted, optimizer = weights_after(4, capturable=True, **options)
    assert torch.equal(plain, counted)
    assert int(optimizer.param_groups[0]["zo_step"]) == 4


def test_counters_are_tensors_and_state_dicts_hold_ints():
    _, optimizer = weights_after(3, capturable=True)
    counter = optimizer.param_groups[0]["zo_step"]
    assert isinstance(counter, torch.Tensor)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["zo_step"] == 3
    assert type(state["param_groups"][0]["zo_step"]) is int
    model, closure = problem()
    plain = HybridZOFO(groups(model))
    plain.load_state_dict(state)
    assert plain.param_groups[0]["zo_step"] == 3
    state["param_groups"][0]["zo_step"] = 7
    optimizer.load_state_dict(state)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["zo_step"] is counter  # a captured graph reads this one
    assert int(counter) == 8


def test_two_zero_order_groups_count_apart():
    def both(model):
        return [
            dict(params=list(layer.parameters()), mode="zo", lr=1e-3)
            for layer in (model[0], model[3])
        ]

    plain, _ = weights_after(3, make=both)
    counted, optimizer = weights_after(3, make=both, capturable=True)
    assert torch.equal(plain, counted)
    a, b = (group["zo_step"] for group in optimizer.param_groups)
    assert a is not b
    optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], mode="zo", lr=1e-3))
    assert optimizer.param_groups[2]["zo_step"] == 3
    assert type(optimizer.param_groups[2]["zo_step"]) is int  # its own counter, at the next step


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue(how):
    model, closure = problem()
    optimizer = HybridZOFO(groups(model), capturable=True)
    optimizer.step(closure)
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        o.step(lambda m=m: F.mse_loss(m(x), y))
        assert int(o.param_groups[0]["zo_step"]) == 2
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_given_to_the_first_order_optimizer_where_it_has_it():
    model, _ = problem()
    adam = HybridZOFO(groups(model), fo_optimizer=torch.optim.AdamW, capturable=True)
    assert adam.param_groups[1]["capturable"] is True
    sgd = HybridZOFO(groups(model), capturable=True)
    assert "capturable" not in sgd.defaults


def test_cannot_raise_for_non_finite_losses():
    with pytest.raises(ValueError, match="nonfinite must be 'skip' where capturable=True"):
        HybridZOFO(groups(problem()[0]), capturable=True, nonfinite="raise")


# What a capture refuses, without a GPU to capture on.


@pytest.fixture
def captured(monkeypatch):
    """Everything believes that a graph is being captured."""
    for module in (capture, evaluation, watch):
        monkeypatch.setattr(module, "capturing", lambda: True)


def test_capture_needs_capturable(captured):
    with pytest.raises(RuntimeError, match="construct HybridZOFO with capturable=True"):
        weights_after(1)


def test_capture_needs_a_step_before(captured):
    with pytest.raises(RuntimeError, match="run a few steps before capturing"):
        weights_after(1, capturable=True)


@pytest.mark.parametrize("kind", ["module", "functional", "attention"])
def test_capture_refuses_dropout(kind, monkeypatch):
    model, closure = problem(dropout=0.5 if kind == "module" else 0.0)
    optimizer = HybridZOFO(groups(model), capturable=True)
    model.eval()
    optimizer.step(closure)
    model.train()
    q = torch.ones(1, 2, 3, 4)
    closures = {
        "module": closure,
        "functional": lambda: closure() + F.dropout(q, 0.1).sum() * 0,
        "attention": lambda: closure() + F.scaled_dot_product_attention(q, q, q, None, 0.1).sum(),
    }
    for module in (capture, evaluation, watch):
        monkeypatch.setattr(module, "capturing", lambda: True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"must not use .* while a CUDA graph is captured"):
        optimizer.step(closures[kind])
    for p, q in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
    model.eval()
    optimizer.step(closure)  # nothing is drawn: nothing is refused


# On a GPU.


def gpu_job(**options):
    model, closure = problem("cuda")
    optimizer = HybridZOFO(groups(model), momentum=0.9, **options)

    def step():
        optimizer.zero_grad()
        optimizer.step(closure)

    return model, optimizer, step


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("fo", [torch.optim.SGD, torch.optim.AdamW])
def test_no_synchronisation_in_a_step(estimator, distribution, fo):
    extra = dict(fo_optimizer=fo) if fo is torch.optim.SGD else dict(fo_optimizer=fo, momentum=0)
    model, closure = problem("cuda")
    optimizer = HybridZOFO(
        groups(model), estimator=estimator, distribution=distribution, num_samples=2, **extra
    )
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat([p.flatten() for p in model.parameters()]).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("samples", [1, 3])
def test_replayed_steps_equal_eager_ones(estimator, samples):
    options = dict(estimator=estimator, num_samples=samples)
    plain, _, eager = gpu_job(**options)
    model, optimizer, step = gpu_job(capturable=True, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # recorded, not run
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        eager()
    assert int(optimizer.param_groups[0]["zo_step"]) == 7
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
def test_capture_without_capturable_is_refused():
    _, _, step = gpu_job()
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_zeroth_order_memory_is_inference_memory():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)))
    model = model.to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)

    def loss():
        return model(x).float().square().mean()

    def peak(run):
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    optimizer = HybridZOFO(model.parameters(), mode="zo", lr=1e-6)
    with torch.no_grad():
        bare = peak(loss)
    assert peak(lambda: optimizer.step(loss)) <= 1.01 * bare
