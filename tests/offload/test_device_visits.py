"""Weights that visit a device train as those that are on it, to the bit. The CPU stands for one."""

import copy
import gc
import io
import os
import random
import signal
import time
import weakref
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from conftest import same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from offloaded import ON_LINUX, OPTIONS, any_folder, assert_same, closure_of, trained  # noqa: E402
from tiny_llama import DATA, TOKENS, arguments, base_model, lora  # noqa: E402

from zofo_kernels import matrix_of  # noqa: E402
from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups  # noqa: E402
from zofo_optim.offload import copies, device_visits, maps, offload_weights, offloading  # noqa: E402
from zofo_optim.offload.in_turn import is_offloaded  # noqa: E402
from zofo_optim.offload.target import Target  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = ON_LINUX
__all__ = ["any_folder"]  # a fixture
LAYERS = ["LlamaDecoderLayer"]
CASES = [("LoRA", name) for name in OPTIONS]
CASES += [("base", name) for name in OPTIONS if name != "coupled"]  # with first-order groups
MADE = {"base": lambda: base_model().requires_grad_(False), "LoRA": lora}


class Pretended(Target):
    """The CPU, as a device that is visited."""

    def __init__(self, device):
        super().__init__(device)
        self.visited = True

    def keeps(self, weight):
        return matrix_of(weight.shape) is None


class NoHostWeights(TorchDispatchMode):
    """Raises where something computes with a weight on the host, as it would with a GPU's."""

    def __init__(self):
        super().__init__()
        self.allowed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not self.allowed and any(map(is_offloaded, tensors)):
            assert func.is_view, f"{func} computes with a host's weight"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.setattr(offloading, "Target", Pretended)


@pytest.fixture
def watched(monkeypatch):
    """Models in here compute with copies alone."""
    mode = NoHostWeights()

    @contextmanager
    def allowed():
        mode.allowed += 1
        try:
            yield
        finally:
            mode.allowed -= 1

    def allowing(call):
        def made(*args):
            with allowed():
                return call(*args)

        return made

    for name in ("_fetched", "on_device"):
        one = getattr(device_visits.DeviceVisits, name)
        monkeypatch.setattr(device_visits.DeviceVisits, name, allowing(one))
    return mode


def visiting(model, **options):
    offload_weights(model, device="cpu", **options)
    return model


def home(model):
    """All that is frozen and a matrix is on the host."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    assert frozen
    return all(map(is_offloaded, frozen))


# ---- the same results ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "options", "blocks"),
    [*((*case, None) for case in CASES), ("LoRA", "full", []), ("base", "low rank", [])],
)
def test_a_model_that_is_there(made, options, blocks):
    expected, model = MADE[made](), visiting(MADE[made](), blocks=blocks)
    trained(expected, steps=2, **OPTIONS[options])
    trained(model, steps=2, **OPTIONS[options])
    assert_same(model, expected)
    assert home(model)


def test_weights_in_a_file(tmp_path):
    expected, model = lora(), visiting(lora(), folder=tmp_path)
    assert maps.pages_of(model.get_base_model().lm_head.weight)
    trained(expected)
    trained(model)
    assert_same(model, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_trainer(checkpointed, tmp_path):
    def made():
        model = lora()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return model

    expected, model = made(), visiting(made())
    for one in (expected, model):
        HybridTrainer(
            one,
            arguments(tmp_path, gradient_checkpointing=checkpointed),
            train_dataset=DATA,
            zo=dict(lr=1e-3, mu=1e-3),
            hybrid=dict(perturbation="streamed"),
        ).train()
    assert_same(model, expected)
    assert home(model)


@pytest.mark.parametrize("made", MADE)
def test_nothing_computes_with_the_host_s_weights(made, watched):
    """Forwards and backwards; updates do."""
    model = visiting(MADE[made]())
    optimizer = trained(model, steps=1)  # verified; that writes to the host's

    def closure():
        with watched:
            return closure_of(model)()

    optimizer.step(closure)
    if made == "LoRA":
        with watched:
            closure_of(model)().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_computes_with_the_host_s_weights_is_seen(watched):
    model = visiting(base_model().requires_grad_(False))
    with pytest.raises(AssertionError, match="computes with a host's weight"), watched:
        model.lm_head.weight.sum()


def test_gradients_of_a_loop_of_one_s_own():
    """Graphs keep no copy, also of convolutions, which save the weight itself."""

    def made():
        torch.manual_seed(0)
        frozen = nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), frozen, nn.Conv2d(3, 1, 1))

    expected, model = made(), visiting(made())
    x = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
    for one in (expected, model):
        one(x).square().sum().backward()
    for p, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert (p.grad is None and theirs.grad is None) or same_bits(p.grad, theirs.grad)


def test_graphs_keep_no_copies(monkeypatch):
    model, made = visiting(lora()), []
    copying = copies._copy

    def copied(some):
        made.extend(weakref.ref(one.tensor) for one in some)
        copying(some)

    monkeypatch.setattr(copies, "_copy", copied)
    loss = closure_of(model)()
    gc.collect()
    assert made
    assert not any(copy() is not None for copy in made)
    loss.backward()


def test_modules_that_read_the_weights_of_others():
    """torch's own are known; others are named."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.inner.weight

    def made():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        return nn.Sequential(layer, Reads()).requires_grad_(False)

    expected, model = made(), visiting(made(), blocks=["Reads"])
    x = torch.linspace(-1, 1, 48).view(3, 2, 8)
    for one in (expected, model):
        groups = hybrid_param_groups(one, zo=dict(lr=1e-3), verbose=False)
        optimizer = HybridZOFO(groups, perturbation="streamed")
        for _ in range(2):
            optimizer.step(lambda: one(x).square().mean())  # noqa: B023
    assert_same(model, expected)


def test_a_part_of_a_block_that_is_called_by_itself():
    """As embeddings are by models that put other inputs beside them."""
    expected, model = base_model(), visiting(base_model().requires_grad_(False))
    x = torch.linspace(-1, 1, 3 * model.config.hidden_size).view(3, -1)
    assert is_offloaded(model.model.layers[0].self_attn.q_proj.weight)
    ours = model.model.layers[0].self_attn.q_proj(x)
    assert same_bits(ours, expected.model.layers[0].self_attn.q_proj(x).detach())
    assert home(model)


def test_tied_weights():
    def made():
        torch.manual_seed(0)
        config = copy.deepcopy(base_model().config)
        config.tie_word_embeddings = True
        return transformers.LlamaForCausalLM(config).requires_grad_(False)

    expected, model = made(), visiting(made())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trained(expected)
    trained(model)
    assert_same(model, expected)


# ---- copies -------------------------------------------------------------------------------------


class Stream:
    """Does what is asked of it when someone waits for it, and not before."""

    def __init__(self, device=None):
        self.work, self.done = [], 0

    def record_event(self):
        return self, len(self.work)

    def wait_event(self, event):
        other, end = event
        assert other is not self
        while other.done < end:
            other.work[other.done]()
            other.done += 1

    def wait_stream(self, other):
        assert other is not self

    def synchronize(self):
        Stream().wait_event(self.record_event())


class Streams:
    """As torch.cuda, with one stream for what is computed and those that are made."""

    Stream = Stream

    def __init__(self):
        self.computes, self.now = Stream(), None

    def current_stream(self, device):
        return self.computes

    @contextmanager
    def stream(self, stream):
        self.now = stream
        yield
        self.now = None


def test_copies_are_waited_for(monkeypatch):
    """With copies that are late, results are the same, and the next block's are under way."""
    streams, copying, under_way = Streams(), copies._copy, []

    def late(made):
        for copied in made:
            copied.tensor.fill_(torch.nan)
        streams.now.work.append(lambda: copying(made))

    monkeypatch.setattr(copies, "_copy", late)
    monkeypatch.setattr(copies, "_streams_of", lambda device: streams)
    expected, model = lora(), visiting(lora())
    (visits,) = {device_visits.visits_of(p) for p in model.parameters() if p.dim() > 1} - {None}
    layers = model.get_base_model().model.layers
    layers[0].mlp.act_fn.register_forward_pre_hook(
        lambda *_: under_way.append(len(visits._copier._stream.work) - visits._copier._stream.done)
    )
    trained(expected)
    trained(model)
    assert_same(model, expected)
    assert len(visits._copier._stream.work) == visits._copier._stream.done
    assert under_way[0] == 0
    assert set(under_way[1:]) == {1}


def visits(monkeypatch):
    """The number of copies that are made."""
    count, copying = [0], copies._copy

    def copied(made):
        count[0] += len(made)
        copying(made)

    monkeypatch.setattr(copies, "_copy", copied)
    return count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), 2),
        (dict(structure="low_rank"), 2),
        (dict(structure="low_rank", directions="per_example", estimator="one_sided"), 2),
        (dict(structure="low_rank", directions="per_example", estimator="antithetic"), 1),
    ],
)
def test_a_step_copies_each_weight_once_a_forward_pass(options, expected, monkeypatch):
    """Both sides of a direction for each example share a visit."""
    model, count = visiting(base_model().requires_grad_(False)), visits(monkeypatch)
    per_example = options.get("directions") == "per_example"
    groups = hybrid_param_groups(
        model, zo=dict(lr=1e-3), verbose=False, directions=options.get("directions", "shared")
    )
    optimizer = HybridZOFO(groups, perturbation="streamed", **options)
    tokens = TOKENS.repeat_interleave(2, 0)
    batch = {"input_ids": tokens, "labels": tokens}

    def closure():
        return example_losses_of(model, batch) if per_example else model(**batch).loss

    optimizer.step(closure)
    count[0] = 0
    optimizer.step(closure)
    assert count[0] == expected * sum(p.dim() > 1 for p in model.parameters())


def test_one_block_is_on_its_way_at_a_time():
    """Where the order changes from pass to pass, as of experts."""
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(16)).requires_grad_(False)
    model = nn.ModuleDict({"experts": experts})
    visiting(model)
    (visits,) = {device_visits.visits_of(expert.weight) for expert in experts}
    x = torch.ones(1, 4)

    def forward(order):
        for number in order:
            experts[number](x)
            assert all(is_offloaded(expert.weight) for expert in experts)

    model.forward = forward
    for _ in range(4):
        model(torch.randperm(16).tolist())
    assert visits._coming is None


def test_a_copy_on_its_way_of_what_is_written_since_is_made_again():
    torch.manual_seed(0)
    model = visiting(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False))
    x = torch.ones(1, 4)
    model(x)

    def write(module, args, output):
        model[1].weight.fill_(3.0)

    model[0].register_forward_hook(write)
    expected = nn.functional.linear(model[0](x), torch.full((4, 4), 3.0), model[1].bias)
    assert same_bits(model(x), expected)


def test_a_module_with_a_matrix_of_its_own_does_not_bring_its_parts():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.Parameter(torch.ones(2, 4, 4))
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            assert is_offloaded(self.layers[1].weight)
            assert not is_offloaded(self.places)
            return self.layers(x + self.places)

    visiting(Vision().requires_grad_(False))(torch.ones(2, 4, 4))


def test_gradients_after_an_update_are_refused():
    """As torch refuses them of a model in memory."""
    model = visiting(lora())
    optimizer = trained(model, steps=1)
    loss = closure_of(model)()
    optimizer.step(closure_of(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_func_keeps_the_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).requires_grad_(False)
    expected, x = copy.deepcopy(model), torch.linspace(-1, 1, 4)
    visiting(model)
    ours, theirs = (torch.func.grad(lambda x: one(x).sum())(x) for one in (model, expected))  # noqa: B023
    assert same_bits(ours, theirs)
    ours, theirs = (torch.func.jvp(one, (x,), (x,)) for one in (model, expected))
    assert all(map(same_bits, ours, theirs))


# ---- interrupted passes -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", range(1, 8))
def test_a_layer_that_raises(error, call):
    """Within an evaluation: all weights are home, and as before."""
    model = visiting(base_model().requires_grad_(False))
    optimizer, calls = trained(model, steps=0), iter(range(1, 100))

    def hook(module, args):
        if next(calls) == call:
            raise error

    handle = model.model.layers[1].mlp.act_fn.register_forward_pre_hook(hook)
    with pytest.raises(error):
        optimizer.step(closure_of(model))
    assert home(model)
    assert_same(model, base_model())
    handle.remove()
    expected = base_model().requires_grad_(False)
    trained(expected, steps=1)
    optimizer.step(closure_of(model))
    assert home(model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a destructor
def test_signals_at_any_time():
    """Of a timer: weights are home, whole steps are made or none, and torch is in no mode."""

    class Alarm(Exception):
        pass

    def ring(number, frame):
        nonlocal rung
        rung += 1
        raise Alarm

    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(3)]
    model = visiting(nn.Sequential(*layers).requires_grad_(False))
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    optimizer = HybridZOFO(groups, perturbation="streamed")
    x, rung = torch.ones(2, 4), 0
    before = signal.signal(signal.SIGALRM, ring)
    times = random.Random(0)
    try:
        optimizer.step(lambda: model(x).square().mean())
        began = time.perf_counter()
        optimizer.step(lambda: model(x).square().mean())
        longest = time.perf_counter() - began
        for _ in range(80):
            weights = [p.clone() for p in model.parameters()]
            with suppress(Alarm):
                try:
                    signal.setitimer(signal.ITIMER_REAL, times.uniform(1e-4, longest))
                    optimizer.step(lambda: model(x).square().mean())
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert home(model)
            assert torch.is_grad_enabled()
            moved = [not same_bits(a, b) for a, b in zip(weights, model.parameters(), strict=True)]
            assert all(moved) or not any(moved)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung > 5


def test_a_pass_after_one_that_was_interrupted():
    """Outside of a step, where nobody knows of the interruption."""
    model = visiting(lora())
    layer = model.get_base_model().model.layers[1].mlp.act_fn

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        closure_of(model)()
    handle.remove()
    loss = closure_of(model)()
    assert home(model)
    assert same_bits(loss, closure_of(lora())())
    loss.backward()


def test_what_a_forward_writes_to_a_weight_is_kept():
    model = visiting(nn.Sequential(nn.Linear(3, 3)).requires_grad_(False))

    def write(module, args):
        module.weight.fill_(2.0)

    model[0].register_forward_pre_hook(write)
    model(torch.ones(1, 3))
    assert is_offloaded(model[0].weight)
    assert model[0].weight.eq(2).all()


# ---- the model is an ordinary one ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["copied", "pickled"])
@pytest.mark.parametrize("file", [False, True])
def test_copies_of_the_model_are_in_memory(how, file, tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "Target", Target if file else Pretended)
    model = lora()
    offload_weights(model, folder=tmp_path if file else None, device="cpu")
    if how == "copied":
        other = copy.deepcopy(model)
    else:
        torch.save(model, saved := io.BytesIO())
        saved.seek(0)
        other = torch.load(saved, weights_only=False)
    assert not any(map(is_offloaded, other.parameters()))
    expected = lora()
    trained(expected)
    trained(other)
    assert_same(other, expected)
    assert_same(model, lora())


def test_an_adapter_that_is_added_afterwards(monkeypatch):
    """Offloading once more places it, and leaves the rest as it is."""
    monkeypatch.setattr(offloading, "_is_there", lambda tensor, target: is_offloaded(tensor))
    base = base_model()
    first = offload_weights(base.requires_grad_(False), device="cpu")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    before = {id(p): p.data_ptr() for p in model.parameters()}
    second = offload_weights(model, device="cpu")
    assert (first.count > 0, second.count, second.nbytes) == (True, 0, 0)
    assert before == {id(p): p.data_ptr() for p in model.parameters()}
    expected = base_model()
    torch.manual_seed(0)
    expected = peft.get_peft_model(expected, config)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_memory_is_shared_with_forked_processes():
    """Else each would have a copy of pinned pages."""
    memory = maps.HostMemory.of(4, torch.device("cpu"))
    tensor = memory.tensor(0, [1], torch.int32)
    child = os.fork()
    if child == 0:
        tensor.fill_(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert tensor.item() == 7


def test_the_memory_goes_with_the_model():
    gc.collect()
    before, visiting_before = len(maps._memories), len(device_visits._every)
    model = visiting(base_model().requires_grad_(False))
    closure_of(model)()
    assert len(maps._memories) == before + 1
    del model
    gc.collect()
    assert len(maps._memories) == before
    assert len(device_visits._every) == visiting_before


def test_hooks_can_be_removed():
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, device="cpu")
    offload.drop()
    offload.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same(model, base_model())


def test_in_place_is_refused():
    model = visiting(base_model().requires_grad_(False))
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    with pytest.raises(ValueError, match="perturbation must be 'streamed'"):
        HybridZOFO(groups)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(device="cpu", blocks="LlamaDecoderLayer"), TypeError, "blocks must be a list"),
        (dict(device="cpu", blocks=[1]), TypeError, "blocks must be a list"),
        (dict(device="nowhere"), ValueError, "device must be one that torch can use"),
        (dict(device="meta"), ValueError, "device must compute"),
    ],
)
def test_arguments(options, error, said):
    with pytest.raises(error, match=said):
        offload_weights(base_model().requires_grad_(False), **options)


def test_blocks_on_the_cpu(monkeypatch):
    monkeypatch.setattr(offloading, "Target", Target)
    with pytest.raises(ValueError, match="blocks must be None on the CPU"):
        offload_weights(base_model().requires_grad_(False), blocks=LAYERS)


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("made", "options"), CASES)
def test_a_model_on_a_gpu(made, options, monkeypatch):
    monkeypatch.setattr(offloading, "Target", Target)
    expected, model = MADE[made]().cuda(), MADE[made]()
    offload_weights(model, device="cuda")
    assert model.get_input_embeddings().weight.is_pinned()
    for one in (expected, model):
        trained(one, **OPTIONS[options])
    exact = OPTIONS[options].get("distribution") == "rademacher"  # else backends differ a little
    for (name, p), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        if exact:
            assert same_bits(p.cpu(), theirs.cpu()), name
        else:
            torch.testing.assert_close(p.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_memory_of_a_gpu(graph, monkeypatch):
    """Two layers' weights at a time."""
    monkeypatch.setattr(offloading, "Target", Target)
    layers = [nn.Linear(2048, 2048, bias=False).requires_grad_(False) for _ in range(16)]
    model = nn.Sequential(nn.Linear(2048, 2048), *layers)
    offload_weights(model, device="cuda")
    x = torch.zeros(1, 2048)
    model(x)  # it learns the order
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with nullcontext() if graph else torch.no_grad():
        loss = model(x).sum()
    if graph:
        loss.backward()
    weight = layers[0].weight.nbytes
    assert torch.cuda.max_memory_allocated() - before < 4.5 * weight
