"""Side updates as files: a LoRA adapter in peft's own form."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from ..base_weights import write_tensors
from .side_module import Features, SideUpdate, features_of
from .side_updates import add_beside, base_names, linear_layers, remove_side_updates, side_updates

WEIGHTS = "adapter_model.safetensors"
ABOUT = "side_updates.json"
_PREFIX = "base_model.model."


def save_side_updates(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write what side updates have learnt as a LoRA adapter: B A is their L R^T.

    Any engine that loads peft's adapters beside the base model, quantised or not, computes with
    them; ``PeftModel.from_pretrained(base, folder).merge_and_unload()`` merges them into a base
    model in 16 or 32 bits. ``side_updates.json`` beside the adapter says how to go on, see
    :func:`load_side_updates`. peft's own adapters in the model are not written, nor is
    anything else that learns: where :func:`hybrid_param_groups` has chosen other weights of the
    base model too, such as embeddings and norms, a warning names one. ``include="side_update"``
    leaves them frozen, and :func:`save_hybrid` or :func:`save_base_weights` writes all.

    Args:
        model: has side updates, in layers that peft can adapt.
        folder: where to write; made where it is missing.

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no side updates, or some of several ranks or seeds, or ``folder`` holds
            another adapter.
        ImportError: peft or safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = side_updates(model)
    if not found:
        raise ValueError(
            "model must have side updates, got none: they are add_side_updates' and "
            "hybrid_param_groups(quantized='low_rank')'s"
        )
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(
            "save_side_updates writes peft's format, which needs: pip install peft"
        ) from error
    first = next(iter(found.values()))
    kinds = {(side.rank, side.seed) for side in found.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"model must have side updates of one rank and seed to be saved, got {sorted(kinds)}"
        )
    if first.beside:
        warnings.warn(
            f"save_side_updates writes side updates alone, but {len(first.beside)} other tensors "
            f"of the base model were to learn too, such as {first.beside[0]!r}: without these the "
            "folder is another model. Train with include='side_update', or write all by "
            "save_hybrid or save_base_weights",
            stacklevel=2,
        )
    path = Path(folder)
    if (path / WEIGHTS).exists() and not (path / ABOUT).exists():
        raise ValueError(f"folder must not hold another adapter, got {str(folder)!r}, which does")
    path.mkdir(parents=True, exist_ok=True)
    names = base_names(model, found)
    sides = {names[name]: side for name, side in found.items()}
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    LoraConfig(
        r=first.rank,
        lora_alpha=first.rank,
        target_modules=sorted(sides),
        fan_in_fan_out=all(hasattr(model.get_submodule(name), "nx") for name in found),
        base_model_name_or_path=base or None,
        inference_mode=True,
    ).save_pretrained(str(path))
    tensors = {}
    for layer, side in sides.items():
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = side.right.t().contiguous().cpu()
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = side.left.detach().cpu()
    write_tensors(path / WEIGHTS, tensors)
    about = {"rank": first.rank, "seed": first.seed, "layers": list(sides)}
    (path / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
    return path


@torch.no_grad()
def load_side_updates(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, SideUpdate]:
    """Read what :func:`save_side_updates` wrote, to the bit, so that training may go on.

    Args:
        model: the base model, quantised or not, or a peft model of it. Side updates that it has are
            filled in place; else it gets them.
        folder: holds the files.

    Returns:
        The side updates, by the layer's name.

    Raises:
        TypeError: ``model`` is no module.
        FileNotFoundError: there are none in ``folder``.
        ValueError: the model lacks one of the layers, or has it in another shape, or has side
            updates of another rank, seed or subspace or beside other layers; nothing is changed.
        ImportError: safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    path = Path(folder)
    if not (path / ABOUT).is_file() or not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"no {ABOUT} and {WEIGHTS} at {str(folder)!r}")
    from safetensors.torch import load_file

    about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    saved = load_file(path / WEIGHTS)
    layers = linear_layers(model)
    by_base = {base: name for name, base in base_names(model, layers).items()}
    lefts = {}
    for name in about["layers"]:
        left = saved[f"{_PREFIX}{name}.lora_B.weight"]
        wanted = Features(saved[f"{_PREFIX}{name}.lora_A.weight"].shape[1], left.shape[0])
        found = features_of(layers[by_base[name]]) if name in by_base else None
        if found != wanted:
            raise ValueError(
                f"model must have a linear layer {name!r} with {wanted.inputs} inputs and "
                f"{wanted.outputs} outputs, got {found}"
            )
        lefts[by_base[name]] = left
    present = side_updates(model)
    new = not present
    if new:
        chosen = {name: layers[name] for name in lefts}
        present = add_beside(model, chosen, about["rank"], about["seed"])
    kinds = {(side.rank, side.seed) for side in present.values()}
    if present.keys() != lefts.keys() or kinds != {(about["rank"], about["seed"])}:
        raise ValueError(
            f"model must have no side updates, or those of {path} (rank {about['rank']}, seed "
            f"{about['seed']}, {len(lefts)} layers), got {len(present)} of rank and seed "
            f"{sorted(kinds)}: remove_side_updates(model) first, and make the optimizer anew"
        )
    for name, base in base_names(model, present).items():
        right = saved[f"{_PREFIX}{base}.lora_A.weight"].t()
        if not torch.equal(present[name].right.cpu().to(right.dtype), right):
            if new:
                remove_side_updates(model)
            raise ValueError(
                f"folder must hold side updates beside the subspaces of this model, got others for "
                f"{base!r}: they were added to another model, or to a part of one"
            )
    for name, side in present.items():
        side.left.copy_(lefts[name])
    return present
