"""Train a model in less memory than its weights take, and print what became of it, as JSON.

python limited_steps.py FOLDER, which is on a disk.
"""

import json
import sys
from pathlib import Path

import torch
from offload_step import Adapted, write
from safetensors.torch import load_file
from torch import nn
from zofo_bench.memory_limit import KINDS, run_limited, unavailable_reason

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.offload import offload_weights

WIDTH, LAYERS = 1536, 16
"""Of 151 MB in fp32, 9 MB each."""
LIMIT = 100 << 20


def model_of(width, layers, folder, offloaded):
    checkpoint = Path(folder) / f"{width}"
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted(width) for _ in range(layers)))
    for layer in model:
        layer.base.requires_grad_(False)
    if offloaded:
        offload_weights(model, checkpoint, folder=folder)
        return model
    for number, layer in enumerate(model):
        layer.base.to_empty(device="cpu")
        (weight,) = load_file(checkpoint / f"{number}.safetensors").values()
        layer.base.weight.copy_(weight)
    return model


def steps_of(width, layers, folder, offloaded, steps=2):
    model = model_of(width, layers, folder, offloaded)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-4), fo=dict(lr=1e-2), verbose=False)
    optimizer = HybridZOFO(groups, perturbation="streamed", distribution="rademacher")
    x = torch.linspace(-1, 1, 2 * width).view(2, width)
    losses = [optimizer.step(lambda: model(x).square().mean()).item() for _ in range(steps)]
    sums = [float(p.detach().sum(dtype=torch.float64)) for p in model.parameters()]
    return {"losses": losses, "sums": sums, "weights": 4 * layers * width**2}


def outcome(folder, offloaded, *limit):
    return run_limited(lambda: steps_of(WIDTH, LAYERS, folder, offloaded), *limit)


if __name__ == "__main__":
    (folder,) = sys.argv[1:]
    torch.set_num_threads(1)
    write(64, 2, folder)
    for offloaded in (False, True):  # what a small one imports and compiles does not count
        steps_of(64, 2, folder, offloaded)
    write(WIDTH, LAYERS, folder)
    found = {"none": {"in memory": outcome(folder, False)._asdict()}}
    for kind in (kind for kind in KINDS if unavailable_reason(kind) is None):
        found[kind] = {
            "in memory": outcome(folder, False, LIMIT, kind)._asdict(),
            "offloaded": outcome(folder, True, LIMIT, kind)._asdict(),
        }
    print(json.dumps(found))
