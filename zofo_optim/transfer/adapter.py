"""Carry a trained adapter from a small model to a large one, without a graph of the large one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..names import within_peft
from .activations import inputs_of, positions
from .bottleneck_map import Bottlenecks
from .checks import check_arrived, check_models, check_small_peft, check_vocabularies, follow_mode
from .intact import all_or_nothing, without_input_gradients
from .kept import check_made_of, kept_layers, nearest_kept
from .kinds import Kind
from .layers import layer_map, stack_of
from .lora import LoRA
from .maps import Text, fixed_maps, maps_of, similarity_of
from .projections import METHODS
from .prompts import Prefix, Prompt
from .report import TransferReport


def transfer_adapter(
    small: nn.Module,
    large: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    layers: str | Mapping[int, int] | None = None,
    width: str | None = None,
    scale: float = 1.0,
    tokens: int = 4096,
    adapter_name: str = "default",
    seed: int = 0,
) -> tuple[nn.Module, TransferReport]:
    """Plug the adapter of a small model into a large one of its family, by forward passes alone.

    Jin, Zhang, Zong (EMNLP 2023): the adapter learns on a small model by gradients; the large model
    is never back-propagated through, not even here. Both models read the same unlabelled text;
    linear maps between their activations carry the adapter. LoRA keeps its rank: A Q and P B, with
    Q from what the large model's module reads to what the small one's does, and P between their
    outputs. Prompts and prefixes are mapped as points, bottleneck adapters as two maps around the
    same inner units. Trained heads (peft's ``modules_to_save``) come along.

    Memory: a forward pass of each model in turn; on the CPU the activations, ``tokens`` rows in
    float32 of each place where an adapter reads or writes. Time: a pass over ``batches`` of each
    model, and for each map an eigenvalue decomposition of a square matrix of its input's width.

    Args:
        small: a PeftModel with LoRA, prefix or prompt tuning, or a model with bottlenecks
            (:func:`add_bottlenecks`). It is left as it was.
        large: a transformers model of the same class without an adapter: larger, or the one of
            which :func:`bridge_model` made ``small``. It gets the adapter in place, and none of its
            parameters requires a gradient afterwards; new modules are in its mode, of training or
            evaluation; if anything fails, it is as it was.
        batches: unlabelled text as both models take it, mappings with ``input_ids`` and perhaps
            ``attention_mask``, (texts, tokens); labels are left out. One text in four is held out.
            None: only where nothing is to be fitted, with ``width="same"`` and layers that are
            given; nothing is measured then. A bridge's prefixes need text for layers that it lacks.
        layers: for which layers of the large model the adapter is whose: "spread", "nearest",
            "similar", or a mapping from large to small, see :func:`layer_map`. None: the layers
            that a bridge kept; else "nearest" for prefixes, which each layer needs, and "spread"
            for others; the only value for prompts, which are in no layer.
        width: how activations are mapped: "procrustes" (a rotation and a scale, so that sizes are
            kept), "least_squares" (with a ridge, chosen on the held-out texts), "same" (not at all:
            both models have the same units, or ``small`` is a bridge with some of the large
            model's). None: "same" for a bridge, else "procrustes": least squares leaves out what it
            cannot tell, and with it much of a change that lies where activations vary little.
        scale: what the adapter adds is multiplied by it, as where one layer of the small model
            stands for two of the large one; not for prompts and prefixes.
        tokens: at most so many are taken of the batches.
        adapter_name: of the adapter in ``small``, and in ``large``.
        seed: of the choice of tokens and of the texts that are held out.

    Returns:
        The large model with the adapter (a PeftModel; for bottlenecks the model itself), and what
        was carried, and how well.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: naming the layer, what cannot be mapped; or naming the argument, a value that
            cannot be.
    """
    check_models(small, large)
    make = _kind_of(small, adapter_name)
    config = getattr(within_peft(small), "config", None)
    kept = kept_layers(config)
    width = width or (METHODS[0] if kept is None else "same")
    if width not in METHODS:
        raise ValueError(f"width must be one of {', '.join(METHODS)}, got {width!r}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer, got {tokens!r}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if scale != 1 and make in (Prompt, Prefix):
        raise ValueError(f"scale must be 1 for prompts and prefixes, as points, got {scale}")
    if make.every is None and layers is not None:
        raise ValueError(f"layers must be None for prompts, which are in no layer, got {layers!r}")
    read = None if batches is None else inputs_of(batches)
    if read is None and (width != "same" or layers == "similar"):
        raise ValueError(
            f"batches (unlabelled text) must be given, as width={width!r}, layers={layers!r} are "
            "fitted on it, got None"
        )
    check_vocabularies(small, large, read or ())
    text = None if read is None else Text(read, positions(read, tokens, seed))
    stacks = stack_of(within_peft(small)), stack_of(large)
    check_made_of(config, large)

    if layers is None and kept is not None:
        layers = nearest_kept(kept, stacks[1].size) if make.every else kept
    similarity = None
    if layers == "similar" and text is not None:
        similarity = similarity_of((small, large), stacks, text)
    mapped = {}
    if make.every is not None:
        mapped = layer_map(
            layers, stacks[0].size, stacks[1].size, every=make.every, similarity=similarity
        )
    kind: Kind = make(small, adapter_name, large, mapped)
    with torch.no_grad():
        fixed = fixed_maps(kind.pairs, config, stacks) if width == "same" else {}
        maps = maps_of(kind.pairs, fixed, small, large, text, width)
        state, carried = kind.carried(maps)
    with all_or_nothing(large):
        without_input_gradients(large)  # peft forgets a hook of before its own
        known, training = set(large.modules()), large.training
        model = kind.attach(dict(state), scale)  # older peft takes heads out of what it reads
        if make is not Bottlenecks:
            check_arrived(model, state, adapter_name)
        follow_mode(model, known, training)
        model.requires_grad_(False)
        without_input_gradients(large)
    places = {name: place for place, (name, _) in enumerate(large.named_modules())}
    carried.sort(key=lambda row: places.get(row.large, len(places)))
    taken = 0 if text is None else int(sum(place.tokens.sum() for place in text.places))
    unmapped = tuple(sorted(set(range(stacks[1].size if mapped else 0)) - set(mapped)))
    return model, TransferReport(tuple(carried), mapped, width, unmapped, taken)


def _kind_of(small: Any, adapter: str) -> Any:
    """The class for the adapter of the small model; checks that there is one."""
    if hasattr(small, "bottlenecks"):
        return Bottlenecks
    if not hasattr(small, "peft_config"):
        raise ValueError(
            "small must have an adapter: of peft, or bottlenecks, got a "
            f"{type(small).__name__} without"
        )
    check_small_peft(small, adapter)
    kinds = {"LORA": LoRA, "PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}
    kind = small.peft_config[adapter].peft_type
    name = getattr(kind, "value", kind)
    if name not in kinds:
        raise ValueError(
            f"small must have an adapter of peft's types {', '.join(kinds)}, or bottlenecks, got "
            f"{name}"
        )
    return kinds[name]
