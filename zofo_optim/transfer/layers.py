"""Which layer of a large model takes the adapter of which layer of a small one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

POLICIES = ("spread", "nearest", "similar")


class Stack(NamedTuple):
    """The layers of a transformer."""

    name: str
    """Of the list that holds them, "model.layers"."""
    size: int
    """How many."""

    def layer(self, number: int) -> str:
        """The name of a layer."""
        return f"{self.name}.{number}"

    def split(self, module: str) -> tuple[int, str] | None:
        """The number of the layer that a module is in, and its name there; None outside."""
        if not module.startswith(f"{self.name}."):
            return None
        number, _, rest = module[len(self.name) + 1 :].partition(".")
        return int(number), rest


def stack_of(model: nn.Module) -> Stack:
    """The one list of ``config.num_hidden_layers`` layers in a transformers model.

    Raises:
        ValueError: there is none, or several (encoder and decoder).
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if getattr(config, "is_encoder_decoder", False) or len(outer) != 1 or count is None:
        raise ValueError(
            f"{type(model).__name__} must have one stack of config.num_hidden_layers = {count} "
            f"layers (an nn.ModuleList), got {outer or 'none'}; encoders with decoders have two"
        )
    return Stack(outer[0], count)


def counterparts(
    name: str, stacks: tuple[Stack, Stack], layers: Mapping[int, int]
) -> Iterator[str]:
    """The large model's modules that take the adapter of a small one's."""
    inside = stacks[0].split(name)
    if inside is None:
        yield name
        return
    number, rest = inside
    for large, small in layers.items():
        if small == number:
            yield f"{stacks[1].layer(large)}.{rest}"


def layer_map(
    policy: str | Mapping[int, int] | None,
    small: int,
    large: int,
    *,
    every: bool = False,
    similarity: Tensor | None = None,
) -> dict[int, int]:
    """For each layer of the large model that gets an adapter, the layer of the small one.

    Args:
        policy: "spread": each layer of the small model goes to one of the large, from the first
            to the last at equal distances. "nearest": each layer of the large model takes the
            small one at its relative depth. "similar": the order-keeping map with the largest
            sum of ``similarity``; one to one, or with ``every`` for each layer of the large model.
            A mapping is taken as it is. None: "nearest" with ``every``, else "spread".
        small, large: numbers of layers.
        every: whether each layer of the large model needs one, as prefixes do.
        similarity: (small, large), of the layers, for "similar".

    Raises:
        TypeError: layers is neither a policy nor a mapping of numbers.
        ValueError: there is no such policy, or layer; or layers are left out where all need one.
    """
    if policy is None:
        policy = "nearest" if every else "spread"
    if isinstance(policy, Mapping):
        return _checked(policy, small, large, every)
    if not isinstance(policy, str):
        raise TypeError(f"layers must be a policy or a mapping large: small, got {policy!r}")
    if policy == "spread":
        if every and small != large:
            raise ValueError(
                f"layers must not be 'spread' where each of the large model's {large} layers needs "
                f"an adapter, as with prefixes, and the small one has {small}: take 'nearest'"
            )
        if small > large:
            raise ValueError(
                f"layers='spread' needs a large model with no fewer layers, got {small} layers in "
                f"the small model and {large} in the large: take 'nearest', or a mapping"
            )
        return {_at(i, small, large): i for i in range(small)}
    if policy == "nearest":
        return {j: _at(j, large, small) for j in range(large)}
    if policy != "similar":
        raise ValueError(
            f"layers must be one of {', '.join(POLICIES)} or a mapping, got {policy!r}"
        )
    assert similarity is not None
    if every:
        return _covering(similarity)
    if small > large:
        raise ValueError(
            f"layers='similar' needs a large model with no fewer layers, got {small} layers in "
            f"the small model and {large} in the large"
        )
    return _one_to_one(similarity)


def _at(place: int, count: int, of: int) -> int:
    """The place among ``of`` at the same depth; what has one layer stands for the last."""
    depth = place / (count - 1) if count > 1 else 1.0
    return int(depth * (of - 1) + 0.5)


def _checked(mapping: Mapping[int, int], small: int, large: int, every: bool) -> dict[int, int]:
    for pair in mapping.items():
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in pair):
            raise TypeError(f"layers must map numbers of layers, got {pair[0]!r}: {pair[1]!r}")
        for number, count, which in zip(pair, (large, small), ("large", "small"), strict=True):
            if not 0 <= number < count:
                raise ValueError(
                    f"layers ({{large: small}}) must name layers of the {which} model, 0 to "
                    f"{count - 1}, got {number}"
                )
    if not mapping:
        raise ValueError("layers must map at least one layer, got none")
    missing = sorted(set(range(large)) - set(mapping))
    if every and missing:
        raise ValueError(f"layers must map each layer of the large model, got none for {missing}")
    return {j: mapping[j] for j in sorted(mapping)}


def _one_to_one(similarity: Tensor) -> dict[int, int]:
    """Dynamic programme: each small layer gets a large one, in order."""
    small, large = similarity.shape
    best = torch.full((small + 1, large + 1), -torch.inf, dtype=torch.float64)
    best[0] = 0
    for i in range(small):
        for j in range(i, large):
            best[i + 1, j + 1] = max(best[i + 1, j], best[i, j] + similarity[i, j])
    found, j = {}, large
    for i in reversed(range(small)):
        while best[i + 1, j] == best[i + 1, j - 1]:
            j -= 1
        j -= 1
        found[j] = i
    return dict(sorted(found.items()))


def _covering(similarity: Tensor) -> dict[int, int]:
    """Dynamic programme: each large layer gets a small one, never an earlier one than before."""
    large = similarity.shape[1]
    best = similarity[:, 0].to(torch.float64)
    taken: list[Tensor] = []
    for j in range(1, large):
        before, arg = best.cummax(0)
        taken.append(arg)
        best = before + similarity[:, j]
    i, found = int(best.argmax()), {}
    for j in reversed(range(large)):
        found[j] = i
        if j:
            i = int(taken[j - 1][i])
    return dict(sorted(found.items()))


def linear_cka(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Similarity of each of ``x`` (n, width) to each of ``y`` (n, width), from 0 to 1.

    Linear centred kernel alignment (Kornblith et al., ICML 2019): widths may differ, and no
    rotation or scale of either changes it.
    """

    def centred(rows: Tensor) -> Tensor:
        rows = rows.double()
        rows = rows - rows.mean(0)
        norm: Tensor = torch.linalg.matrix_norm(rows.T @ rows)
        return rows / norm.sqrt().clamp_min(1e-30)

    xs, ys = [centred(rows) for rows in x], [centred(rows) for rows in y]
    return torch.stack(
        [torch.stack([torch.linalg.matrix_norm(a.T @ b).square() for b in ys]) for a in xs]
    )
