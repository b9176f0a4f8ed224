"""A hybrid training that begins anew where it was cut off; a process of test_elastic.py.

A checkpoint has the adapter and the optimizer's state. The base model is remade from the journal.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist
from launch import end
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay

STEPS, SAVE_EVERY = 12, 3
DISTURBANCES = [("kill", 0, 4), ("kill", 1, 7), ("raise", 1, 11)]
"""What happens to which rank at which step of the first start, of the second, and so on."""


def base_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 6), nn.Linear(6, 1)).double()
    model[:3].requires_grad_(False)
    return model


def whole_batch(step):
    x = torch.randn(12, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x.sum(1, keepdim=True)


def calm(step):
    """Nothing happens."""


def train(folder, disturb=calm):
    """From the checkpoint in the folder, or from the start; the model and its first step."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    saved, path = os.path.join(folder, "checkpoint.pt"), os.path.join(folder, "run.zofo")
    model = base_model()
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3, mu=1e-3), verbose=False)
    optimizer = HybridZOFO(groups, lr=1e-2, momentum=0.9, distribution="rademacher")
    begin = 0
    if os.path.exists(saved):
        state = torch.load(saved, weights_only=True)
        begin = state["step"]
        replay(model, path, stop=begin)
        model[3].load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
    wrapped = DistributedDataParallel(model) if size > 1 else model

    with Journal(path, resume=True).attach(optimizer, model) as journal:
        for step in range(begin, STEPS):
            if step % SAVE_EVERY == 0:
                journal.flush()  # so that it reaches the checkpoint's step
                if rank == 0:
                    state = dict(adapter=model[3].state_dict(), optimizer=optimizer.state_dict())
                    torch.save(dict(state, step=step), saved + ".new")
                    os.replace(saved + ".new", saved)
            x, y = (part[rank::size] for part in whole_batch(step))

            def closure(step=step, x=x, y=y):
                disturb(step)
                return (wrapped(x) - y).square().mean()

            optimizer.zero_grad()
            optimizer.step(closure)
    return model, begin


def main(folder, disturbed_only=""):
    dist.init_process_group("gloo")
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
    calls = [0]

    def disturb(step):
        if start < len(DISTURBANCES) and DISTURBANCES[start][1:] == (rank, step):
            calls[0] += 1
            if calls[0] == 2:  # of three: the weights are displaced
                if DISTURBANCES[start][0] == "raise":
                    raise RuntimeError("no luck")
                os.kill(os.getpid(), signal.SIGKILL)

    for name in ("disturbed",) if start or disturbed_only else ("whole", "disturbed"):
        inner = os.path.join(folder, name)
        os.makedirs(inner, exist_ok=True)
        model, begin = train(inner, disturb if name == "disturbed" else calm)
        state = dict(weights=model.state_dict(), begin=begin, start=start)
        torch.save(state, os.path.join(folder, f"{name}.{rank}.pt"))
    dist.barrier()
    end()


if __name__ == "__main__":
    main(*sys.argv[1:])
