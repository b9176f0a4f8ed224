"""Other people's loops: accelerate, GradScaler, clipping, compiled models, the Trainer."""

import functools
import warnings

import pytest
import torch
from conftest import needs_compiler
from torch import nn
from torch.nn import Parameter
from toys import Net, Toy, equal, run

from zofo_optim import HybridZOFO


def test_accelerate_runs_the_same_path():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net, plain = Net(), Net()
    prepared, optimizer = accelerator.prepare(net, net.optimizer())
    expected = plain.optimizer()

    def closure():
        optimizer.zero_grad()
        loss = prepared()
        accelerator.backward(loss)
        return loss

    for _ in range(4):
        optimizer.step(closure)
        expected.zero_grad()
        expected.step(plain)
    assert equal(net.values(), plain.values())
    assert not equal(net.values(), Net().values())


def test_a_grad_scaler_loop_in_two_phases():
    """Scale inside the closure, return the loss itself: then only FO gradients are scaled."""
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(), plain.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)

    def closure():
        optimizer.zero_grad()
        loss = net()
        scaler.scale(loss).backward()
        return loss

    for step in range(4):
        optimizer.backward(closure)
        if step % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1e3)
        scaler.step(optimizer)
        scaler.update()
        expected.zero_grad()
        expected.step(plain)
    assert equal(net.values(), plain.values())
    assert not equal(net.values(), Net().values())
    assert scaler.get_scale() == 2.0**14


@pytest.mark.parametrize("style", ["scaled / 2", "scaled", "plain", "plain / 2"])
def test_a_loss_that_keeps_a_scale_is_warned_of(style):
    x, y = Parameter(torch.ones(2), requires_grad=False), Parameter(torch.ones(2))
    optimizer = HybridZOFO([{"params": [x], "mode": "zo", "lr": 1e-3}, {"params": [y]}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def closure():
        loss = (x * y).square().sum()
        scaled = scaler.scale(loss)
        if style.startswith("scaled"):
            return scaled / 2 if "/" in style else scaled
        (scaled / 2).backward()
        return loss / 2 if "/" in style else loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(closure)
    told = [w for w in caught if "GradScaler" in str(w.message)]
    assert len(told) == (style == "scaled / 2")


def test_a_grad_scaler_that_finds_inf_skips_the_whole_step():
    net = Net()
    optimizer = net.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = net.values()

    def closure():
        optimizer.zero_grad()
        loss = net()
        (scaler.scale(loss) * 1e308).backward()
        return loss

    optimizer.backward(closure)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(net.values(), before, rtol=0, atol=1e-15)
    assert scaler.get_scale() == 2.0**11


def test_clipping_between_the_phases():
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(), plain.optimizer()
    optimizer.backward(net)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert norm > 1e-3
    optimizer.step()
    expected.step(plain)
    moved = [(p - q).abs().max() for p, q in zip(net.values(), Net().values(), strict=True)]
    assert max(moved[2:]) <= 1e-3 * 1e-2
    torch.testing.assert_close(net.values()[:2], plain.values()[:2], rtol=0, atol=1e-14)


@needs_compiler
def test_a_compiled_model_in_the_closure():
    """Captured once with gradients and once without, not again in every step."""
    testing = pytest.importorskip("torch._dynamo.testing")
    counter = testing.CompileCounterWithBackend("aot_eager")  # needs no compiler
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(), plain.optimizer()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(net, backend=counter)
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.step(compiled)
            expected.zero_grad()
            expected.step(plain)
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == 2
    torch.testing.assert_close(net.values(), plain.values(), rtol=1e-9, atol=1e-12)
    assert not equal(net.values(), Net().values())


def test_activation_checkpointing():
    """Recomputation in backward happens at the clean weights, before anything is perturbed."""
    net, plain = Net(), Net()
    optimizer, expected = net.optimizer(num_samples=2), plain.optimizer(num_samples=2)

    def closure():
        hidden = torch.utils.checkpoint.checkpoint(
            lambda b: net.base(b).tanh(), net.batch.requires_grad_(True), use_reentrant=False
        )
        return net.head(hidden).square().mean()

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure)
        expected.zero_grad()
        expected.step(plain)
    torch.testing.assert_close(net.values(), plain.values(), rtol=0, atol=1e-13)


def test_threads_may_step_optimizers_of_their_own():
    """SIGINT handling is for the main thread only; elsewhere a step must simply work."""
    import threading

    toys, failures = [Toy() for _ in range(3)], []

    def work(toy):
        try:
            run(toy.optimizer("zo"), toy, 3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(toy,)) for toy in toys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    alone = Toy()
    run(alone.optimizer("zo"), alone, 3)
    assert all(equal(toy.values(), alone.values()) for toy in toys)


def test_loading_a_state_dict_drops_what_was_accumulated():
    """Coefficients belong to the directions of the step that is left."""
    x = torch.ones(3)
    optimizer = HybridZOFO([x], mode="zo", lr=1e-3)
    state = optimizer.state_dict()
    optimizer.backward(lambda: (x**2).sum())
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()


def test_an_outer_autocast_block_does_not_hide_perturbations():
    """Autocast caches 16-bit copies of weights that require gradients."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    x = torch.randn(16, 8)
    optimizer = HybridZOFO(layer.parameters(), mode="zo", lr=1e-3, mu=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(lambda: layer(x).float().square().mean())
    assert optimizer.projected_grads.item() != 0


def test_what_fo_optimizer_binds_stays_out_of_zeroth_order_groups():
    bound = functools.partial(torch.optim.AdamW, lr=0.5, weight_decay=0.1)
    x, y = torch.ones(2), torch.ones(2, requires_grad=True)
    groups = [{"params": [x], "mode": "zo", "lr": 1e-3}, {"params": [y]}]
    zo, fo = HybridZOFO(groups, fo_optimizer=bound).param_groups
    assert (zo["lr"], zo["weight_decay"]) == (1e-3, 0)
    assert (fo["lr"], fo["weight_decay"]) == (0.5, 0.1)


def test_a_factory_with_open_options_gets_the_learning_rate():
    y = torch.ones(2, requires_grad=True)
    optimizer = HybridZOFO([y], lr=0.5, fo_optimizer=lambda p, **o: torch.optim.AdamW(p, **o))
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_trainer_training_step_can_be_the_closure(tmp_path):
    """Hugging Face's Trainer.training_step runs the backward pass itself, through accelerate."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=32, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    model.bert.requires_grad_(False)
    batch = {"input_ids": torch.randint(0, 50, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=args)
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    base = [p for p in model.parameters() if not p.requires_grad]
    head = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in (*base, *head)]
    groups = [{"params": base, "mode": "zo", "lr": 1e-2}, {"params": head, "lr": 0.1}]
    optimizer = HybridZOFO(groups)
    loss = optimizer.step(lambda: trainer.training_step(model, dict(batch)))
    assert loss.isfinite()
    assert optimizer.projected_grads.item() != 0
    assert all(p.grad is None for p in base)
    assert all(p.grad is not None for p in head)
    # position embeddings past the batch's length move too: every element has its direction
    assert not any(torch.equal(p, old) for p, old in zip((*base, *head), before, strict=True))
