"""LoRA: a change of rank r of a weight, B A, read and written in the large model's bases."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..names import within_peft
from .activations import Tap
from .heads import heads_of
from .kinds import Fitted, Pair, State, module_of, widths_of
from .layers import counterparts, stack_of
from .outputs import seen_at
from .projections import relative
from .report import Carried

_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Of peft's ways to start, those that leave the base model's weights as they are."""


class LoRA:
    """See :class:`~zofo_optim.transfer.kinds.Kind`.

    The small model's module adds B A x. Its input there is told from the large model's, x = Q X,
    without an offset, as the change has no bias to carry one; its change is written by P, which
    maps deviations of outputs: the large model's module adds (P B) (A Q) X, of the same rank.
    """

    every = False

    def __init__(
        self, small: Any, adapter: str, large: nn.Module, layers: Mapping[int, int]
    ) -> None:
        self._config, self._adapter = small.peft_config[adapter], adapter
        self._small, self._large = small, large
        _check(self._config)
        base = within_peft(small)
        self._stacks = stacks = stack_of(base), stack_of(large)
        self._modules: dict[str, tuple[str, Any]] = {}
        """By name in the large model: the name in the small one, and its module there."""
        for name, module in base.named_modules():
            if adapter in getattr(module, "lora_A", ()) or adapter in getattr(
                module, "lora_embedding_A", ()
            ):
                if module.lora_variant.get(adapter) is not None:
                    raise ValueError(
                        f"layer {name!r} cannot be mapped: its LoRA must be plain, got "
                        f"{type(module.lora_variant[adapter]).__name__}"
                    )
                for other in counterparts(name, stacks, layers):
                    self._modules[other] = (name, module)
        if not self._modules:
            raise ValueError(f"layers must map a layer with an adapter, got {dict(layers)}")
        self._heads = heads_of(base, adapter, large)
        self._ends = {other: self._pairs(other) for other in self._modules}
        self.pairs = [pair for ends in self._ends.values() for pair in ends if pair is not None]
        self.pairs += [head.pair for head in self._heads]

    def _pairs(self, other: str) -> tuple[Pair | None, Pair | None]:
        """Of what the module reads, and of what it writes; tokens are the same in both models."""
        name, module = self._modules[other]
        counterpart = module_of(self._large, other)
        ours, theirs = widths_of(name, module), widths_of(other, counterpart)
        embeds = bool(module.lora_embedding_A)
        if embeds != isinstance(counterpart, nn.Embedding) or (embeds and ours[0] != theirs[0]):
            raise ValueError(
                f"layer {other!r} cannot be mapped: it has {theirs[0]} inputs "
                f"({type(counterpart).__name__}) where the small model's {name!r} has {ours[0]} "
                f"({type(module.get_base_layer()).__name__})"
            )
        reads = Pair(Tap(name, "input"), Tap(other, "input"), (ours[0], theirs[0]), "small", "none")
        seen = seen_at(within_peft(self._small), self._stacks[0], name)
        place = Tap(name, "output") if seen is None else seen
        ends = place, Tap(self._renamed(place.module, name, other), place.side)
        writes = Pair(*ends, (ours[1], theirs[1]), "large", "centred", seen is not None)
        if embeds:
            return None, writes
        if counterpart is _speaks(self._large):
            if ours[1] != theirs[1]:
                raise ValueError(
                    f"layer {other!r} cannot be mapped: it has {theirs[1]} outputs where the small "
                    f"model's {name!r} has {ours[1]}, and these are tokens"
                )
            return reads, None
        return reads, writes

    def _renamed(self, place: str, name: str, other: str) -> str:
        """The large model's name of a place in the layer of the module of the small one."""
        ours, theirs = (
            stack.split(module) for stack, module in zip(self._stacks, (place, other), strict=True)
        )
        if place == name or ours is None or theirs is None:
            return other
        return f"{self._stacks[1].layer(theirs[0])}.{ours[1]}"

    def carried(self, maps: Mapping[Pair, Fitted]) -> tuple[State, list[Carried]]:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        state: State = {}
        rows = []
        for other, (name, module) in self._modules.items():
            tensors, row = self._one(other, name, module, maps)
            state.update({f"base_model.model.{other}.{key}": t for key, t in tensors.items()})
            rows.append(row)
        for head in self._heads:
            more, row = head.carried(maps)
            state.update({f"base_model.model.{key}": tensor for key, tensor in more.items()})
            rows.append(row)
        return state, rows

    def _one(
        self, other: str, name: str, module: Any, maps: Mapping[Pair, Fitted]
    ) -> tuple[State, Carried]:
        """A module's tensors by their names in it."""
        reads, writes = self._ends[other]
        read = None if reads is None else maps[reads]
        write = None if writes is None else maps[writes]
        keys, small_a, small_b, bias = _matrices(module, self._adapter)
        a = small_a if read is None else small_a @ read.map.matrix
        b = small_b if write is None else write.map.matrix @ small_b
        large_bias = bias if bias is None or write is None else write.map.matrix @ bias
        change = None
        if read is not None and read.source is not None and read.target is not None:
            ours = _changes(read.target.held, small_a, small_b, bias)
            theirs = _changes(read.source.held, a, b, large_bias)
            if write is not None and write.back is not None:
                theirs = theirs @ write.back.matrix.T
            change = relative(theirs, ours) if ours.any() else None
        tensors = dict(zip(keys, (a, b), strict=True))
        if large_bias is not None:
            tensors["lora_B.bias"] = large_bias
        errors = [None if end is None else end.map.error for end in (read, write)]
        return tensors, Carried("lora", name, other, errors[0], errors[1], change)

    def attach(self, state: State, scale: float) -> nn.Module:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        import peft

        config = self._config_of_large(scale)
        model: nn.Module = peft.get_peft_model(self._large, config, adapter_name=self._adapter)  # type: ignore[arg-type]
        peft.set_peft_model_state_dict(model, state, adapter_name=self._adapter)
        return model

    def _config_of_large(self, scale: float) -> Any:
        """The small adapter's, with the large model's modules by their whole names."""
        config = copy.deepcopy(self._config)
        ranks, alphas = {}, {}
        for other, (_, module) in self._modules.items():
            rank = ranks[other] = module.r[self._adapter]
            unit = math.sqrt(rank) if module.use_rslora.get(self._adapter) else rank
            alphas[other] = scale * module.scaling[self._adapter] * unit
        config.r = Counter(ranks.values()).most_common(1)[0][0]
        config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
        config.rank_pattern = {re.escape(n): r for n, r in ranks.items() if r != config.r}
        config.alpha_pattern = {
            re.escape(n): a for n, a in alphas.items() if a != config.lora_alpha
        }
        config.target_modules = set(self._modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.base_model_name_or_path = getattr(self._large, "name_or_path", None)
        config.revision = None  # of the small model's files
        config.init_lora_weights = True  # others look at the weights, and all are overwritten
        config.inference_mode = True
        return config


def _matrices(module: Any, adapter: str) -> tuple[tuple[str, str], Tensor, Tensor, Tensor | None]:
    """Names of A and B, both, (r, in) and (out, r), and the bias of B; float32 on the CPU."""
    if module.lora_embedding_A:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return ("lora_embedding_A", "lora_embedding_B"), _cpu(a), _cpu(b), None
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    bias = None if b.bias is None else _cpu(b.bias)
    return ("lora_A.weight", "lora_B.weight"), _cpu(a.weight), _cpu(b.weight), bias


def _changes(rows: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(n, in) to what LoRA adds, (n, out), without its scaling."""
    found = rows @ a.T @ b.T
    return found if bias is None else found + bias


def _speaks(model: Any) -> Any:
    """The layer whose outputs are tokens, if the model has one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _check(config: Any) -> None:
    for name, plain_value in (
        ("bias", "none"),
        ("use_dora", False),
        ("layer_replication", None),
        ("target_parameters", None),
        ("trainable_token_indices", None),
        ("megatron_config", None),
    ):
        value = getattr(config, name, plain_value)
        if value != plain_value and value:
            raise ValueError(
                f"small must have a plain LoRA, with {name}={plain_value!r}, got {value!r}"
            )
    if config.init_lora_weights not in _KEEP_THE_BASE:
        raise ValueError(
            "small must have a LoRA that started beside the base model's own weights, with "
            f"init_lora_weights one of {_KEEP_THE_BASE}, got {config.init_lora_weights!r}, which "
            "takes its first B A out of them: convert it by peft's save_pretrained("
            "path_initial_model_for_weight_conversion=)"
        )


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
