"""Weights that visit a device train as those that are on it, to the bit."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import same_bits
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from offloaded import (  # noqa: E402
    ON_LINUX,
    OPTIONS,
    any_folder,
    assert_same,
    closure_of,
    trained,
    trained_by_trainer,
)
from tiny_llama import base_model, lora  # noqa: E402
from visited import CASES, MADE, home, pretended, visiting, watched  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402
from zofo_optim.offload import copies, maps  # noqa: E402
from zofo_optim.offload.in_turn import is_offloaded  # noqa: E402

pytestmark = ON_LINUX
__all__ = ["any_folder", "pretended", "watched"]  # fixtures


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
    assert home(trained_by_trainer(visiting, tmp_path, checkpointed))


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
