"""The model that is rehearsed: on the meta device, in the dtypes and with the adapter asked for."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zofo_kernels._torch_compat import is_wrapper_subclass

from ..names import within_peft
from ..offload.in_turn import is_offloaded
from ..quantized.scales import prepare
from . import quantized, torchao_weights
from .asked import DTYPES, Asked
from .beside import add_side_updates

_QUANTIZED_IN = torch.bfloat16


def made_for(model: Any, asked: Asked) -> nn.Module:
    """The model that is rehearsed; what trains in it by gradients requires them.

    Args:
        model: of :func:`estimate_memory`.
        asked: its settings.

    Raises:
        TypeError, ValueError: see there.
    """
    made = _with_adapter(without_data(model, asked.offloaded), asked)
    if asked.method in ("zo", "fo"):
        made.requires_grad_(asked.method == "fo")
    if asked.choice == "scales":
        prepare(made)
    if asked.of_side_updates:
        add_side_updates(made, asked.of_side_updates, promotes=asked.device == "cpu")
    if asked.first and not any(p.requires_grad for p in made.parameters()):
        raise ValueError(
            f"model must have parameters that train for method={asked.method!r}, got none: give "
            "adapter="
        )
    return made


def without_data(model: Any, offloaded: bool = False) -> nn.Module:
    """The model, or that of a transformers config, on the meta device and without memory.

    Args:
        model: see :func:`estimate_memory`.
        offloaded: whether its weights may be in a file.

    Raises:
        TypeError: it is neither, or has weights that hold others in place of data.
        ValueError: its weights are offloaded, and may not be.
    """
    if isinstance(model, nn.Module):
        for name, p in model.named_parameters():
            packed = is_wrapper_subclass(p) or not (p.is_floating_point() or p.is_complex())
            if packed or hasattr(p, "quant_state"):
                raise TypeError(
                    "model must have plain weights, got quantised or sharded ones, such as "
                    f"{name!r}: give its config, and its format by weights="
                )
            if is_offloaded(p) and not offloaded:
                raise ValueError(
                    f"offloaded must be True where weights are, as {name!r} is, got False"
                )
        return _copied(model)
    try:
        import transformers
    except ImportError:
        transformers = None  # type: ignore[assignment]
    if transformers is None or not isinstance(model, transformers.PretrainedConfig):
        raise TypeError(
            "model must be a torch.nn.Module or a configuration of transformers, got "
            f"{type(model).__name__}"
        )
    config = copy.deepcopy(model)
    names = [n for n in config.architectures or () if hasattr(transformers, n)]
    kind = getattr(transformers, names[0]) if names else None
    with torch.device("meta"), _quiet():
        if kind is None:
            kind = transformers.AutoModelForCausalLM.from_config
        made: nn.Module = kind(config)
    dtype = getattr(config, "dtype", None)
    return made.to(dtype) if isinstance(dtype, torch.dtype) else made


def _copied(model: nn.Module) -> nn.Module:
    """Structure and all, with tensors on meta in place of its own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for t in own:
            if isinstance(t, Tensor) and id(t) not in memo:
                empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
                if isinstance(t, nn.Parameter):
                    memo[id(t)] = nn.Parameter(empty, requires_grad=t.requires_grad)
                else:
                    memo[id(t)] = empty
    return copy.deepcopy(model, memo)


def _with_adapter(model: nn.Module, asked: Asked) -> nn.Module:
    """The model on meta with its weights as asked for, and with an adapter.

    torchao's weights are there before the adapter, which knows them; the stand-ins of
    bitsandbytes' are not known to it, and come after.
    """
    weights = asked.weights
    if weights is not None:
        model.to(_dtype_of(asked))
    kept = quantized.unquantized(within_peft(model)) if asked.is_quantized else []
    of_torchao = asked.is_quantized and not isinstance(weights, str)
    if of_torchao:
        torchao_weights.quantize(within_peft(model), kept, weights)
    made = _adapted(model, asked)
    if asked.is_quantized and not of_torchao:
        quantized.quantize(
            within_peft(made),
            kept,
            weights,
            double_quant=asked.double_quant and asked.choice != "scales",
            fused=asked.device == "cuda",
        )
    return made


def _adapted(model: nn.Module, asked: Asked) -> nn.Module:
    """
    Raises:
        TypeError, ValueError: ``adapter`` is none, or the model has one already.
        ImportError: peft is not installed.
    """
    adapter, has_one = asked.adapter, within_peft(model) is not model
    if asked.method not in ("hybrid", "lora") or adapter is None:
        return model
    if adapter == "default" and has_one:
        return model
    if has_one:
        raise ValueError(
            f"adapter must be left alone where the model has one already, got {adapter!r}"
        )
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapter needs peft: pip install peft") from error
    if adapter in ("default", "lora"):
        adapter = peft.LoraConfig()
    if not isinstance(adapter, peft.PeftConfig):
        raise TypeError(
            f"adapter must be 'lora', a configuration of peft's or None, got {adapter!r}"
        )
    with torch.device("meta"), _quiet():
        return peft.get_peft_model(model, copy.deepcopy(adapter))  # type: ignore[no-any-return, arg-type]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inputs_of(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What the closure gives the model: the batch's tensors on meta, with labels.

    Args:
        model: whose class says what labels are.
        batch: (rows, tokens), or the mapping of tensors that the model takes.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if isinstance(batch, Mapping):
        found = {
            name: torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        if "labels" not in found:
            raise ValueError("batch must hold labels, for there to be a loss, got none")
        return found
    must = "batch must be (rows, tokens), two ints above 0, or a mapping of tensors"
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"{must}, got {batch!r}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in batch):
        raise ValueError(f"{must}, got {batch!r}")
    rows, tokens = batch
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    name = type(within_peft(model)).__name__
    of_rows = name.endswith("ForSequenceClassification")
    labels = torch.zeros(rows, dtype=torch.long, device="meta") if of_rows else ids
    return dict(input_ids=ids, labels=labels)


def _dtype_of(asked: Asked) -> torch.dtype:
    """That the model computes in, where ``weights`` says something."""
    return (asked.dtype or _QUANTIZED_IN) if asked.is_quantized else DTYPES[asked.weights]
