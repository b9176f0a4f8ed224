"""An update of low rank beside a weight that cannot move, and the layers that may have one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zofo_kernels import Direction, noise

NAME = "side_update"
"""Of the submodule that a layer gets."""
_STREAM = 0x5DE5DE5DE5DE5DE5
"""Keeps subspaces apart from the directions of an optimizer with the same seed."""


class Features(NamedTuple):
    """How wide a linear layer's inputs and outputs are."""

    inputs: int
    outputs: int


def features_of(module: nn.Module) -> Features | None:
    """Of a layer y = x W^T, however it holds W; None where it is none.

    Known by ``in_features`` and ``out_features``, as those of torch, bitsandbytes, torchao, quanto
    and HQQ, by ``infeatures`` and ``outfeatures``, as of GPTQ, or ``nx`` and ``nf``, as of GPT-2's
    ``Conv1D``. A module around others (peft's) is none: the one within is.
    """
    if any(name not in (NAME, "parametrizations") for name, _ in module.named_children()):
        return None
    for inputs, outputs in (
        ("in_features", "out_features"),
        ("infeatures", "outfeatures"),
        ("nx", "nf"),
    ):
        sizes = getattr(module, inputs, None), getattr(module, outputs, None)
        if all(type(size) is int and size > 0 for size in sizes):
            return Features(*sizes)  # type: ignore[arg-type]
    return None


class SideUpdate(nn.Module):
    """left right^T, added to a weight W of shape (m, n) without touching it.

    ``left``, shape (m, r), is a frozen fp32 parameter, zero at first, that zeroth order moves as
    any other. ``right``, (n, r), is a buffer of ±1 / sqrt(r). A displacement of ``left`` by mu u
    is one of W by mu u V^T / sqrt(r), V of ±1: since E[V V^T] / r is the identity, slopes and
    updates are on average those of full directions of W, and mu and lr mean what they mean there.

    The parameter is called ``left_seed_0`` for seed 0: what was learnt beside one V is nothing
    beside another, and so is not found under its name there.

    Args:
        features: of the layer.
        rank: r.
        seed: of V.
        layer: the layer's name in the base model; V is its own.
        device: where both are.
    """

    beside: tuple[str, ...] = ()
    """Names of what else of the base model was last chosen to learn."""

    def __init__(
        self, features: Features, rank: int, seed: int, layer: str, device: torch.device
    ) -> None:
        super().__init__()
        # signs are the same bits on every device and backend
        drawn = noise(
            (features.inputs, rank),
            Direction(seed ^ _STREAM, 0, 0, "rademacher"),
            index=zlib.crc32(layer.encode()) >> 1,
            device=device,
        )
        self.rank, self.seed = rank, seed
        left = torch.zeros(features.outputs, rank, device=device)
        self.register_parameter(self.parameter, nn.Parameter(left, requires_grad=False))
        self.right: Tensor
        self.register_buffer("right", drawn / math.sqrt(rank))

    @property
    def parameter(self) -> str:
        """The name of ``left``."""
        return f"left_seed_{self.seed}"

    @property
    def left(self) -> Tensor:
        found: Tensor = getattr(self, self.parameter)
        return found

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """output + (x right) left^T, in fp32, rounded once to the output's dtype.

        So too under autocast, and on the meta device, which has none.
        """
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            moved = F.linear(x.to(self.right.dtype) @ self.right, self.left)
            return (output + moved).to(output.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SideUpdate:
        """Conversions of the model to another dtype leave it in fp32; all else moves along."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.right.shape[0]} -> {self.left.shape[0]}, rank {self.left.shape[1]}"


def attach(module: nn.Module, side: SideUpdate) -> None:
    """Give a layer its update: its calls return what theirs adds."""
    module.add_module(NAME, side)
    module.register_forward_hook(_beside, with_kwargs=True)


def detach(module: nn.Module) -> None:
    """Take it off again."""
    delattr(module, NAME)
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _beside]:
        del hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


def _beside(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    added: Tensor = getattr(module, NAME)(x, output)
    return added
