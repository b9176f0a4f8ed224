"""Where a model's weights are: in memory, with accelerate's hooks, or in a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weight(NamedTuple):
    """A parameter or a buffer, wherever the model has it."""

    names: list[str]
    tensor: Tensor
    places: list[tuple[nn.Module, str]]
    content: Callable[[], Tensor]
    """Its elements; they may be read from the disk for that."""

    @property
    def is_parameter(self) -> bool:
        module, name = self.places[0]
        return name in module._parameters

    def put(self, tensor: Tensor) -> None:
        """In all places."""
        for module, name in self.places:
            held = module._parameters if self.is_parameter else module._buffers
            held[name] = tensor  # type: ignore[assignment]


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors files, read one at a time.

    Args:
        folder: as ``save_pretrained`` writes it: one file, or several with an index.

    Raises:
        FileNotFoundError: it has none of these.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import safe_open

        self._open: Any = safe_open
        path = Path(folder)
        if (path / INDEX).is_file():
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: path / file for name, file in index.items()}
        elif (path / SINGLE).is_file():
            with safe_open(path / SINGLE, "pt") as file:
                self._files = dict.fromkeys(file.keys(), path / SINGLE)
        else:
            raise FileNotFoundError(
                f"checkpoint must be a folder with {SINGLE} or {INDEX}, got {str(folder)!r}; write "
                "one by save_pretrained(folder)"
            )

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def offloading_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Accelerate's hooks that keep weights elsewhere: each with the name of its module."""
    hooks = sys.modules.get("accelerate.hooks")  # else there are none
    if hooks is None:
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        found = getattr(module, "_hf_hook", None)
        for hook in found.hooks if isinstance(found, hooks.SequentialHook) else [found]:
            if isinstance(hook, hooks.AlignDevicesHook) and hook.offload:
                yield prefix, module, hook


def _kept_by_hooks(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
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


def weights_of(model: nn.Module, checkpoint: str | Path | None) -> list[Weight]:
    """Every parameter and buffer once, in the model's order.

    Raises:
        ValueError: some have no elements anywhere, or other shapes in the checkpoint.
    """
    kept = _kept_by_hooks(model)
    saved: Mapping[str, Tensor] = {} if checkpoint is None else Checkpoint(checkpoint)
    known = _by_name(saved, model)
    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            weight = found.setdefault(id(tensor), Weight([], tensor, [], _nowhere))
            content = weight.content
            if not tensor.is_meta:
                content = tensor.detach
            elif content is _nowhere and full in kept:
                content = kept[full]
            elif content is _nowhere and full in known:
                content = partial(saved.__getitem__, known[full])
            place = module, name
            places = weight.places if place in weight.places else [*weight.places, place]
            found[id(tensor)] = Weight([*weight.names, full], tensor, places, content)
    missing = [weight.names[0] for weight in found.values() if weight.content is _nowhere]
    if missing:
        raise ValueError(
            f"model must have data for {missing[0]!r} ({len(missing)} such in all), got a tensor "
            "on the meta device that neither accelerate's hooks nor checkpoint= have; make models "
            "by accelerate.init_empty_weights(), which leaves buffers alone, initialise new layers "
            "yourself, and give a checkpoint whose names are the model's"
        )
    return list(found.values())


def _nowhere() -> Tensor:
    raise AssertionError("it is told before anything is read")


def _by_name(saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Names in the checkpoint by the model's; one may have the base model's prefix, one not."""
    prefix = getattr(model, "base_model_prefix", "")
    found = {name: name for name in saved}
    if prefix:
        for name in saved:
            found.setdefault(f"{prefix}.{name}", name)
            found.setdefault(name.removeprefix(f"{prefix}."), name)
    return found
