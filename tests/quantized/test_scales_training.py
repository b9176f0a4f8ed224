"""Quantised models learn: a regression by the scales alone, and a hybrid with LoRA."""

import pytest
import torch
from quantized_models import FORMATS, layers, network, scales

from zofo_optim import Clip, HybridZOFO, hybrid_param_groups

LR = 3.0
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))


def target(kind, dtype):
    """What the same integers give with other scales, so that scales alone can learn it."""
    model = network(kind, dtype)
    generator = torch.Generator().manual_seed(2)
    hybrid_param_groups(model, zo=dict(lr=0.1), quantized="scales", verbose=False)
    for scale in scales(model).values():
        scale.mul_(1 + 0.3 * torch.rand(scale.shape, generator=generator))
    with torch.no_grad():
        return model(X.to(dtype)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_regression(kind, dtype):
    y = target(kind, dtype)
    model = network(kind, dtype)
    groups = hybrid_param_groups(model, zo=dict(lr=LR, mu=1e-2), quantized="scales", verbose=False)
    optimizer = HybridZOFO(groups, seed=3, num_samples=4)
    codes = [layer.weight.data.clone() for layer in layers(model)] if kind[0] in "nfb" else []
    losses = [
        optimizer.step(lambda: (model(X.to(dtype)).float() - y).square().mean()).item()
        for _ in range(40)
    ]
    assert losses[-1] < 0.65 * losses[0]
    for layer, code in zip(layers(model), codes, strict=False):
        assert torch.equal(layer.weight.data, code)


@pytest.mark.parametrize("kind", ["nf4 double", "bnb int8", "intx int4"])
def test_a_hybrid(kind):
    """The base model by its scales, LoRA by gradients: better than either alone."""
    peft = pytest.importorskip("peft")

    def final(zo, fo):
        model = network(kind)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["0"]))
        groups = hybrid_param_groups(
            model, zo=dict(lr=zo, mu=1e-2), fo=dict(lr=fo), quantized="scales", verbose=False
        )
        optimizer = HybridZOFO(groups, seed=3, num_samples=4)
        for _ in range(30):
            optimizer.zero_grad()
            loss = optimizer.step(lambda: (model(X) - y).square().mean())
        return loss.item()

    y = target(kind, torch.float32)
    both, scales_only, lora_only = final(LR, 1.0), final(LR, 0.0), final(0.0, 1.0)
    assert both < scales_only
    assert both < lora_only


def test_clipping_as_qzo_does_it():
    """Directional derivatives are limited to [-C, C], as in Shang et al. 2025, Section 3.3."""
    model = network("nf4")
    groups = hybrid_param_groups(model, zo=dict(lr=LR, mu=1e-2), quantized="scales", verbose=False)
    optimizer = HybridZOFO(groups, seed=3, zo_rule=Clip(limit=0.5, relative=False))
    start = {name: scale.clone() for name, scale in scales(model).items()}
    optimizer.backward(lambda: 1e4 * model(X).square().mean())
    slope = optimizer.projected_grads.item()
    assert abs(slope) > 0.5
    optimizer.step()
    other = network("nf4")
    again = HybridZOFO(
        hybrid_param_groups(other, zo=dict(lr=LR, mu=1e-2), quantized="scales", verbose=False),
        seed=3,
    )
    again.backward(lambda: 1e4 * other(X).square().mean())
    again.step()
    for name, before in start.items():
        unclipped = scales(other)[name] - before
        clipped = scales(model)[name] - before
        torch.testing.assert_close(clipped, unclipped * (0.5 / abs(slope)), rtol=1e-3, atol=1e-7)
