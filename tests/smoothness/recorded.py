"""A loss of both modes whose curvatures are known, and its optimizer."""

import torch
from torch import nn

from zofo_optim import HybridZOFO


class Quadratic:
    """x' A x / 2 + y' B y / 2 + x' C y: x zeroth-order, of curvature 0.5, y first-order."""

    A = 0.5 * torch.eye(24, dtype=torch.float64)
    B = torch.diag(torch.tensor([4.0, 1.0, -2.0, 0.5, 0.0], dtype=torch.float64))

    def __init__(self):
        self.x = nn.Parameter(torch.linspace(-1, 2, 24, dtype=torch.float64), requires_grad=False)
        self.y = nn.Parameter(torch.linspace(1, 2, 5, dtype=torch.float64))

    def __call__(self):
        x, y = self.x, self.y
        return (x @ self.A @ x + y @ self.B @ y) / 2 + 0.1 * x[:5] @ y

    def optimizer(self, zo=1e-3, fo=1e-2, modes=("zo", "fo"), **options):
        groups = [dict(params=[self.x], lr=zo, mode="zo"), dict(params=[self.y], lr=fo, mode="fo")]
        groups = [group for group in groups if group["mode"] in modes]
        return HybridZOFO(groups, distribution="rademacher", **options)
