"""A hybrid fine-tune in a folder: adapter, base model's weights, optimizer, in one call."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import has_bottlenecks
from .base_weights import (
    FILE,
    base_weights,
    check_arguments,
    codes_beside,
    load_base_weights,
    load_tensors,
    write_tensors,
)
from .journal import Journal, JournalError, replay
from .names import match_names, unwrapped
from .optimizer import HybridZOFO
from .sharding import is_sharded
from .whole import whole, write_json

SUMMARY = "hybrid.json"
FIRST_ORDER = "fo_weights.safetensors"
OPTIMIZER = "optimizer.pt"
_FORMAT = 1


def save_hybrid(
    model: nn.Module,
    optimizer: HybridZOFO,
    folder: str | os.PathLike[str],
    *,
    journal: Journal | None = None,
) -> Path:
    """Write all that :func:`load_hybrid` needs to go on with, or to use, a fine-tuned model.

    The folder gets the adapter in peft's own files (a peft model) or as :func:`save_bottlenecks`
    writes it, the other first-order weights (``fo_weights.safetensors``), the base model's trained
    weights (``zo_weights.safetensors``) or the place of a journal that remakes them, the
    optimizer's state (``optimizer.pt``), and a summary, ``hybrid.json``, which is written last: a
    folder without it was cut off. Other files in the folder stay. To keep earlier states, save each
    to a folder of its own. Buffers, such as batch-norm statistics, are not saved.

    Args:
        model: the peft model, or any module; also within torch.compile or DDP.
        optimizer: the HybridZOFO of its parameters.
        folder: where to write; made where it is missing.
        journal: attached to ``optimizer`` from the base model on; then the base model's weights
            are not written. Keep the journal's file where it is, relative to the folder. Where an
            estimate was taken and dropped since the last step, its moves may have rounded the
            weights, and the journal has no record of them yet: then the weights are written. So
            they are where the journal begins after the optimizer's first step, or where an adapter
            learns by zeroth order too.

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` and ``optimizer`` are swapped, or of other types.
        ValueError: the model lacks a parameter of the optimizer; or its weights are sharded; or the
            journal is not attached to the optimizer.
        RuntimeError: the optimizer is accumulating; its gradients would be lost.
        ImportError: safetensors is not installed.
    """
    check_arguments(model, optimizer, "save_hybrid(model, optimizer, folder)")
    if optimizer.accumulated is not None:
        raise RuntimeError(
            "optimizer must not be accumulating when it is saved; call step() or zero_grad() first"
        )
    params = (p for group in optimizer.param_groups for p in group["params"])
    if any(map(is_sharded, params)):
        raise ValueError(
            "model must have its weights whole in each process, got shards (DTensors): save by "
            "torch.distributed.checkpoint (get_state_dict), and the trained base weights for use "
            "elsewhere by save_base_weights(optimizer, model, folder) in all processes"
        )
    if journal is not None and all(known is not journal for known in optimizer.listeners):
        raise ValueError(f"journal must be attached to optimizer, got one of {journal.path}")
    model = unwrapped(model)
    first_order, learns = _first_order(model, optimizer)
    of_base = base_weights(optimizer, model)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for stale in (SUMMARY, FILE, FIRST_ORDER, OPTIMIZER):
        (path / stale).unlink(missing_ok=True)

    adapters = _save_adapters(model, path)
    written = [OPTIMIZER, *_files_of(adapters, path)]
    bottlenecks = _save_bottlenecks(model, path)
    if bottlenecks is not None:
        written.append(bottlenecks)
    if first_order:
        write_tensors(path / FIRST_ORDER, first_order)
        written.append(FIRST_ORDER)
    recorded = None
    # a journal that moves an adapter too would move again what was saved
    of_adapters = len(of_base) < sum(len(group.params) for group in optimizer.zo_groups())
    if journal is not None and not (optimizer.moves or of_adapters) and journal.start == 0:
        recorded = _place_of(journal, path, int(optimizer.zo_groups()[0].options["zo_step"]))
    elif of_base:
        write_tensors(path / FILE, of_base, codes_beside(model))
        written.append(FILE)
    with whole(path / OPTIMIZER) as fresh:
        torch.save(_plain(optimizer.state_dict()), fresh)

    summary = {
        "format": _FORMAT,
        "adapters": adapters,
        "bottlenecks": bottlenecks,
        "first_order": learns,
        "journal": recorded,
        "files": sorted(written),
    }
    write_json(path / SUMMARY, summary)
    return path


def load_hybrid(
    folder: str | os.PathLike[str], base: nn.Module, *, trainable: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """Make a fine-tuned model of its base model and what :func:`save_hybrid` wrote.

    Args:
        folder: written by :func:`save_hybrid`.
        base: the base model as it was before training, without an adapter; it is changed.
        trainable: whether the first-order parameters require gradients afterwards, so that
            :func:`hybrid_param_groups` finds both kinds again.

    Returns:
        The model, a peft model where there was one; and the optimizer's state, for
        ``optimizer.load_state_dict`` of a HybridZOFO that is constructed as before.

    Raises:
        TypeError: ``base`` is no module.
        FileNotFoundError: the folder has no ``hybrid.json``: nothing was saved there, saving was
            cut off, or it is a Trainer's; or it lacks another file that was saved, or the journal.
        ValueError: the weights do not fit the model, or (JournalError) the journal does not, or
            it is not the one that was saved: another file, or cut back since.

    Example:
        >>> model, state = load_hybrid("tuned", base=AutoModelForCausalLM.from_pretrained(name))
        >>> optimizer = HybridZOFO(hybrid_param_groups(model, zo=dict(lr=1e-6), fo=dict(lr=1e-3)))
        >>> optimizer.load_state_dict(state)
    """
    if not isinstance(base, nn.Module):
        raise TypeError(
            f"base must be a torch.nn.Module, got {type(base).__name__}; the order is "
            "load_hybrid(folder, base)"
        )
    path = Path(folder)
    if not (path / SUMMARY).is_file():
        raise FileNotFoundError(f"no {SUMMARY} at {str(folder)!r}: {_what_it_is(path)}")
    summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    if summary["format"] != _FORMAT:
        raise ValueError(
            f"{path / SUMMARY} must be of format {_FORMAT}, got {summary['format']!r}; it is of "
            "another version of zofo-optim"
        )
    _check_files(path, summary)
    state: dict[str, Any] = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    # adapters first: some change the base model as they are made (PiSSA, OLoRA)
    model = _load_adapters(base, path, summary["adapters"], trainable)
    if summary.get("bottlenecks") is not None:
        from .transfer.bottleneck_files import load_bottlenecks

        load_bottlenecks(model, path / summary["bottlenecks"], trainable=trainable)
    recorded = summary["journal"]
    if recorded is not None:
        replay(model, _found(path, recorded), stop=recorded["step"])
    elif (path / FILE).is_file():
        load_base_weights(model, path)
    learns = _dtypes(model, summary["first_order"])
    if (path / FIRST_ORDER).is_file():
        load_tensors(model, path / FIRST_ORDER)
    for name, p in model.named_parameters():
        p.requires_grad_(trainable and name in learns)
    return model, state


def _what_it_is(path: Path) -> str:
    """Of a folder without a summary: what it seems to be, and what to do with it."""
    if not path.is_dir():
        return "that is a file, not a folder" if path.exists() else "there is no such folder"
    checkpoints = sorted(path.glob("checkpoint-*"))
    of_trainer = any(
        (path / name).is_file() for name in ("trainer_state.json", "training_args.bin")
    )
    if not of_trainer and not checkpoints:
        return "nothing was saved there by save_hybrid, or saving was cut off"
    load = "from_pretrained(folder)"
    if (path / "adapter_config.json").is_file() and (path / FILE).is_file():
        load = "PeftModel.from_pretrained(base, folder), then load_base_weights(model, folder)"
    elif (path / "adapter_config.json").is_file():
        load = "PeftModel.from_pretrained(base, folder)"
    elif (path / FILE).is_file():
        load = "load_base_weights(model, folder)"
    if (path / "trainer_state.json").is_file():
        load += "; go on training with trainer.train(resume_from_checkpoint=folder)"
    elif not of_trainer:
        load = f"choose a checkpoint, such as {checkpoints[-1].name}, and load that"
    return f"it was saved by a Trainer, not by save_hybrid; {load}"


def _check_files(path: Path, summary: dict[str, Any]) -> None:
    """Raise FileNotFoundError where something that was saved is gone, before anything is loaded."""
    files = summary.get("files", [OPTIMIZER])  # earlier versions named none
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{', '.join(missing)} missing in {str(path)!r}, where save_hybrid wrote it; copy the "
            "whole folder, or save again"
        )
    if summary["journal"] is not None:
        journal = path.resolve() / str(summary["journal"]["path"])
        if not journal.is_file():
            raise FileNotFoundError(
                f"the journal {os.path.normpath(journal)} is missing, from which "
                f"{path / SUMMARY} has the base model's weights; put it there, or write the weights"
                " too, by save_hybrid without journal"
            )


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without numpy's scalars (a learning rate from a table): torch.load refuses them."""
    for group in state["param_groups"]:
        group.update({k: v.item() for k, v in group.items() if isinstance(v, np.generic)})
    return state


def _place_of(journal: Journal, folder: Path, step: int) -> dict[str, Any]:
    """Where a journal is, and what it holds up to now, by which it is known again."""
    journal.flush()
    content = journal.path.read_bytes()
    return {
        "path": os.path.relpath(journal.path.resolve(), folder.resolve()),
        "step": step,
        "size": len(content),
        "crc": zlib.crc32(content),
    }


def _found(folder: Path, recorded: dict[str, Any]) -> Path:
    """The journal of :func:`_place_of`; it may have grown since."""
    path = folder.resolve() / str(recorded["path"])
    with path.open("rb") as file:
        content = file.read(recorded["size"])
    if len(content) != recorded["size"] or zlib.crc32(content) != recorded["crc"]:
        raise JournalError(
            f"{path} is not the journal that {folder / SUMMARY} was saved with: it is another "
            f"run's, or it was cut back before step {recorded['step']} and went on from there"
        )
    return path


def _dtypes(model: nn.Module, learns: dict[str, str]) -> set[str]:
    """Give first-order parameters the dtypes that they had (peft loads 16-bit ones as fp32).

    Returns:
        Their names in the model.

    Raises:
        ValueError: the model lacks some.
    """
    parameters = dict(model.named_parameters())
    where = match_names(learns, parameters)
    missing = [name for name in learns if name not in where]
    if missing:
        raise ValueError(
            f"base must have the first-order parameters that were saved, but has none of "
            f"{missing[:3]}"
        )
    for name, dtype in learns.items():
        p, wanted = parameters[where[name]], getattr(torch, dtype)
        if p.dtype != wanted:
            p.data = p.data.to(wanted)
    return set(where.values())


def _first_order(
    model: nn.Module, optimizer: HybridZOFO
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The first-order weights that no adapter's files hold, by name; and the dtypes of all."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for group in optimizer.param_groups if group["mode"] == "fo"]
    found = {}
    for p in (p for group in groups for p in group["params"]):
        if id(p) not in names:
            raise ValueError(
                "model must hold all first-order parameters of the optimizer, got one of shape "
                f"{tuple(p.shape)} that it lacks"
            )
        found[names[id(p)]] = p.detach()
    saved: set[int] = set()
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        for adapter in model.peft_config:  # type: ignore[union-attr]
            state = get_peft_model_state_dict(model, adapter_name=adapter)
            saved.update(tensor.data_ptr() for tensor in state.values())
    if has_bottlenecks(model):
        from .transfer.bottleneck_files import bottleneck_state

        saved.update(tensor.data_ptr() for tensor in bottleneck_state(model).values())
    own = {
        name: tensor.contiguous()
        for name, tensor in found.items()
        if tensor.data_ptr() not in saved
    }
    return own, {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in found.items()}


def _save_adapters(model: Any, path: Path) -> dict[str, Any] | None:
    """By peft's own means; their names and which are active, or None without peft."""
    if not hasattr(model, "peft_config"):
        return None
    model.save_pretrained(path)
    return {"names": list(model.peft_config), "active": list(model.active_adapters)}


def _save_bottlenecks(model: nn.Module, path: Path) -> str | None:
    """The name of their file, or None without any."""
    if not has_bottlenecks(model):
        return None
    from .transfer.bottleneck_files import save_bottlenecks

    return save_bottlenecks(model, path).name


def _files_of(adapters: dict[str, Any] | None, path: Path) -> list[str]:
    """What peft wrote for them, relative to the folder."""
    names = [] if adapters is None else adapters["names"]
    places = [path if name == "default" else path / name for name in names]
    files = [file for place in places for file in place.glob("adapter_*") if file.is_file()]
    return [file.relative_to(path).as_posix() for file in files]


def _load_adapters(
    base: nn.Module, path: Path, adapters: dict[str, Any] | None, trainable: bool
) -> nn.Module:
    if adapters is None:
        return base
    from peft import PeftModel

    model: Any = None
    for name in adapters["names"]:
        folder = path if name == "default" else path / name
        if model is None:  # peft loads prompts for inference only; load_hybrid makes them train
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, name)
        model.peft_config[name].inference_mode = not trainable
    active = adapters["active"]
    if len(active) == 1:
        model.set_adapter(active[0])
    else:
        model.base_model.set_adapter(active)
    assert isinstance(model, nn.Module)
    return model
