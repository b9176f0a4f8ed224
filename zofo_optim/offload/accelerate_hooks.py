"""Accelerate's hooks, which keep a model's weights elsewhere than in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn


def offloading_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Accelerate's hooks that keep weights elsewhere: each with the name of its module."""
    hooks = sys.modules.get("accelerate.hooks")  # else there are none
    if hooks is None:
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        for hook in single(getattr(module, "_hf_hook", None)):
            if isinstance(hook, hooks.AlignDevicesHook) and hook.offload:
                yield prefix, module, hook


def single(hook: Any) -> Iterator[Any]:
    """The hooks of a module's one: those in a sequence, which may hold others."""
    inside = getattr(hook, "hooks", None)
    if isinstance(inside, tuple | list):
        for one in inside:
            yield from single(one)
    elif hook is not None:
        yield hook


def remove_offloading_hooks(model: nn.Module) -> None:
    """Where accelerate keeps weights, take off its hooks for that, and those that place inputs.

    They do not bring weights back, as they would on leaving. Hooks of other classes stay.
    """
    if not any(True for _ in offloading_hooks(model)):
        return
    from accelerate.hooks import AlignDevicesHook, ModelHook, remove_hook_from_module

    for module in model.modules():
        module.__dict__.pop("hf_device_map", None)  # save_pretrained and Trainer ask for it
        every = list(single(getattr(module, "_hf_hook", None)))
        others = [hook for hook in every if not isinstance(hook, AlignDevicesHook)]
        if len(others) == len(every):
            continue
        whole: Any = module._hf_hook
        if others:
            whole.hooks = tuple(others)
            for name in _WARNING:
                module.__dict__.pop(name, None)
        else:
            module._hf_hook = ModelHook()  # does nothing when it leaves
            remove_hook_from_module(module)


_WARNING = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")
"""Methods that accelerate's ``dispatch_model`` replaces, to warn of moving."""


def kept_by_hooks(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What gives the tensors that accelerate keeps elsewhere, by their names in the model."""
    found: dict[str, Callable[[], Tensor]] = {}
    for prefix, _, hook in offloading_hooks(model):
        known = hook.weights_map
        keys, start = set(known or ()), getattr(known, "prefix", "")
        for name in hook.original_devices:
            full = f"{prefix}.{name}" if prefix else name
            if f"{start}{name}" in keys:
                found[full] = partial(known.__getitem__, name)
    return found
