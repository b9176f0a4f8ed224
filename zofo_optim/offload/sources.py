"""Where a model's weights are: in memory, with accelerate's hooks, or in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..adapters import adapter_parameters
from ..names import within_peft, without_layers
from .accelerate_hooks import kept_by_hooks

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
                "one by save_pretrained(folder), or get a hub's by "
                "huggingface_hub.snapshot_download(name)"
            )

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def weights_of(model: nn.Module, checkpoint: str | Path | None) -> list[Weight]:
    """Every parameter and buffer once, in the model's order.

    Raises:
        ValueError: some have no elements anywhere, or other shapes in the checkpoint.
    """
    kept = kept_by_hooks(model)
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
    _check_none_missing(model, [w for w in found.values() if w.content is _nowhere])
    return list(found.values())


def _check_none_missing(model: nn.Module, missing: Sequence[Weight]) -> None:
    if not missing:
        return
    name, count = missing[0].names[0], len(missing)
    adapters = {id(p) for p in adapter_parameters(model)}
    if any(id(weight.tensor) in adapters for weight in missing):
        advice = (
            ", where peft makes an adapter whose base model is there: offload the base model "
            "first, offload_weights(base, checkpoint), and add the adapter then"
        )
    else:
        advice = (
            " that neither accelerate's hooks nor checkpoint= have; make models by "
            "accelerate.init_empty_weights(), which leaves buffers alone, initialise new layers "
            "yourself, and give a checkpoint whose names are the model's"
        )
    raise ValueError(
        f"model must have data for {name!r} ({count} such in all), got a tensor on the meta "
        f"device{advice}"
    )


def _nowhere() -> Tensor:
    raise AssertionError("it is told before anything is read")


def _by_name(saved: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Names in the checkpoint by the model's.

    One may have the base model's prefix, one not; peft's model has parts in them of its own.
    """
    base = within_peft(model)
    prefix = getattr(base, "base_model_prefix", "")
    found = {name: name for name in saved}
    if prefix:
        for name in saved:
            found.setdefault(f"{prefix}.{name}", name)
            found.setdefault(name.removeprefix(f"{prefix}."), name)
    if base is model:
        return found
    (around,) = [name for name, module in model.named_modules() if module is base]
    ours = {f"{around}.{name}": name for name in _names(base)}
    bare = {full: found.get(name, found.get(without_layers(name))) for full, name in ours.items()}
    return {full: name for full, name in bare.items() if name is not None}


def _names(model: nn.Module) -> Iterator[str]:
    """Of all parameters and buffers, those that are one too."""
    yield from (name for name, _ in model.named_parameters(remove_duplicate=False))
    yield from (name for name, _ in model.named_buffers(remove_duplicate=False))
