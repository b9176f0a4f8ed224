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
from .quantized import quantize, unquantized

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = ("int8", "int4")
FORMATS = (*DTYPES, *QUANTIZED)


def without_data(model: Any) -> nn.Module:
    """The model, or that of a transformers config, on the meta device and without memory.

    Raises:
        TypeError: it is neither, or has weights that hold others in place of data.
    """
    if isinstance(model, nn.Module):
        for name, p in model.named_parameters():
            packed = is_wrapper_subclass(p) or not (p.is_floating_point() or p.is_complex())
            if packed or hasattr(p, "quant_state"):
                raise TypeError(
                    "model must have plain weights, got quantised or sharded ones, such as "
                    f"{name!r}: give its config, and weights='int8' or 'int4'"
                )
            if is_offloaded(p):
                raise TypeError(
                    f"model must have its weights in memory, got {name!r} offloaded, of which no "
                    "estimate is made"
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


def in_format(
    model: nn.Module, weights: str | None, dtype: torch.dtype, adapter: Any, **how: bool
) -> nn.Module:
    """The model on meta with its weights so stored, and with an adapter.

    Args:
        model: on the meta device; it is changed.
        weights: one of ``FORMATS``, or None: as they are.
        dtype: what quantised models compute in.
        adapter: a configuration of peft's, or None.
        how: of :func:`quantize`.
    """
    if weights is not None:
        model.to(DTYPES.get(weights, dtype))
    made, kept = model, unquantized(model) if weights in QUANTIZED else []
    if adapter is not None:
        import peft

        with torch.device("meta"), _quiet():
            made = peft.get_peft_model(model, copy.deepcopy(adapter))
    if weights in QUANTIZED:
        quantize(within_peft(made) if adapter is not None else made, kept, weights or "", **how)
    return made


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
