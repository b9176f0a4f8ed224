"""Frameworks that call ``step`` in shapes of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from zofo_optim import HybridZOFO

BATCHES = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
KINDS = ("fo", "zo", "hybrid")


def network(kind="hybrid"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model.requires_grad_(kind == "fo")
    model[2].requires_grad_(kind != "zo")
    return model


def optimizer_of(model, **options):
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = [{"params": frozen, "mode": "zo", "lr": 1e-2}, {"params": trainable, "lr": 1e-2}]
    return HybridZOFO([group for group in groups if group["params"]], seed=3, **options)


def loss_of(model, batch):
    return model(batch).square().mean()


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        optimizer.step(lambda batch=batch: loss_of(model, batch))
    return model


def assert_equal(left, right):
    for p, q in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(p, q)


def assert_moved(model, kind="hybrid"):
    moved = [
        not torch.equal(p, q)
        for p, q in zip(model.parameters(), network(kind).parameters(), strict=True)
    ]
    assert all(moved)


# ---- torch.distributed.checkpoint ---------------------------------------------------------------

dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
ADAM = {"fo_optimizer": torch.optim.Adam}
MOMENTUM = {"momentum": 0.9}
RULE = {"zo_rule": "normalized"}


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(
    "options", [ADAM, MOMENTUM, RULE, {}], ids=["Adam", "momentum", "rule", "SGD"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_torch(kind, options, used, flat):
    """What was got, and set into a fresh optimizer or a used one, goes on along the same path."""
    how = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, twin = network(kind), network(kind)
    optimizer, plain = optimizer_of(model, **options), optimizer_of(twin, **options)
    train(model, optimizer, BATCHES[: 2 * used])
    train(twin, plain, BATCHES[: 2 * used])
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=how))
    assert_equal(model, twin)
    assert optimizer.zo_groups() == [] or optimizer.zo_groups()[0].options["zo_step"] == 2 * used
    assert all(p.grad is None for p in model.parameters()) or used
    if options is ADAM and not used:  # torch makes state by a step without gradients, which counts
        dcp.get_optimizer_state_dict(twin, plain)

    train(model, optimizer, BATCHES[2:4])  # getting has not disturbed it
    train(twin, plain, BATCHES[2:4])
    assert_equal(model, twin)

    for steps in (0, 3):
        again = network(kind)
        resumed = optimizer_of(again, **options)
        train(again, resumed, BATCHES[:steps])
        at_save = network(kind)
        train(at_save, optimizer_of(at_save, **options), BATCHES[: 2 * used])
        again.load_state_dict(at_save.state_dict())
        dcp.set_optimizer_state_dict(again, resumed, copy.deepcopy(saved), options=how)
        assert_equal(again, at_save)
        train(again, resumed, BATCHES[2:4])
        assert_equal(again, model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_leaves_what_accumulates(kind):
    model, twin = network(kind), network(kind)
    optimizer, plain = optimizer_of(model), optimizer_of(twin)
    for o, m in ((optimizer, model), (plain, twin)):
        o.backward(lambda m=m: loss_of(m, BATCHES[0]))
    dcp.get_optimizer_state_dict(model, optimizer)
    optimizer.step()
    plain.step()
    assert_equal(model, twin)
    assert_moved(model, kind)


def test_steps_without_anything_to_apply_still_raise():
    """Also at a rate of 0, as in the first step of a warm-up."""
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, BATCHES[0]).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.raises(RuntimeError, match=r"needs a closure.*HybridTrainer.*self\.optimizers\(\)"):
        optimizer.step()


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["step", "loop", "two phases"])
def test_compiled_steps(what, kind, perturbation):
    model, twin = network(kind), network(kind)
    optimizer = optimizer_of(model, perturbation=perturbation)
    expected = optimizer_of(twin, perturbation=perturbation)
    compiled = torch.compile(optimizer.step, backend="eager")

    @torch.compile(backend="eager")
    def loop(batch):
        optimizer.zero_grad()
        return optimizer.step(lambda: loss_of(model, batch)) + 0

    @torch.compile(backend="eager")
    def two_phases(batch):
        optimizer.zero_grad()
        loss = optimizer.backward(lambda: loss_of(model, batch))
        optimizer.step()
        return loss + 0

    for batch in BATCHES:
        if what == "step":
            optimizer.zero_grad()
            loss = compiled(lambda batch=batch: loss_of(model, batch))
        else:
            loss = {"loop": loop, "two phases": two_phases}[what](batch)
        expected.zero_grad()
        assert torch.equal(loss, expected.step(lambda batch=batch: loss_of(twin, batch)))
    assert_equal(model, twin)
    assert_moved(model, kind)


def test_a_compiled_model_stays_compiled_in_a_step():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = network()
    compiled = torch.compile(model, backend=backend)
    optimizer = optimizer_of(model)
    for batch in BATCHES:
        optimizer.step(lambda batch=batch: loss_of(compiled, batch))
    assert 1 <= len(graphs) <= 2  # with gradients and without


# ---- Fabric -------------------------------------------------------------------------------------

lightning = pytest.importorskip("lightning")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["step", "backward in the closure", "two phases", "accumulated"])
def test_fabric(how, kind):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, twin = network(kind), network(kind)
    plain = optimizer_of(twin)
    wrapped, optimizer = fabric.setup(model, optimizer_of(model))

    def closure(batch):
        def evaluate():
            loss = loss_of(wrapped, batch)
            if how == "backward in the closure":
                fabric.backward(loss)
            return loss

        return evaluate

    for first, second in zip(BATCHES[::2], BATCHES[1::2], strict=True):
        optimizer.zero_grad()
        plain.zero_grad()
        if how == "accumulated":
            for batch in (first, second):
                optimizer.backward(closure(batch))
                plain.backward(lambda batch=batch: loss_of(twin, batch))
            optimizer.step()
            plain.step()
            continue
        plain.step(lambda first=first: loss_of(twin, first))
        if how == "two phases":
            optimizer.backward(closure(first))
            optimizer.step()
        else:
            loss = optimizer.step(closure(first))
            assert torch.equal(loss, plain.last_loss)
    assert_equal(model, twin)
    assert_moved(model, kind)
    assert optimizer.optimizer.accumulated is None


def test_wrappers_clear_what_accumulates():
    """``zero_grad`` of a wrapper reaches the coefficients, not only the gradients."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = network("zo")
    _, optimizer = fabric.setup(model, optimizer_of(model))
    optimizer.backward(lambda: loss_of(model, BATCHES[0]))
    assert optimizer.optimizer.accumulated is not None
    optimizer.zero_grad()
    assert optimizer.optimizer.accumulated is None
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()


def test_a_fabric_checkpoint(tmp_path):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = network()
    wrapped, optimizer = fabric.setup(model, optimizer_of(model, momentum=0.9))
    train(wrapped, optimizer, BATCHES[:2])
    fabric.save(tmp_path / "state", {"model": wrapped, "optimizer": optimizer})
    train(wrapped, optimizer, BATCHES[2:])
    again = network()
    resumed_model, resumed = fabric.setup(again, optimizer_of(again, momentum=0.9))
    fabric.load(tmp_path / "state", {"model": resumed_model, "optimizer": resumed})
    train(resumed_model, resumed, BATCHES[2:])
    assert_equal(again, model)


# ---- Lightning ----------------------------------------------------------------------------------


class Module(lightning.LightningModule):  # type: ignore[name-defined]
    """Trains by one of the shapes that Lightning documents."""

    def __init__(self, kind, shape):
        super().__init__()
        self.model = network(kind)
        self.shape = shape
        self.automatic_optimization = shape in ("automatic", "skips")
        self.stepped = []

    def configure_optimizers(self):
        return optimizer_of(self.model)

    def on_before_optimizer_step(self, optimizer):
        self.stepped.append(self.current_batch)

    def training_step(self, batch, index):
        self.current_batch = index
        if self.shape == "skips" and index % 2:
            return None
        if self.automatic_optimization:
            return loss_of(self.model, batch)
        optimizer = self.optimizers()
        if self.shape == "backward first":
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.model, batch))
            return optimizer.step()
        if self.shape == "returns nothing":

            def closure():
                self.manual_backward(loss_of(self.model, batch))

            return optimizer.step(closure)
        if self.shape == "step":
            optimizer.zero_grad()
            optimizer.step(lambda: loss_of(self.model, batch))
        else:  # two micro-batches a step
            chosen = optimizer if self.shape == "accumulates" else optimizer.optimizer
            chosen.backward(lambda: loss_of(self.model, batch))
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        return None


def fit(module, **options):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(BATCHES, batch_size=None))
    return module.model


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of workers and None
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", ["automatic", "skips", "step", "accumulates", "accumulates beneath"]
)
def test_lightning(shape, kind):
    module = Module(kind, shape)
    trained = fit(module)
    twin = network(kind)
    optimizer = optimizer_of(twin)
    if "accumulates" in shape:
        for first, second in zip(BATCHES[::2], BATCHES[1::2], strict=True):
            for batch in (first, second):
                optimizer.backward(lambda batch=batch: loss_of(twin, batch))
            optimizer.step()
            optimizer.zero_grad()
        assert module.stepped == [1, 3, 5]
    else:
        train(twin, optimizer, BATCHES[:: 2 if shape == "skips" else 1])
    # the two-sided estimator has displaced the weights before it hears of a skip
    tolerance = 1e-6 if (shape, kind) == ("skips", "zo") else 0
    for p, q in zip(trained.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)
    assert_moved(trained, kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fo", "hybrid"])
@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ("backward first", RuntimeError, r"needs a closure.*self\.optimizers\(\)\.step\(closure\)"),
        ("returns nothing", TypeError, "got NoneType; does it end in 'return loss'"),
    ],
)
def test_lightning_loops_that_give_no_loss(shape, error, message, kind):
    module = Module(kind, shape)
    with pytest.raises(error, match=message):
        fit(module)
    assert_equal(module.model, network(kind))


def test_a_closure_of_ones_own_that_returns_nothing():
    model = network()
    with pytest.raises(TypeError, match="does it end in 'return loss'"):
        optimizer_of(model).step(lambda: None)
    assert_equal(model, network())
