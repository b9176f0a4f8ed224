"""Bottleneck adapters (Houlsby et al., ICML 2019): peft has none.

Each is a child of the module that it follows, applied by a forward hook, so that the base model's
parameters keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck_targets import (
    CHILD,
    check_bare,
    check_trainable,
    home_of,
    matches,
    output_width,
    targets_of,
)
from .intact import all_or_nothing

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class Bottleneck(nn.Module):
    """h + scale * up(act(down(h))), both maps with biases; ``up`` starts at 0, so h is unchanged.

    h has shape (..., width). It is computed in the parameters' dtype and comes back in that of h.
    Each row costs 4 * width * size FLOPs.

    Args:
        width: of h.
        size: inner units.
        activation: "gelu", "relu", "silu" or "tanh".
        scale: of the change, finite.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: ``size`` is no int, or ``scale`` no number.
        ValueError: ``size`` is below 1, ``scale`` not finite, or there is no such activation.
    """

    def __init__(
        self,
        width: int,
        size: int,
        activation: str = "gelu",
        scale: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be an int, got {size!r}")
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"scale must be a number, got {scale!r}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(_ACTIVATIONS)}, got {activation!r}")
        self.down = nn.Linear(width, size, device=device, dtype=dtype)
        self.act = _ACTIVATIONS[activation]()
        self.up = nn.Linear(size, width, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scale = scale
        self.enabled = True

    def forward(self, h: Tensor) -> Tensor:
        """Shape (..., width) in and out."""
        if not self.enabled:
            return h
        if h.shape[-1] != self.down.in_features:
            raise ValueError(
                f"target_modules must name modules whose output is {self.down.in_features} wide, "
                f"the model's hidden size, got one of shape {tuple(h.shape)}"
            )
        change: Tensor = self.up(self.act(self.down(h.to(self.down.weight.dtype))))
        return h + (self.scale * change).to(h.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def add_bottlenecks(
    model: nn.Module,
    target_modules: str | Sequence[str],
    size: int,
    *,
    activation: str = "gelu",
    scale: float = 1.0,
    modules_to_save: Sequence[str] = (),
) -> nn.Module:
    """Put a bottleneck adapter after each matching module's output, and freeze everything else.

    Houlsby et al. put two in each layer: after the attention's and after the feed-forward's output
    projection, before the residual is added, so for a Llama ``["o_proj", "down_proj"]``. Of an
    output that is a tuple the first element is adapted.

    What was asked for is kept as ``model.bottlenecks``, a dictionary of this function's arguments:
    ``add_bottlenecks(other, **model.bottlenecks)`` adapts another model likewise. The parameters
    are on the device of the module's, float32 where those are 16-bit, and named
    ``MODULE.bottleneck.down.weight`` and so on. The adapters survive copying, pickling and
    ``to()``; ``save_pretrained`` writes their weights, which ``from_pretrained`` ignores: see
    :func:`save_bottlenecks`.

    Draws ``down`` from torch's generator as ``nn.Linear`` does.

    Args:
        model: changed in place.
        target_modules: as peft's: names or ends of names of modules, or one regular expression that
            matches whole names. A module's output is as wide as its ``out_features``, where it has
            those, and else as the configuration's ``hidden_size``.
        size: inner units of each.
        activation: "gelu", "relu", "silu" or "tanh".
        scale: of each adapter's change.
        modules_to_save: names or ends of names of modules that train too, such as a new head.

    Returns:
        The model.

    Raises:
        TypeError: see :class:`Bottleneck`.
        ValueError: ``target_modules`` or ``modules_to_save`` match nothing, or what can have no
            adapter or cannot train; the model has an adapter, of peft or bottlenecks; or see
            :class:`Bottleneck`. Nothing is changed then.
    """
    asked = {
        "target_modules": target_modules
        if isinstance(target_modules, str)
        else list(target_modules),
        "size": size,
        "activation": activation,
        "scale": scale,
        "modules_to_save": list(modules_to_save),
    }
    insert(model, asked, built(model, asked), trainable=True)
    return model


def built(model: nn.Module, asked: Mapping[str, Any]) -> dict[str, Bottleneck]:
    """New adapters by the name of the module that each is for; the model is not changed.

    Raises:
        ValueError: see :func:`add_bottlenecks`.
    """
    check_bare(model)
    saved_modules(model, asked)
    found = {}
    for name, module in targets_of(model, asked["target_modules"]).items():
        device, dtype = home_of(model, name, module)
        width = output_width(model, name, module)
        form = (width, asked["size"], asked["activation"], asked["scale"])
        found[name] = Bottleneck(*form, device=device, dtype=dtype)
    return found


def insert(
    model: nn.Module, asked: Mapping[str, Any], adapters: Mapping[str, Bottleneck], trainable: bool
) -> None:
    """Put in what :func:`built` made, and freeze the rest; all of it, or nothing.

    Raises:
        ValueError: one of ``modules_to_save`` is to train and cannot.
    """
    kept = saved_modules(model, asked)
    if trainable:
        check_trainable(kept)
    with all_or_nothing(model):
        model.requires_grad_(False)
        for name, adapter in adapters.items():
            module = model.get_submodule(name)
            module.add_module(CHILD, adapter.requires_grad_(trainable))
            module.register_forward_hook(_adapt)
        for module in kept.values():
            module.requires_grad_(trainable)
        model.bottlenecks = dict(asked)  # type: ignore[assignment]


def _adapt(module: nn.Module, args: Any, output: Any) -> Any:
    """The hook; it looks its adapter up, so that a copy of the module uses the copy's."""
    adapter = getattr(module, CHILD)
    first, *others = output if isinstance(output, tuple) else (output,)
    if not isinstance(first, Tensor):
        raise ValueError(
            "target_modules must name modules whose output is a tensor, or a tuple that begins "
            f"with one, got a {type(module).__name__} that returns a {type(first).__name__}"
        )
    return (adapter(first), *others) if isinstance(output, tuple) else adapter(first)


def adapters_of(model: nn.Module) -> dict[str, Bottleneck]:
    """The model's bottleneck adapters by the names of the modules that they follow."""
    return {
        name.removesuffix(f".{CHILD}"): module
        for name, module in model.named_modules()
        if isinstance(module, Bottleneck)
    }


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the modules whose parameters are the adapters' and ``modules_to_save``'s."""
    adapters = {f"{name}.{CHILD}": adapter for name, adapter in adapters_of(model).items()}
    return {**adapters, **saved_modules(model, model.bottlenecks)}  # type: ignore[arg-type]


@contextmanager
def without_bottlenecks(model: nn.Module) -> Iterator[None]:
    """The model runs without its adapters in here."""
    switched = [adapter for adapter in adapters_of(model).values() if adapter.enabled]
    try:
        for adapter in switched:
            adapter.enabled = False
        yield
    finally:
        for adapter in switched:
            adapter.enabled = True


def saved_modules(model: nn.Module, asked: Mapping[str, Any]) -> dict[str, nn.Module]:
    """By name, the modules of the base model that train too.

    Raises:
        ValueError: one of the names matches none.
    """
    found = {}
    for wanted in asked["modules_to_save"]:
        matching = {n: m for n, m in model.named_modules() if matches([wanted], n)}
        if not matching:
            raise ValueError(f"modules_to_save must name modules of the model, got {wanted!r}")
        found.update(matching)
    return found
