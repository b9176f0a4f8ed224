"""A process that trains an offloaded model and prints its peaks of resident memory, as JSON.

python offload_step.py FOLDER
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.offload import offload_weights

WIDTH, LAYERS = 3072, 11
"""Of 415 MB in fp32."""


class Adapted(nn.Module):
    """A frozen product and a trainable one of rank 1 beside it."""

    def __init__(self, width):
        super().__init__()
        self.base = nn.Linear(width, width, bias=False, device="meta")
        self.adapter = nn.Sequential(nn.Linear(width, 1), nn.Linear(1, width))

    def forward(self, x):
        return torch.tanh(self.base(x) + self.adapter(x))


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(key + ":")]
    return int(found.split()[1]) * 1024


def steps_of(width, layers, hybrid, folder):
    """Two steps of a new model; how far resident memory grew, and the bytes of its weights."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    model = nn.Sequential(*(Adapted(width) for _ in range(layers)))
    frozen = [p.requires_grad_(False) for p in model.parameters() if p.is_meta]
    if not hybrid:
        model.requires_grad_(False)
    nbytes = sum(p.nbytes for p in frozen)
    checkpoint = Path(folder) / f"{width}"
    offload_weights(model, checkpoint, folder=folder)
    options = dict(fo=dict(lr=1e-3)) if hybrid else {}
    groups = hybrid_param_groups(model, zo=dict(lr=1e-6), **options, verbose=False)
    optimizer = HybridZOFO(groups, perturbation="streamed", distribution="rademacher")
    x = torch.linspace(-1, 1, 2 * width).view(2, width)
    for _ in range(2):
        optimizer.step(lambda: model(x).square().mean())
    return {"grown": resident("VmHWM") - before, "weights": nbytes}


def write(width, layers, folder):
    """A checkpoint, layer by layer in files of their own."""
    from safetensors.torch import save_file

    path = Path(folder) / f"{width}"
    path.mkdir()
    files = {}
    for layer in range(layers):
        name = f"{layer}.base.weight"
        save_file({name: torch.randn(width, width) / width**0.5}, path / f"{layer}.safetensors")
        files[name] = f"{layer}.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


if __name__ == "__main__":
    torch.manual_seed(0)
    folder, found = sys.argv[1], {}
    for width, layers in ((64, 2), (WIDTH, LAYERS)):  # what a small one compiles is no growth
        write(width, layers, folder)
        for hybrid in (False, True):
            found["hybrid" if hybrid else "zo"] = steps_of(width, layers, hybrid, folder)
    print(json.dumps(found))
