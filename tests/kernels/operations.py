"""What is done to weights. Each takes Weights, a direction, the rounding and the backend's name."""

import math

import torch

from zofo_kernels import Pass, Program, Shift, backend_for, perturb_, replay_


def perturb(w, direction, rounding, backend):
    other = direction._replace(sample=direction.sample + 1)
    perturb_(w, direction, 0.25, recover=Shift(other, 0.125), backend=backend)


def perturb_copy(w, direction, rounding, backend):
    with torch.no_grad():
        for device, regions in w.layout().parts():
            sources = [region.tensor.clone() for region in regions]
            for region in regions:
                region.tensor.fill_(math.nan)
            backend_for(device, backend).perturb_copy(regions, sources, Shift(direction, 0.25))


def replay(w, direction, rounding, backend):
    other = direction._replace(sample=direction.sample + 1)
    program = Program(
        [
            Pass((Shift(direction, 0.25), Shift(direction, -0.25)), (other,), (0.75,), 0.003),
            Pass((), (direction, other), (0.5, 0.25), 0.003, 0.1),
        ]
    )
    replay_(w, program, rounding=rounding, backend=backend)


def fill_noise(w, direction, rounding, backend):
    with torch.no_grad():
        for device, regions in w.layout().parts():
            for region in regions:
                region.tensor.fill_(math.nan)
                backend_for(device, backend).fill_noise(region, direction)
