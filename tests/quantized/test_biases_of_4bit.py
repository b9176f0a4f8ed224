"""Biases beside bitsandbytes' 4-bit weights learn in the dtype that their layer computes in.

The layer itself casts them in its first evaluation, to fp32 where it was told nothing else: then
files and journals of a 16-bit model would not fit a fresh one.
"""

import pytest
import torch
from torch import nn

from zofo_optim import (
    HybridZOFO,
    Journal,
    hybrid_param_groups,
    load_base_weights,
    replay,
    save_base_weights,
)

bnb = pytest.importorskip(
    "bitsandbytes", "0.50", reason="earlier layers cast biases to the dtype of inputs"
)


def made(dtype, compute):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    found = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=compute)
    found.load_state_dict(layer.to(dtype).state_dict())
    found.bias.data = found.bias.data.to(dtype)
    return nn.Sequential(found.to("cpu")).requires_grad_(False)


def trained(model, dtype, path, quantized):
    groups = hybrid_param_groups(
        model, zo=dict(lr=0.1, mu=1e-2), quantized=quantized, verbose=False
    )
    optimizer = HybridZOFO(groups, distribution="rademacher", backend="reference")
    x = torch.linspace(-1, 1, 128).view(2, 64).to(dtype)
    with Journal(path).attach(optimizer):
        for _ in range(3):
            optimizer.step(lambda: model(x).float().square().mean())
    return optimizer


@pytest.mark.parametrize("quantized", ["scales", "frozen"])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
    ],
    ids=str,
)
def test_files_and_journals_fit_a_fresh_model(dtype, compute, quantized, tmp_path):
    model = made(dtype, compute)
    before = model[0].bias.clone()
    optimizer = trained(model, dtype, tmp_path / "run.zofo", quantized)
    assert model[0].bias.dtype == (compute or dtype)
    assert not torch.equal(model[0].bias, before)
    save_base_weights(optimizer, model, tmp_path)
    for read in (
        lambda fresh: load_base_weights(fresh, tmp_path),
        lambda fresh: replay(fresh, tmp_path / "run.zofo", backend="reference"),
    ):
        fresh = made(dtype, compute)
        read(fresh)
        assert fresh[0].bias.dtype == model[0].bias.dtype
        assert torch.equal(fresh[0].bias, model[0].bias)
        ours, theirs = fresh[0].weight.quant_state.absmax, model[0].weight.quant_state.absmax
        assert torch.equal(ours, theirs)
