"""A small training with a journal, for the tests of journals; a process of test_kill.py."""

import copy
import os
import signal
import sys

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups

SETTINGS = dict(distribution="gaussian", perturbation="in_place", seed=3, mu=1e-3)


class Job:
    """Two frozen layers, a trained one, and steps that depend on their number alone."""

    def __init__(self, dtype=torch.float32, zo=None, adapter=True, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 6), nn.Linear(6, 1))
        for layer in (self.model[0], self.model[2]):
            layer.to(dtype).requires_grad_(False)
        if not adapter:
            self.model[3].requires_grad_(False)
        self.base = copy.deepcopy(self.model.state_dict())
        zo = dict(lr=1e-3, weight_decay=0.1, **(zo or {}))
        groups = hybrid_param_groups(self.model, zo=zo, fo=dict(lr=1e-2), verbose=False)
        self.optimizer = HybridZOFO(groups, **{**SETTINGS, **options})
        self.dtype = dtype

    def loss(self, step):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step))
        h = torch.tanh(self.model[0](x.to(self.dtype)))
        h = self.model[2](h).to(self.model[3].weight.dtype)
        return (self.model[3](h) - x.sum(1, keepdim=True)).float().square().mean()

    def step(self, step, factor=1.0):
        """With a learning rate that changes in every step, as a scheduler's does."""
        self.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        self.optimizer.zero_grad()
        return self.optimizer.step(lambda: factor * self.loss(step))

    def weights(self):
        """The zeroth-order ones, by name."""
        group = self.optimizer.param_groups[0]
        return dict(zip(group["param_names"], group["params"], strict=True))


class KillAt(TorchFunctionMode):
    """Kills the process at the n-th torch call within."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.place -= 1
        if self.place == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return func(*args, **(kwargs or {}))


def main(folder, perturbation, kill_step, kill_call, checkpoint_every=4):
    """Train on from the last checkpoint, if any; be killed at a call of a step."""
    job = Job(perturbation=perturbation)
    saved = os.path.join(folder, "checkpoint.pt")
    begin = 0
    if os.path.exists(saved):
        state = torch.load(saved, weights_only=True)
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    Journal(os.path.join(folder, "run.zofo"), resume=True).attach(job.optimizer)
    for step in range(begin, 100):
        if step % checkpoint_every == 0:
            state = dict(
                model=job.model.state_dict(), optimizer=job.optimizer.state_dict(), step=step
            )
            torch.save(state, saved + ".new")
            os.replace(saved + ".new", saved)
        if step == int(kill_step):
            with KillAt(int(kill_call)):
                job.step(step)
            os.kill(os.getpid(), signal.SIGKILL)  # between steps
        job.step(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
