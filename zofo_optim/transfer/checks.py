"""What a transfer asks of its two models, and of what it made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..names import within_peft
from .kinds import State


def check_models(small: Any, large: Any) -> None:
    """That both models are in memory, not compiled, and that the large one has room.

    Raises:
        ValueError: naming what is not so.
    """
    for which, model in (("small", small), ("large", large)):
        wrapped = next((n for n, _ in model.named_modules() if "_orig_mod" in n.split(".")), None)
        if wrapped is not None:
            raise ValueError(
                f"{which} must not be wrapped by torch.compile, as its modules have other names "
                f"then, got {wrapped!r}: pass the model within, and compile it afterwards"
            )
        absent = next((n for n, p in model.named_parameters() if p.is_meta), None)
        if absent is not None:
            raise ValueError(
                f"{which} must be in memory whole, got {absent!r} on the meta device, as where "
                "weights are offloaded: load it without"
            )
    if hasattr(large, "peft_config") or hasattr(large, "bottlenecks"):
        what = (
            "peft's: model.unload() takes it off, model.merge_and_unload() merges it"
            if hasattr(large, "peft_config")
            else "bottlenecks: load the base model anew"
        )
        raise ValueError(f"large must have no adapter yet, but has {what}")


def check_vocabularies(small: Any, large: Any, batches: Iterable[Mapping[str, Any]]) -> None:
    """That both models have all token ids of the text.

    Raises:
        ValueError: one has not.
    """
    most = max((int(batch["input_ids"].max()) for batch in batches), default=-1)
    for which, model in (("small", small), ("large", large)):
        inner: Any = within_peft(model)
        size = getattr(inner.get_input_embeddings(), "num_embeddings", None)
        if size is not None and most >= size:
            raise ValueError(
                f"batches must have token ids that both models have, got {most} where {which} has "
                f"{size}: both must have one tokenizer"
            )


def check_small_peft(small: Any, adapter: str) -> None:
    """That peft's adapter of a small model can be taken off and read.

    Raises:
        ValueError: it is not there, peft holds it in another way, or it is merged.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(small, peft.PeftModel):
        raise ValueError(
            "small must be a peft.PeftModel, as peft.get_peft_model or "
            f"peft.PeftModel.from_pretrained makes it, got a {type(small).__name__} that holds "
            "its adapters in another way"
        )
    if adapter not in small.peft_config:
        names = ", ".join(small.peft_config)
        raise ValueError(f"adapter_name must be one of the small model's, {names}, got {adapter!r}")
    for name, module in small.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                "small must not be merged, as its weights without the adapter are needed, got "
                f"{name!r} merged: call small.unmerge_adapter() first"
            )


def check_arrived(model: Any, state: State, adapter: str) -> None:
    """That a model of peft's holds an adapter's tensors, and no others of that adapter.

    Raises:
        RuntimeError: it does not, as where peft has changed its names.
    """
    import peft

    held = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for name in sorted(held.keys() | state.keys()):
        if name not in held or name not in state:
            where = "the large model" if name in state else "what was carried"
            raise RuntimeError(f"the adapter did not arrive: {where} lacks {name!r}")
        arrived = held[name]
        if arrived.is_meta or not _same(arrived.cpu(), state[name].cpu()):
            raise RuntimeError(f"the adapter did not arrive: {name!r} has other values in large")


def _same(arrived: torch.Tensor, sent: torch.Tensor) -> bool:
    """In the dtype of what arrived; NaN is NaN."""
    sent = sent.to(arrived.dtype)
    return arrived.shape == sent.shape and torch.allclose(arrived, sent, 0, 0, equal_nan=True)


def follow_mode(model: nn.Module, known: set[nn.Module], training: bool) -> None:
    """Put the modules that are new in a model into training or evaluation mode."""
    for module in model.modules():
        if module not in known:
            module.training = training
