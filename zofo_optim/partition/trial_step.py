"""The step that a first-order optimizer would make first, tried in bounded memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo_kernels._torch_compat import unhooked_step

from ..checks import NOTES
from ..costs.trial import trial_optimizer
from ..defaults import Default
from ..first_order import first_order_options
from ..optimizer import HybridZOFO

SHARED: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(HybridZOFO).parameters.items()
    if isinstance(parameter.default, Default)
}
"""Arguments of HybridZOFO's own that it passes on, and what they are by default."""
_CHUNK = 1 << 18
"""Elements that are dealt with at once, in double precision: 10 to 20 MB."""


class Told(NamedTuple):
    """What a gradient says of a tensor; 0-dim tensors."""

    gain: Tensor
    """-sum(g dw); with ``maximize`` sum(g dw)."""
    square: Tensor
    """sum(g g)."""


class TrialStep:
    """The step that a first-order optimizer would make first, for one tensor at a time.

    Args:
        fo_optimizer: a torch optimizer class.
        options: of it, as :class:`zofo_optim.HybridZOFO` or a first-order group is given them.

    Raises:
        TypeError, ValueError: options that the class does not take.
    """

    def __init__(self, fo_optimizer: Callable[..., Optimizer], options: Mapping[str, Any]) -> None:
        own = {name: value for name, value in options.items() if name not in NOTES}
        shared = {name: own.pop(name, value) for name, value in SHARED.items()}
        self._factory = fo_optimizer
        self.options, self._defaults = first_order_options(fo_optimizer, shared, own)
        self._sign = 1.0 if self._defaults.get("maximize") else -1.0
        self._elementwise: bool | None = None

    @property
    def lr(self) -> Any:
        """The learning rate; None where the class has none."""
        return self._defaults.get("lr")

    @torch.inference_mode(False)
    def of(self, weight: Tensor, gradient: Tensor) -> Told:
        """What the step brings. Neither tensor is written.

        In double precision, where the device has it: a step may be smaller than the spacing of
        the weights in their own. Part by part, where the class steps each element by itself; else
        it takes the memory of the optimizer's state and of some copies of the tensor.
        """
        gain = square = torch.zeros((), dtype=_precise(weight), device=weight.device)
        for g in _parts(gradient.detach()):
            square = square + g.to(_precise(g)).square().sum()
        if self._is_elementwise():
            pairs = zip(_parts(weight.detach()), _parts(gradient.detach()), strict=True)
        else:
            pairs = zip([weight.detach()], [gradient.detach()], strict=True)
        for w, g in pairs:
            gain = gain + (self._moved(w, g).sub_(w).mul_(g)).sum()
        return Told(self._sign * gain, square)

    def _moved(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """A copy of the weight after its first step."""
        trial = weight.to(_precise(weight), copy=True).requires_grad_()
        trial.grad = gradient.to(trial.dtype, copy=True)  # the optimizer may write to it
        optimizer = trial_optimizer(self._factory, trial, self.options)
        unhooked_step(optimizer)(optimizer)
        return trial.detach()

    def _is_elementwise(self) -> bool:
        """Whether a tensor's parts step by themselves as they do within it; found by a trial."""
        if self._elementwise is None:
            generator = torch.Generator("cpu").manual_seed(0)
            draw = [torch.randn(4, 6, generator=generator, device="cpu") for _ in range(2)]
            w, g = draw[0].double(), 10 * draw[1].double()
            halves = zip(w.view(-1).chunk(2), g.view(-1).chunk(2), strict=True)
            try:
                moved = [self._moved(*half) for half in halves]
                apart = torch.cat(moved).view_as(w) - w
                whole = self._moved(w, g) - w
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                self._elementwise = False  # such as Muon, which takes matrices only
            else:
                near = 1e-5 * whole.abs().max().item()
                self._elementwise = torch.allclose(whole, apart, rtol=0.0, atol=near)
        return self._elementwise


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.reshape(-1).chunk(max(1, -(-tensor.numel() // _CHUNK))))
