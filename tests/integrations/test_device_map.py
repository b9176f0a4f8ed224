"""Models that accelerate spreads over the devices of one process, and weights that it offloads."""

import copy
import re

import pytest
import torch
from conftest import same_bits
from torch.overrides import TorchFunctionMode

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tiny_llama import DATA, TOKENS, arguments, base_model, lora  # noqa: E402

from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups  # noqa: E402
from zofo_optim import evaluation as evaluations  # noqa: E402
from zofo_optim.estimate import Estimate  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LAYERS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
)
PLACES = [*LAYERS, "lm_head"]
OPTIONS = {
    "in place": {},
    "streamed": dict(perturbation="streamed"),
    "low rank in place": dict(structure="low_rank"),
    "closed forms": dict(structure="low_rank", perturbation="streamed"),
    "per example": dict(structure="low_rank", perturbation="streamed", directions="per_example"),
    "two samples": dict(num_samples=2),
}
STEPS = 3


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def spread(model, *devices):
    """By accelerate: the first half of the layers on the first device, and hooks everywhere."""
    middle = len(PLACES) // 2
    device_map = {
        name: devices[0] if place < middle else devices[-1] for place, name in enumerate(PLACES)
    }
    return accelerate.dispatch_model(model, device_map, main_device=devices[0], force_hooks=True)


def hooked(model):
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


def trained(model, steps=STEPS, **options):
    """The losses, and the optimizer."""
    per_example = options.get("directions") == "per_example"
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=1e-3, mu=1e-3),
        directions=options.get("directions", "shared"),
        verbose=False,
    )
    optimizer = HybridZOFO(groups, lr=0.05, distribution="rademacher", **options)
    device = next(model.parameters()).device
    batch = {"input_ids": TOKENS.to(device), "labels": TOKENS.to(device)}

    def closure():
        return example_losses_of(model, batch) if per_example else model(**batch).loss

    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(optimizer.step(closure).detach())
    return losses, optimizer


def adapted(adapter, dropout=0.0):
    """With hooks below the adapter, as where ``from_pretrained(device_map=...)`` loads the base."""
    if not adapter:
        return base_model().requires_grad_(False)
    return lora(dropout)


def put(model, *devices):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    spread(base, *devices)
    return model


@pytest.mark.parametrize("adapter", [False, True])
def test_hooks_change_nothing(adapter, options):
    """To the bit: hooks on every module only move inputs."""
    plain, spread_out = adapted(adapter), put(adapted(adapter), "cpu")
    assert len(hooked(spread_out)) > 20
    expected, _ = trained(plain, **options)
    losses, _ = trained(spread_out, **options)
    assert all(map(same_bits, losses, expected))
    for p, other in zip(spread_out.parameters(), plain.parameters(), strict=True):
        assert same_bits(p, other)
    assert any(
        not same_bits(p, before)
        for p, before in zip(spread_out.parameters(), adapted(adapter).parameters(), strict=True)
        if not p.requires_grad
    )


def test_the_trainer(tmp_path):
    models = lora(), put(lora(), "cpu")
    for model in models:
        made = HybridTrainer(
            model, arguments(tmp_path), train_dataset=DATA, zo=dict(lr=1e-3, mu=1e-3)
        )
        made.train()
    for p, other in zip(*(model.parameters() for model in models), strict=True):
        assert same_bits(p, other)


def offloaded(model, folder, *parts):
    """``parts`` to the disk, the rest on the CPU."""
    device_map = {name: "disk" if name in parts else "cpu" for name in PLACES}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


def test_offloaded_weights_are_named(tmp_path):
    model = offloaded(base_model().requires_grad_(False), tmp_path, "model.layers.1")
    name = "model.layers.1.self_attn.q_proj.weight"
    said = rf"parameter '{re.escape(name)}' must hold data.*offload_weights\(model\).*exclude="
    with pytest.raises(ValueError, match=said):
        hybrid_param_groups(model, verbose=False)
    named = [(name, p) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=said):
        HybridZOFO(named, mode="zo", lr=1e-3)


def test_weights_offloaded_to_the_cpu_are_named():
    """As of a model that is too large for its GPU."""
    model = accelerate.cpu_offload(base_model().requires_grad_(False), execution_device="cpu")
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' must hold data"):
        hybrid_param_groups(model, verbose=False)


def test_trainable_weights_that_are_offloaded_are_named(tmp_path):
    """Gradients would reach copies of them."""
    model = base_model().requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    offloaded(model, tmp_path, "model.layers.1")
    with pytest.raises(ValueError, match=r"trainable .*'model\.layers\.1.*offload_weights"):
        hybrid_param_groups(model, verbose=False)


def test_what_is_excluded_may_be_offloaded(tmp_path, options):
    """It is loaded in each forward pass; the rest trains as if nothing were offloaded."""

    def run(model):
        per_example = options.get("directions") == "per_example"
        groups = hybrid_param_groups(
            model,
            zo=dict(lr=1e-3, mu=1e-3),
            exclude=r"layers\.1\.",
            directions=options.get("directions", "shared"),
            verbose=False,
        )
        optimizer = HybridZOFO(groups, distribution="rademacher", **options)
        batch = {"input_ids": TOKENS, "labels": TOKENS}

        def closure():
            return example_losses_of(model, batch) if per_example else model(**batch).loss

        for _ in range(STEPS):
            optimizer.step(closure)
        return groups[0]["params"]

    expected = run(base_model().requires_grad_(False))
    model = offloaded(base_model().requires_grad_(False), tmp_path, "model.layers.1")
    assert any(p.is_meta for p in model.parameters())
    for p, other in zip(run(model), expected, strict=True):
        assert same_bits(p, other)


# ---- several devices ----------------------------------------------------------------------------


def test_estimates_of_losses_from_two_devices_add_up():
    """The later one's device has both: micro-batches may end on another device than the first."""

    def estimate(device):
        made = torch.ones(1, 2, device=device), torch.ones((), dtype=torch.bool, device=device)
        return Estimate(made[0], made[1], made[1])

    total = estimate("cpu") + estimate("meta")
    for tensor in (total.coefficients, total.usable, total.clean):
        assert tensor.is_meta


class CopiesToTheHost(TorchFunctionMode):
    """Collects calls that copy to the CPU and do not wait."""

    def __init__(self):
        super().__init__()
        self.unsafe, self.copies = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            devices = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
            self.copies += len(devices)
            if kwargs.get("non_blocking") and any(d.type == "cpu" for d in devices):
                self.unsafe.append(args)
        return func(*args, **kwargs)


def test_the_host_reads_no_copy_that_may_not_have_arrived():
    """A loss on a GPU may move weights on the CPU, and a rate on a GPU may belong to a loss there.

    A copy to the CPU that does not wait is in pinned memory, and holds anything until it arrives.
    """
    model = lora()
    groups = hybrid_param_groups(
        model, zo=dict(lr=torch.tensor(1e-3), mu=1e-3), fo=dict(lr=0.05), verbose=False
    )
    optimizer = HybridZOFO(groups, coupling=0.5, num_samples=2)
    with CopiesToTheHost() as seen:
        for _ in range(2):
            optimizer.backward(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
        optimizer.step()
    assert seen.copies
    assert not seen.unsafe


class Generators:
    """Of an accelerator with two devices, as ``torch.get_device_module`` gives them."""

    def __init__(self):
        self.states = [0, 0]

    def device_count(self):
        return len(self.states)

    def get_rng_state(self, device):
        return self.states[device.index]

    def set_rng_state(self, state, device):
        self.states[device.index] = state


@pytest.mark.parametrize("trains_on", [["cuda:0"], ["cpu"]])
def test_draws_on_devices_without_trained_weights_are_replayed(monkeypatch, trains_on):
    """Layers that do not train draw too, on whatever device they are."""
    generators = Generators()
    monkeypatch.setattr(torch, "get_device_module", lambda kind: generators)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluations, "capturing", lambda: False)
    before = evaluations.GlobalRandomState(map(torch.device, trains_on))
    generators.states = [3, 5]
    before.restore()
    assert generators.states == [0, 0]


gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [False, True])
def test_on_a_gpu_hooks_change_nothing(adapter, options):
    plain, spread_out = adapted(adapter).to("cuda:0"), put(adapted(adapter), "cuda:0")
    expected, _ = trained(plain, **options)
    losses, _ = trained(spread_out, **options)
    assert all(map(same_bits, losses, expected))


@pytest.mark.gpu
@gpus
@pytest.mark.parametrize("adapter", [False, True])
def test_two_gpus_train_as_one(adapter, options):
    one, two = put(adapted(adapter), "cuda:0"), put(adapted(adapter), "cuda:0", "cuda:1")
    assert {p.device.index for p in two.parameters()} == {0, 1}
    expected, _ = trained(one, **options)
    losses, _ = trained(two, **options)
    torch.testing.assert_close(losses, expected)
    for p, other in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), other.cpu())


@pytest.mark.gpu
@gpus
def test_dropout_on_the_second_gpu_is_the_same_in_all_evaluations():
    """Where only weights of the first one train."""
    model = put(lora(dropout=0.5), "cuda:0", "cuda:1")
    model.requires_grad_(False)
    groups = hybrid_param_groups(
        model, zo=dict(lr=0.0, mu=1e-30), include=r"embed_tokens", verbose=False
    )
    optimizer = HybridZOFO(groups, estimator="one_sided", num_samples=2)
    ids = TOKENS.to("cuda:0")
    optimizer.backward(lambda: model(input_ids=ids, labels=ids).loss)
    assert not optimizer.projected_grads.any()


@pytest.mark.gpu
def test_weights_on_the_cpu_follow_a_loss_on_the_gpu():
    """No hooks: weights that live on the CPU by themselves."""
    torch.manual_seed(0)
    first = torch.nn.Linear(64, 64)
    expected, x = copy.deepcopy(first), torch.randn(8, 64)
    last = torch.nn.Linear(64, 1).to("cuda")
    models = ((first, last), (expected, copy.deepcopy(last).cpu()))
    for one, other in models:
        weights = [*one.parameters(), *other.parameters()]
        optimizer = HybridZOFO(weights, mode="zo", lr=1e-2, distribution="rademacher")
        device = next(other.parameters()).device
        for _ in range(20):
            optimizer.step(lambda: other(one(x).to(device)).square().mean())  # noqa: B023
    torch.testing.assert_close(first.weight, expected.weight)
