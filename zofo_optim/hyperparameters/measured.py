"""Measuring without a trace: what closures and trial steps change is put back, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import Closure, GlobalRandomState
from ..groups_and_state import GroupsAndState
from ..modes import undisturbed
from ..sharding import is_sharded

_SAME = 2e-3
"""Two losses of one closure may differ by this share, by arithmetic that is not deterministic."""

Closures = Closure | Sequence[Closure]


def closures_of(closures: Any) -> list[Closure]:
    """One closure, or several, as a list.

    Raises:
        TypeError: something among them cannot be called.
        ValueError: there are none.
    """
    one = callable(closures)
    found = list(closures) if not one and isinstance(closures, (Sequence, Iterator)) else [closures]
    if not found:
        raise ValueError("closures must be a function or a sequence of them, got none")
    for closure in found:
        if not callable(closure) or isinstance(closure, nn.Module):
            raise TypeError(
                f"closures must be functions, got {type(closure).__name__}: functions without "
                "arguments that return the loss of a batch, such as `lambda: model(**batch).loss`"
            )
    return found


def check_same(first: float, again: float) -> None:
    """Whether two losses of a closure at the same weights are one.

    Raises:
        RuntimeError: they are not, so that losses at other weights say nothing.
    """
    if abs(again - first) > _SAME * max(abs(first), abs(again)):
        raise RuntimeError(
            "closures must give the same loss each time at the same weights, got "
            f"{first:.6g} and {again:.6g}: let each hold its batch, in place of next(iterator), "
            "and draw random numbers from the global generators, which are put back"
        )


def check_descent(optimizer: GroupsAndState, said: str) -> None:
    """Raises ValueError where a group ascends."""
    if any(group.get("maximize") for group in optimizer.param_groups if group["params"]):
        raise ValueError(
            f"maximize must be False in all groups for {said}, which looks for where a loss falls, "
            "got True: return the negative of what is to rise"
        )


def check_quiet(optimizer: Any, said: str) -> None:
    """Whether ``optimizer`` can be measured now.

    Raises:
        TypeError: it is no HybridZOFO.
        ValueError: its weights are sharded.
        RuntimeError: a closure of it is running, an estimate waits for its step, or it is one of
            several processes'.
    """
    if not isinstance(optimizer, GroupsAndState):
        raise TypeError(f"optimizer must be a HybridZOFO, got {type(optimizer).__name__}")
    if optimizer.evaluating:
        raise RuntimeError(f"{said} must not be called inside a closure")
    if optimizer.accumulated is not None:
        raise RuntimeError(
            f"{said} must not be called between backward and step; call step() or zero_grad() first"
        )
    if any(is_sharded(p) for p in parameters_of(optimizer)):
        raise ValueError(f"{said} needs whole weights, got shards (DTensors)")
    if optimizer.replicas.size > 1:
        raise RuntimeError(
            f"{said} must be called where one process trains, got {optimizer.replicas.size}: "
            "choose rates in one of them, on its own, and give them to all"
        )


def parameters_of(optimizer: GroupsAndState, mode: str | None = None) -> list[Tensor]:
    """Of all groups, or of those of a mode; each once."""
    groups = [g for g in optimizer.param_groups if mode in (None, g["mode"])]
    return list(dict.fromkeys(p for group in groups for p in group["params"]))


def relative_rates(groups: Sequence[dict[str, Any]]) -> tuple[list[float], float]:
    """Rates of groups over the largest, and that one; all alike where none is above 0.

    Groups without parameters do not count.

    Raises:
        ValueError: a group has no rate that is a number.
    """
    rates = []
    for group in groups:
        rate = group.get("lr")
        if isinstance(rate, Tensor):
            rate = rate.item()
        if not isinstance(rate, (int, float)):
            raise ValueError(
                f"optimizer must have a learning rate in each group, got lr={rate!r} in one"
            )
        rates.append(max(float(rate), 0.0))
    counted = [r for r, g in zip(rates, groups, strict=True) if len(g.get("params", (None,)))]
    largest = max(counted, default=0.0)
    return [rate / largest if largest else 1.0 for rate in rates], largest


def apply_rates(
    optimizer: GroupsAndState, rates: dict[str, float | None], mu: float | None = None
) -> None:
    """Set the groups' rates, by mode, the largest to that given; their ratios are kept.

    Raises:
        TypeError: ``optimizer`` is no HybridZOFO.
        RuntimeError: a scheduler has its rates.
    """
    if not isinstance(optimizer, GroupsAndState):
        raise TypeError(f"optimizer must be a HybridZOFO, got {type(optimizer).__name__}")
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise RuntimeError(
            "rates must be applied before the scheduler is made, which goes by those that it "
            "finds: apply them first"
        )
    for mode, rate in rates.items():
        groups = [g for g in optimizer.param_groups if g["mode"] == mode]
        relative, _ = relative_rates(groups)
        for group, ratio in zip(groups, relative, strict=True):
            if rate is not None:
                set_rate(group, rate * ratio)
            if mu is not None and mode == "zo":
                group["mu"] = mu


def set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@contextmanager
def gradients_aside(optimizer: GroupsAndState) -> Generator[None, None, None]:
    """A block in which no parameter has a ``.grad``, so that closures may clear them."""
    gradients = [(p, p.grad) for p in parameters_of(optimizer)]
    try:
        for p, _ in gradients:
            p.grad = None
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient


@contextmanager
def put_back(
    optimizer: GroupsAndState, weights: Sequence[Tensor] = ()
) -> Generator[Callable[[], None], None, None]:
    """A block after which gradients, buffers, generators and ``weights`` are as before it.

    Args:
        optimizer: whose parameters and buffers are looked after.
        weights: those that the block may write; copied to the host's memory.

    Yields:
        What puts the weights, gradients and generators back at once.
    """
    every = parameters_of(optimizer)
    copies = [(p, p.detach().to("cpu", copy=True)) for p in weights]
    random = GlobalRandomState({p.device for p in every})

    def weights_back() -> None:
        with torch.no_grad():
            for p, before in copies:
                p.copy_(before)

    def again() -> None:
        weights_back()
        for p in every:
            p.grad = None
        random.restore()

    with ExitStack() as stack:
        stack.enter_context(undisturbed())
        stack.enter_context(gradients_aside(optimizer))
        stack.callback(random.restore)
        stack.enter_context(optimizer.buffers.as_before())
        stack.callback(weights_back)
        yield again
