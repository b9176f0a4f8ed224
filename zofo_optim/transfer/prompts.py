"""Virtual tokens: prompts (Lester et al., EMNLP 2021) and prefixes (Li and Liang, ACL 2021).

Both are points: a prompt among the token embeddings, a prefix among the keys and values that a
layer's attention has in its cache. So both are carried by affine maps, fitted on real text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..names import within_peft
from .activations import Tap
from .activations_cache import CACHED, cache_shape
from .heads import Head, heads_of
from .kept import bridge_of
from .kinds import Fitted, Pair, State, widths_of
from .layers import stack_of
from .report import Carried

POINTS = "prompt_embeddings"
"""What peft calls the virtual tokens of both kinds in its files."""


class _VirtualTokens:
    """What prompts and prefixes share."""

    pairs: list[Pair]

    def __init__(self, small: Any, adapter: str, large: nn.Module) -> None:
        self._config, self._large, self._adapter = small.peft_config[adapter], large, adapter
        if self._config.num_transformer_submodules != 1:
            raise ValueError(
                "small must be an encoder or a decoder for its virtual tokens to be carried, got "
                f"num_transformer_submodules={self._config.num_transformer_submodules}"
            )
        self._points = _points(small, adapter)
        self._heads: list[Head] = heads_of(within_peft(small), adapter, large)

    def _with_heads(
        self, points: Tensor, rows: list[Carried], maps: Mapping[Pair, Fitted]
    ) -> tuple[State, list[Carried]]:
        state: State = {POINTS: points}
        for head in self._heads:
            more, row = head.carried(maps)
            state.update({f"base_model.{name}": tensor for name, tensor in more.items()})
            rows = [*rows, row]
        return state, rows

    def _attached(self, state: State, **changes: Any) -> nn.Module:
        import peft

        config = copy.deepcopy(self._config)
        changes["base_model_name_or_path"] = None  # peft takes the large model's
        changes["revision"] = None
        changes["inference_mode"] = True  # no text, no words and no random numbers to start from
        if config.modules_to_save is not None:
            changes["modules_to_save"] = list(config.modules_to_save)  # peft adds to it
        for name, value in changes.items():
            setattr(config, name, value)
        large: Any = self._large
        with torch.random.fork_rng():  # peft draws what is overwritten
            model: nn.Module = peft.get_peft_model(large, config, adapter_name=self._adapter)
        peft.set_peft_model_state_dict(model, state, adapter_name=self._adapter)
        return model


class Prompt(_VirtualTokens):
    """See :class:`~zofo_optim.transfer.kinds.Kind`.

    A virtual token's embedding e becomes M e + m, the affine map that tells the large model's
    embeddings of real tokens from the small one's.
    """

    every = None

    def __init__(
        self, small: Any, adapter: str, large: nn.Module, layers: Mapping[int, int]
    ) -> None:
        super().__init__(small, adapter, large)
        (ours, narrow), (theirs, wide) = _embedding(within_peft(small)), _embedding(large)
        if self._points.shape[1] != narrow:
            raise ValueError(
                f"layer {ours!r} cannot be mapped: it has embeddings of width {narrow}, and its "
                f"prompt has {self._points.shape[1]}"
            )
        ends = (Tap(ours, "output"), Tap(theirs, "output"))
        self._pair = Pair(*ends, (narrow, wide), "large", "affine")
        self.pairs = [self._pair, *(head.pair for head in self._heads)]

    def carried(self, maps: Mapping[Pair, Fitted]) -> tuple[State, list[Carried]]:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        through, pair = maps[self._pair].map, self._pair
        row = Carried("prompt", pair.small.module, pair.large.module, output_error=through.error)
        return self._with_heads(through(self._points), [row], maps)

    def attach(self, state: State, scale: float) -> nn.Module:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        sizes = dict.fromkeys(("num_layers", "num_attention_heads"))  # None: as peft sees them
        return self._attached(state, token_dim=state[POINTS].shape[1], **sizes)


class Prefix(_VirtualTokens):
    """See :class:`~zofo_optim.transfer.kinds.Kind`.

    Keys and values of virtual tokens in a layer of the large model are M k + m of those in a layer
    of the small one: two affine maps, which tell what the layer caches on real text. A prefix that
    a perceptron makes (``prefix_projection``) is carried as what that makes. Each head needs one,
    so a bridge must have all heads.
    """

    every = True

    def __init__(
        self, small: Any, adapter: str, large: nn.Module, layers: Mapping[int, int]
    ) -> None:
        super().__init__(small, adapter, large)
        base: Any = within_peft(small)
        ours, theirs = stack_of(base), stack_of(large)
        if (bridge_of(base.config) or {}).get("heads"):
            raise ValueError(
                f"layer {theirs.layer(0)!r} cannot be mapped: the bridge lacks heads of it, which "
                "would need a prefix too, as keys of 0 take a share of the attention; make the "
                "bridge without heads="
            )
        shape, self._shape = cache_shape(base), cache_shape(large)
        widths = (shape[0] * shape[1], self._shape[0] * self._shape[1])
        if self._points.shape[1] != ours.size * 2 * widths[0]:
            raise ValueError(
                f"layer {ours.layer(0)!r} cannot be mapped: {ours.size} layers with keys and "
                f"values of width {widths[0]} need prefixes of width {ours.size * 2 * widths[0]}, "
                f"got {self._points.shape[1]}"
            )
        self._points = self._points.reshape(-1, ours.size, 2, widths[0])
        self._layers = {large: layers[large] for large in range(theirs.size)}
        self._pairs = {
            (large, side): Pair(
                Tap(ours.layer(small), side),
                Tap(theirs.layer(large), side),
                widths,
                "large",
                "affine",
            )
            for large, small in self._layers.items()
            for side in CACHED
        }
        self.pairs = [*self._pairs.values(), *(head.pair for head in self._heads)]

    def carried(self, maps: Mapping[Pair, Fitted]) -> tuple[State, list[Carried]]:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        rows, mapped = [], []
        for (large, side), pair in self._pairs.items():
            through = maps[pair].map
            mapped.append(through(self._points[:, self._layers[large], CACHED.index(side)]))
            ends = pair.small.module, pair.large.module
            rows.append(Carried(side, *ends, output_error=through.error))
        return self._with_heads(torch.cat(mapped, 1), rows, maps)

    def attach(self, state: State, scale: float) -> nn.Module:
        """See :class:`~zofo_optim.transfer.kinds.Kind`."""
        heads, width = self._shape
        sizes = dict(num_layers=len(self._layers), num_attention_heads=heads)
        return self._attached(state, token_dim=heads * width, prefix_projection=False, **sizes)


def _points(small: Any, adapter: str) -> Tensor:
    """The virtual tokens, (tokens, width), float32 on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(small, adapter_name=adapter, save_embedding_layers=False)
    points: Tensor = state[POINTS]
    return points.detach().float().cpu()


def _embedding(model: Any) -> tuple[str, int]:
    """The name of the token embedding, and its width."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return name, widths_of(name, embedding)[1]
