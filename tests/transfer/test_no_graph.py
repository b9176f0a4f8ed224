"""The large model never has a graph, and what fails leaves it as it was."""

import contextlib

import families
import pytest
import torch
from families import logits

from zofo_optim import HybridZOFO
from zofo_optim.transfer import transfer_adapter, zo_param_groups

TEXTS = families.texts(count=6)
WIDE = dict(hidden=24, intermediate=20)


def small_and_large():
    small = families.with_lora(
        families.llama(labels=3), task="SEQ_CLS", target_modules=["q_proj", "v_proj"]
    )
    return small, families.llama(layers=4, labels=3, seed=1, **WIDE)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


@contextlib.contextmanager
def no_graph_on(large):
    """Autograd keeps nothing, and no module of ``large`` has or gives what has a graph.

    Yields a list of the modules that ran.
    """
    ran, found = [], []

    def pack(tensor):
        raise AssertionError(f"autograd keeps a tensor of {tuple(tensor.shape)}")

    def check(module, args, out):
        ran.append(module)
        made = [*tensors_in(args), *tensors_in(out), *module.parameters(recurse=False)]
        found.extend(module for t in made if t.requires_grad or t.grad_fn is not None)

    handles = [module.register_forward_hook(check) for module in large.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield ran
    finally:
        for handle in handles:
            handle.remove()
    assert not found


def test_the_check_sees_graphs():
    """A forward pass of a model as it is loaded would be seen."""
    _, large = small_and_large()
    with pytest.raises(AssertionError, match="autograd keeps"), no_graph_on(large):
        large(**TEXTS[0])
    with pytest.raises(AssertionError), no_graph_on(large), torch.no_grad():
        large(**TEXTS[0])  # its parameters require gradients


@pytest.mark.parametrize("layers", ["spread", "nearest", "similar"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_transfer(grad, layers):
    small, large = small_and_large()
    large.train()
    assert all(p.requires_grad for p in large.parameters())
    with torch.set_grad_enabled(grad):
        with no_graph_on(large) as ran:
            model, _ = transfer_adapter(small, large, TEXTS, layers=layers)
        assert torch.is_grad_enabled() == grad
    assert len(ran) > len(list(large.model.layers)) * len(TEXTS)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert large.training
    assert large.model.layers[0].training


def test_a_large_model_that_checkpoints_its_activations():
    """transformers and peft let its embeddings require gradients, for checkpoints' sake."""
    small, large = small_and_large()
    large.gradient_checkpointing_enable()
    model, _ = transfer_adapter(small, large, TEXTS)
    model.train()
    assert large.is_gradient_checkpointing
    assert not model(**TEXTS[0]).logits.requires_grad


def test_a_large_model_whose_inputs_require_gradients():
    """By transformers' hook, which is off while the model runs, and there again if that fails."""
    small, large = small_and_large()
    large.enable_input_require_grads()
    handle = interrupting(large)
    before = state_of(large)
    with pytest.raises(KeyboardInterrupt), no_graph_on(large) as ran:
        transfer_adapter(small, large, TEXTS)
    assert ran
    check_as_before(large, before)
    handle.remove()
    assert large.model.embed_tokens(TEXTS[0]["input_ids"]).requires_grad
    with no_graph_on(large):
        transfer_adapter(small, large, TEXTS)


def test_the_small_model_whose_inputs_require_gradients():
    small, large = small_and_large()
    small.enable_input_require_grads()
    before = state_of(small)
    with no_graph_on(small.get_base_model()):
        transfer_adapter(small, large, TEXTS)
    check_as_before(small, before)


def test_the_small_model_stays_as_it_was():
    small, large = small_and_large()
    small.train()
    before = state_of(small)
    transfer_adapter(small, large, TEXTS)
    check_as_before(small, before)


def test_no_random_number_is_drawn():
    small, large = small_and_large()
    before = torch.get_rng_state()
    transfer_adapter(small, large, TEXTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_zeroth_order_goes_on_without_a_graph():
    """With the base model and the adapter in groups of their own."""
    small, large = small_and_large()
    model, _ = transfer_adapter(small, large, TEXTS)
    groups = zo_param_groups(model, base=dict(lr=1e-3, mu=1e-3), adapter=dict(lr=1e-3, mu=1e-3))
    adapter = groups[1]["params"]
    optimizer = HybridZOFO(groups)
    batch = {**TEXTS[0], "labels": torch.tensor([0, 1, 2, 0])}
    before = logits(model, batch), [p.clone() for p in adapter]
    with no_graph_on(model):
        for _ in range(2):
            optimizer.step(lambda: model(**batch).loss)
    assert not torch.equal(logits(model, batch), before[0])
    assert not any(torch.equal(a, b) for a, b in zip(adapter, before[1], strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def state_of(model):
    """All of a model that a transfer might leave changed."""
    modules = [
        (name, type(module), module, module.training, [len(getattr(module, h)) for h in HOOKS])
        for name, module in model.named_modules()
    ]
    parameters = [(n, p, p.requires_grad, p.grad) for n, p in model.named_parameters()]
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return modules, parameters, copies, model.config.to_dict(), set(vars(model))


def check_as_before(model, before):
    now = state_of(model)
    assert [m[:2] + m[3:] for m in now[0]] == [m[:2] + m[3:] for m in before[0]]
    assert all(a[2] is b[2] for a, b in zip(now[0], before[0], strict=True))
    for a, b in zip(now[1], before[1], strict=True):
        assert (a[0], a[2]) == (b[0], b[2])
        assert a[1] is b[1]
        assert a[3] is b[3]
    assert all(torch.equal(now[2][name], tensor) for name, tensor in before[2].items())
    assert now[3:] == before[3:]


class Unreadable:
    """Batches that fail on the way."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield from TEXTS[:3]
        raise self.error


def interrupting(model):
    """A hook of the second layer that is a person's Ctrl-C in the third batch."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    return model.model.layers[1].register_forward_hook(hook)


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()])
def test_batches_that_fail(error):
    small, large = small_and_large()
    large.model.norm.weight.requires_grad_(False)
    large.train()
    before, of_small = state_of(large), state_of(small)
    with pytest.raises(type(error)):
        transfer_adapter(small, large, Unreadable(error))
    check_as_before(large, before)
    check_as_before(small, of_small)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("which", ["small", "large"])
def test_an_interrupt_in_a_forward_pass(which):
    small, large = small_and_large()
    large.model.norm.weight.requires_grad_(False)
    handle = interrupting(small.get_base_model() if which == "small" else large)
    before, of_small = state_of(large), state_of(small)
    with pytest.raises(KeyboardInterrupt):
        transfer_adapter(small, large, TEXTS)
    check_as_before(large, before)
    check_as_before(small, of_small)
    handle.remove()


def test_a_token_that_the_large_model_lacks():
    small, large = small_and_large()
    before = state_of(large)
    bad = dict(TEXTS[0], input_ids=TEXTS[0]["input_ids"] + families.VOCABULARY)
    with pytest.raises((IndexError, ValueError)):
        transfer_adapter(small, large, [*TEXTS, bad])
    check_as_before(large, before)


def test_a_module_that_the_large_model_lacks():
    small = families.with_lora(families.llama(), target_modules=["q_proj"])
    large = families.gpt2()
    before = state_of(large)
    with pytest.raises(ValueError, match="q_proj"):
        transfer_adapter(small, large, TEXTS)
    check_as_before(large, before)


def test_an_error_while_the_adapter_is_put_in(monkeypatch):
    """peft wraps modules one by one; the third fails."""
    import peft.tuners.lora.layer

    small, large = small_and_large()
    large.train()
    before = state_of(large)
    true, calls = peft.tuners.lora.layer.LoraLayer.update_layer, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.layer.LoraLayer, "update_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        transfer_adapter(small, large, TEXTS)
    check_as_before(large, before)


def test_groups_that_are_refused():
    """Bad input, and a model of which something still trains."""
    small, large = small_and_large()
    with pytest.raises(ValueError, match=r"hybrid_param_groups"):
        zo_param_groups(small, base=dict(lr=1e-3))
    large.requires_grad_(False)
    with pytest.raises(ValueError, match="both be None"):
        zo_param_groups(large)
    with pytest.raises(ValueError, match="must have an adapter"):
        zo_param_groups(large, base=dict(lr=1e-3))
    model, _ = transfer_adapter(small, large, TEXTS)
    (alone,) = zo_param_groups(model, adapter=dict(lr=1e-3))
    assert alone["mode"] == "zo"
    assert len(alone["params"]) == 2 * 2 * 2 + 1  # A and B, of two modules, of two layers; a head
