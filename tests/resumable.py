"""A small training that stops and goes on, by file; a process of test_resume.py."""

import itertools
import sys

import torch
from torch import nn
from torch.nn import functional as F

from zofo_optim import HybridZOFO

STEPS = 6


class Run:
    """A small training that can be put into a file and taken up from it."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
        self.model[0].to(torch.bfloat16).requires_grad_(False)
        groups = [
            dict(params=list(self.model[0].parameters()), mode="zo", lr=1e-2, weight_decay=0.1),
            dict(params=list(self.model[3].parameters()), lr=1e-2),
        ]
        self.optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW, seed=5, **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.data = torch.randn(STEPS, 2, 4, 8, generator=torch.Generator().manual_seed(1))

    def loss(self, batch):
        def closure():
            h = self.model[0](batch.bfloat16()).float()
            for layer in self.model[1:]:
                h = layer(h)
            return F.mse_loss(h, batch.sum(1, keepdim=True))

        return closure

    def half(self, step, part):
        """One of two micro-batches."""
        if part == 0:
            self.optimizer.zero_grad()
        self.optimizer.backward(self.loss(self.data[step, part]))
        if part == 1:
            self.optimizer.step()
            self.scheduler.step()

    def save(self, path):
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "random": torch.get_rng_state(),
                "grads": [p.grad for p in self.model.parameters()],
            },
            path,
        )

    def load(self, path):
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["random"])
        for p, grad in zip(self.model.parameters(), saved["grads"], strict=True):
            p.grad = grad

    def halves(self, start, stop):
        for step, part in itertools.islice(itertools.product(range(STEPS), range(2)), start, stop):
            self.half(step, part)

    def weights(self):
        return [p.detach() for p in self.model.parameters()]


def options(text):
    estimator, samples, distribution, perturbation = text.split(",")
    return dict(
        estimator=estimator,
        num_samples=int(samples),
        distribution=distribution,
        perturbation=perturbation,
    )


def main(text, *jobs):
    """One process: jobs of half-steps start ... stop, from a file to a file ("-" for none)."""
    for start, stop, read, write in zip(*[iter(jobs)] * 4, strict=True):
        run = Run(**options(text))
        if read != "-":
            run.load(read)
        run.halves(int(start), int(stop))
        run.save(write)


if __name__ == "__main__":
    main(*sys.argv[1:])
