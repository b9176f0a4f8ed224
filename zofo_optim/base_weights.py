"""The trained base model's weights beside a peft adapter, which is saved without them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters import adapter_parameters
from .names import match_names, unwrapped, within_peft, without_layers
from .optimizer import HybridZOFO
from .quantized import Names, codes, tensors_for
from .sharding import fill, fsdp_modules, is_sharded, reshard, whole_of
from .whole import whole

FILE = "zo_weights.safetensors"
_CODES = "codes"


def save_base_weights(
    optimizer: HybridZOFO, model: nn.Module, folder: str | os.PathLike[str]
) -> Path:
    """Write the zeroth-order weights of ``optimizer`` to ``zo_weights.safetensors``.

    The optimizer comes first here, as its weights are what is saved; :func:`save_hybrid` takes the
    model first.

    First-order weights are left out, and so is the adapter, also where it learns by zeroth order:
    peft's ``save_pretrained`` or :func:`save_bottlenecks` writes that. Of the base model, they save
    what is named in ``modules_to_save``, not what you unfreeze by hand.

    Where weights are sharded (DTensors, as of ``fully_shard``), all processes call this: each
    parameter is gathered in turn, and the first process writes the file.

    Args:
        optimizer: whose zeroth-order groups are saved.
        model: names the parameters; what peft, torch.compile, DataParallel, DDP and averaging add
            to the base model's names is left out.
        folder: where to write; made where it is missing.

    Returns:
        The file.

    Raises:
        TypeError: ``model`` and ``optimizer`` are swapped, or of other types.
        ValueError: the model lacks a parameter of the optimizer, or two would have one name.
        RuntimeError: the process that writes could not, and this is another one.
        ImportError: safetensors is not installed.
    """
    check_arguments(model, optimizer, "save_base_weights(optimizer, model, folder)")
    path = Path(folder) / FILE
    if not any(is_sharded(p) for group in optimizer.zo_groups() for p in group.params):
        return write_tensors(path, base_weights(optimizer, model), codes_beside(model))
    first = optimizer.replicas.rank == 0
    tensors = base_weights(optimizer, model, keep=first)
    return write_once(path, tensors, codes_beside(model), first, optimizer.replicas.agree)


def check_arguments(model: object, optimizer: object, call: str) -> None:
    """Raise TypeError where they are swapped, or of other types; ``call`` is the right order."""
    if isinstance(model, HybridZOFO) or isinstance(optimizer, nn.Module):
        raise TypeError(
            f"model and optimizer must be in the order of {call}, got a "
            f"{type(model).__name__} as model and a {type(optimizer).__name__} as optimizer"
        )
    if not isinstance(optimizer, HybridZOFO):
        raise TypeError(f"optimizer must be a HybridZOFO, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def base_weights(
    optimizer: HybridZOFO, model: nn.Module, *, keep: bool = True
) -> dict[str, Tensor]:
    """What :func:`save_base_weights` writes, by the base model's names; see there.

    Sharded weights are gathered to the CPU, where ``keep`` is set: else empty ones stand for them.
    """
    model = unwrapped(model)
    reshard(fsdp_modules(model))
    known = Names(within_peft(model))
    of_adapters = {id(p) for p in adapter_parameters(model)}
    tensors = {}
    for group in optimizer.zo_groups():
        for p, given in zip(group.params, group.names, strict=True):
            if id(p) in of_adapters:
                continue
            found = known.of(p)
            if found is None:
                raise ValueError(f"model must hold all zeroth-order parameters, not so {given!r}")
            name = without_layers(found)
            if name in tensors:
                raise ValueError(
                    f"model must have one weight of the name {name!r}, peft's and torch's "
                    f"parts of names left out, got a second one, {given!r}"
                )
            whole = whole_of(p.detach())
            if is_sharded(p):
                whole = whole.cpu() if keep else whole.new_empty(0)
            tensors[name] = whole.contiguous()
    return tensors


def codes_beside(model: nn.Module) -> dict[str, str]:
    """For the metadata of a file of base weights: see :func:`zofo_optim.quantized.codes`."""
    found = {without_layers(n): code for n, code in codes(within_peft(unwrapped(model))).items()}
    return {_CODES: json.dumps(found)} if found else {}


def load_base_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read what :func:`save_base_weights` wrote into a model, with or without an adapter.

    Weights are found by name, also within torch.compile, DataParallel, DDP or an averaged model.
    Of sharded weights (DTensors) each process takes its shards.

    Where the adapter's initialisation changes the base model (PiSSA, OLoRA), load the adapter
    first, then these weights into the peft model.

    Args:
        model: the base model, or a peft model of it.
        folder: holds ``zo_weights.safetensors``; or that file.

    Raises:
        TypeError: ``model`` is no module.
        FileNotFoundError: there is none.
        ValueError: the model lacks one of the weights, has another shape, a dtype that cannot
            hold the weights, or scales of another code (NF4, FP4); nothing is changed.
        ImportError: safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; the order is "
            "load_base_weights(model, folder)"
        )
    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"no {FILE} at {str(folder)!r}; where an adapter was trained by another optimizer, "
            "there is none"
        )
    load_tensors(model, path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """A safetensors file that is there whole, or not at all; its folder is made."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as fresh:
        save_file(dict(tensors), fresh, metadata={"format": "pt", **(metadata or {})})
    return path


def write_once(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    first: bool,
    agree: Callable[[bool], bool],
) -> Path:
    """As :func:`write_tensors`, by the first of the processes that call this.

    Args:
        path, tensors, metadata: see there.
        first: whether this process is the one.
        agree: tells whether a flag is set in all processes.

    Raises:
        RuntimeError: the process that writes could not, and this is another one.
    """
    written = False
    try:
        if first:
            write_tensors(path, tensors, metadata)
        written = True
    finally:  # others wait for it
        everywhere = agree(written)
    if not everywhere:
        raise RuntimeError(
            f"folder must be one that the first process can write to, got {path.parent}"
        )
    return path


@torch.no_grad()
def load_tensors(model: nn.Module, path: Path) -> None:
    """Copy a file's tensors into the model's parameters of the same names.

    Raises:
        ValueError: see :func:`load_base_weights`; nothing is changed.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    saved = load_file(path)
    with safe_open(path, "pt") as file:
        known = json.loads((file.metadata() or {}).get(_CODES, "{}"))
    reshard(fsdp_modules(model))
    parameters = tensors_for(saved, model)
    where = match_names(saved, parameters)
    missing = [name for name in saved if name not in where]
    if missing:
        hint = ": call add_side_updates first, as before training" * ("side_update" in missing[0])
        raise ValueError(
            f"model must have the weights in {path}, but has none of {missing[:3]}{hint}"
        )
    for name, tensor in saved.items():
        ours = parameters[where[name]]
        if ours.shape != tensor.shape:
            raise ValueError(
                f"model must have weights of the shapes in {path}, got {tuple(ours.shape)} for "
                f"{name!r} of shape {tuple(tensor.shape)}"
            )
        if torch.promote_types(ours.dtype, tensor.dtype) != ours.dtype:
            raise ValueError(
                f"model must have a dtype that holds the {tensor.dtype} weights in {path}, got "
                f"{ours.dtype} for {name!r}"
            )
    _check_codes({where[name]: code for name, code in known.items() if name in where}, model, path)
    for name, tensor in saved.items():
        fill(parameters[where[name]], tensor)


def _check_codes(saved: Mapping[str, str], model: nn.Module, path: Path) -> None:
    """Raise ValueError where scales of this model are of another code than those of the file."""
    ours = codes(model) if saved else {}
    for name, code in saved.items():
        if ours.get(name, code) != code:
            raise ValueError(
                f"model must have the quantised weights that the scales in {path} were learnt "
                f"for, got {ours[name]} for {name!r}, which are of {code}"
            )
