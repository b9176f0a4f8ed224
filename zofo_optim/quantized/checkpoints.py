"""Checkpoints of models whose quantised weights transformers cannot write: what learns, alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor, nn

from zofo_kernels._torch_compat import is_wrapper_subclass

from ..adapters import adapter_parameters
from ..base_weights import (
    FILE,
    base_weights,
    codes_beside,
    load_base_weights,
    load_tensors,
    write_tensors,
)
from ..optimizer import HybridZOFO
from ..saving import FIRST_ORDER
from ..sharding import is_sharded

FILES = (FILE, FIRST_ORDER)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def has_no_files_of_its_own(model: nn.Module) -> bool:
    """Whether weights are tensors without memory of their own, and no adapter's files hold more.

    Such are torchao's and quanto's. transformers can write them where it has made them itself.
    """
    if any(hasattr(module, "peft_config") for module in model.modules()):
        return False
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    return any(is_wrapper_subclass(p) and not is_sharded(p) for p in model.parameters())


def save_trained(optimizer: HybridZOFO, model: nn.Module, folder: str | Path) -> None:
    """Write all that learns: ``zo_weights.safetensors`` and ``fo_weights.safetensors``.

    Args:
        optimizer, model: as for :func:`save_base_weights`.
        folder: which is there.
    """
    tensors = base_weights(optimizer, model), _others(optimizer, model)
    for name, found in zip(FILES, tensors, strict=True):
        if found:
            write_tensors(Path(folder) / name, found, codes_beside(model))
        else:
            (Path(folder) / name).unlink(missing_ok=True)


def _others(optimizer: HybridZOFO, model: nn.Module) -> dict[str, Tensor]:
    """What learns beside that: first-order weights, and those of bottlenecks."""
    of_adapters = {id(p) for p in adapter_parameters(model)}
    chosen = {
        id(p)
        for group in optimizer.param_groups
        for p in group["params"]
        if group["mode"] == "fo" or id(p) in of_adapters
    }
    return {
        name: p.detach().contiguous() for name, p in model.named_parameters() if id(p) in chosen
    }


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Read what :func:`save_trained` wrote.

    Args:
        model: quantised as it was, with side updates where it had some.
        folder: of the checkpoint.

    Raises:
        FileNotFoundError: it holds neither file.
        ValueError: see :func:`load_base_weights`.
    """
    zeroth_order, first_order = (Path(folder) / name for name in FILES)
    if not zeroth_order.is_file() and not first_order.is_file():
        raise FileNotFoundError(f"no {' and no '.join(FILES)} at {str(folder)!r}")
    if zeroth_order.is_file():
        load_base_weights(model, zeroth_order)
    if first_order.is_file():
        load_tensors(model, first_order)


def remove_weights(folder: str | Path) -> None:
    """Files of weights in which transformers wrote none."""
    for name in _WEIGHTS:
        (Path(folder) / name).unlink(missing_ok=True)


def check_side_options(quantized: str, given: Collection[str]) -> None:
    """
    Raises:
        TypeError: options of side updates are among a trainer's own.
    """
    if quantized == "low_rank" and "rank" in given:
        raise TypeError(
            "rank must not be given to a trainer with quantized='low_rank': call "
            "add_side_updates(model, rank=...) before, which it then uses"
        )
