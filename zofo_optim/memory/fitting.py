"""All methods beside one memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .asked import USED_BY, Asked, is_quantized
from .estimate import estimate_memory
from .estimated import MemoryEstimate, bytes_of

_LOW_RANK = dict(perturbation="streamed", structure="low_rank")
_CHECKPOINTED = dict(gradient_checkpointing=True, fo_optimizer="adamw")
_OFFLOADED = dict(_LOW_RANK, offloaded=True)
_PER_EXAMPLE = dict(directions="per_example")
COMMON: dict[str, tuple[str, dict[str, Any]]] = {
    "zo, in place": ("zo", {}),
    "zo, streamed": ("zo", dict(perturbation="streamed")),
    "zo, low rank, per example": ("zo", _LOW_RANK | _PER_EXAMPLE),
    "hybrid": ("hybrid", {}),
    "hybrid, checkpointed": ("hybrid", dict(gradient_checkpointing=True)),
    "LoRA, AdamW": ("lora", dict(fo_optimizer="adamw")),
    "LoRA, AdamW, checkpointed": ("lora", _CHECKPOINTED),
    "full, SGD in backward, checkpointed": (
        "fo",
        dict(gradient_checkpointing=True, optimizer_in_backward=True),
    ),
    "full, AdamW, checkpointed": ("fo", _CHECKPOINTED),
    "zo, streamed, offloaded": ("zo", dict(perturbation="streamed", offloaded=True)),
    "zo, low rank, per example, offloaded": ("zo", _OFFLOADED | _PER_EXAMPLE),
    "hybrid, low rank, offloaded": ("hybrid", _OFFLOADED),
    "hybrid, low rank, checkpointed, offloaded": (
        "hybrid",
        dict(_OFFLOADED, gradient_checkpointing=True),
    ),
}
"""Methods by name, with options of :func:`estimate_memory`."""


@dataclass(frozen=True)
class Fits:
    """Methods beside one memory. ``str()`` is a table. Made by :func:`which_fits`."""

    memory: int
    """Bytes."""
    estimates: Mapping[str, MemoryEstimate]
    """By the method's name, in the order of :data:`COMMON`."""
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of :func:`estimate_memory` for each, but for the model and the batch."""
    impossible: Mapping[str, str] = field(default_factory=dict)
    """Why a method has no estimate, by its name: the error of :func:`estimate_memory`."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of those that fit; for some there may be little room."""
        return tuple(n for n, e in self.estimates.items() if e.most <= self.memory)

    def __str__(self) -> str:
        lines = [f"{'method':44}{'peak':>10}  fits in {self.memory / 1e9:.3g} GB"]
        for name, found in self.estimates.items():
            lines.append(f"{name:44}{found.most / 1e9:7.2f} GB  {_said(found.most, self.memory)}")
        for name, why in self.impossible.items():
            lines.append(f"{name:44}{'':10}  {why.splitlines()[0]}")
        return "\n".join(lines)


def _said(size: int, memory: int) -> str:
    """What is not counted (the device's context, fragmentation) takes some 10 %."""
    if size > memory:
        return "no"
    return "yes" if size <= 0.9 * memory else "yes, with less than 10 % of room"


def methods(weights: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those of :data:`COMMON` that weights in this format can be trained by."""
    left_out = ("fo", "streamed") if is_quantized(weights) else ()
    return {
        name: (method, options)
        for name, (method, options) in COMMON.items()
        if not {method, options.get("perturbation")}.intersection(left_out)
    }


def which_fits(
    model: Any, batch: Any, memory: int | str, *, weights: Any = None, **options: Any
) -> Fits:
    """The common methods, and which of them fit.

    Args:
        model, batch, weights: of :func:`estimate_memory`. Where weights are quantised, methods
            that need others are left out.
        memory: bytes, or a string such as "24GB".
        options: further ones of :func:`estimate_memory`, such as ``device``, for the methods that
            have a use for them.

    Returns:
        The estimates; and why there is none, of methods that the model does not admit, such as a
        direction an example where it mixes them, or an adapter that peft cannot place by itself
        (``adapter=`` gives another).

    Raises:
        TypeError, ValueError: an argument that cannot be used, such as an option that tells the
            methods apart.
        Exception: where no method has an estimate, what the first one raised.
    """
    room = bytes_of(memory)
    own = {name for _, options in COMMON.values() for name in options}
    if told := sorted(own & options.keys()):
        raise ValueError(
            f"options must not be those that tell the methods apart, got {', '.join(told)}: call "
            "estimate_memory for a method of your own"
        )
    found, arguments, errors = {}, {}, {}
    for name, (method, own_options) in methods(weights).items():
        given = {n: v for n, v in options.items() if method in USED_BY.get(n, (method,))}
        asked = dict(method=method, weights=weights, **{**given, **own_options})
        Asked(**asked)  # raises
        try:
            found[name] = estimate_memory(model, batch=batch, **asked)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            errors[name] = error
        else:
            arguments[name] = asked
    if not found:
        raise next(iter(errors.values()))
    return Fits(room, found, arguments, {name: str(error) for name, error in errors.items()})
