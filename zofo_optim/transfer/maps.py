"""The maps that an adapter needs between two models: fitted on text, or of the same units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .activations import Positions, Tap, at_rest
from .activations_cache import CACHED, record_cache
from .kept import kept_key_units, kept_layers, kept_units
from .kinds import Fitted, Pair
from .layers import Stack, linear_cka
from .projections import METHODS, Fits, Projection, Rows, measured, selection
from .recording import record


class Text(NamedTuple):
    """Unlabelled text for both models."""

    batches: Sequence[Mapping[str, Any]]
    places: Sequence[Positions]

    def rows(self, model: nn.Module, taps: Iterable[Tap]) -> dict[Tap, Rows]:
        """Activations of a model without its adapter.

        Raises:
            ValueError: naming a layer that has none to fit on, or none to tell errors by.
        """
        cached: list[Tap] = []
        others: list[Tap] = []
        for tap in taps:
            (cached if tap.side in CACHED else others).append(tap)
        with at_rest(model):
            found = record(model, others, self.batches, self.places) if others else {}
            found.update(record_cache(model, cached, self.batches, self.places))
        for tap, (fitted, held) in found.items():
            if not (len(fitted) and len(held)):
                raise ValueError(
                    f"layer {tap.module!r} cannot be mapped on {len(fitted)} rows of activations "
                    f"with {len(held)} held out: there must be some of both; give more batches, or "
                    "more tokens"
                )
        return found


def similarity_of(models: Sequence[nn.Module], stacks: Sequence[Stack], text: Text) -> Tensor:
    """(small layers, large layers): linear CKA of the layers' outputs."""
    found = []
    for model, stack in zip(models, stacks, strict=True):
        taps = [Tap(stack.layer(number), "output") for number in range(stack.size)]
        rows = text.rows(model, taps)
        found.append([rows[tap].fitted for tap in taps])
    return linear_cka(*found)


def fixed_maps(
    pairs: Iterable[Pair], config: Any, stacks: tuple[Stack, Stack]
) -> dict[Pair, Projection]:
    """The maps of units that are the same in both models; a bridge has some of them.

    Keys and values are each layer's own: a bridge shares those of the layers that it kept.

    Args:
        pairs: what is to be mapped.
        config: the small model's.
        stacks: the models' layers.

    Raises:
        ValueError: naming a layer whose units are not the same.
    """
    kept = kept_layers(config)

    def shared(pair: Pair) -> bool:
        if kept is None or pair.large.side not in CACHED:
            return True
        ours, theirs = (
            stack.split(tap.module)
            for stack, tap in zip(stacks, (pair.small, pair.large), strict=True)
        )
        assert ours is not None
        assert theirs is not None
        return kept.get(theirs[0]) == ours[0]

    return {pair: _same(pair, config) for pair in pairs if shared(pair)}


def maps_of(
    pairs: Sequence[Pair],
    fixed: Mapping[Pair, Projection],
    small: nn.Module,
    large: nn.Module,
    text: Text | None,
    method: str,
) -> dict[Pair, Fitted]:
    """A map for each pair: the fixed one, or else one that is fitted on the text; and its error.

    Raises:
        ValueError: naming a layer whose activations cannot tell the map.
    """
    missing = next((pair.large.module for pair in pairs if pair not in fixed), None)
    if text is None:
        if missing is not None:
            raise ValueError(f"batches must be given to map layer {missing!r}, got None")
        return {pair: Fitted(fixed[pair]) for pair in pairs}
    method = METHODS[0] if method == "same" else method
    found, fits = {}, Fits()
    pairs = list(dict.fromkeys(pairs))
    ours = text.rows(small, (pair.small for pair in pairs))
    theirs = text.rows(large, (pair.large for pair in pairs))
    for pair in pairs:
        ends = (ours[pair.small], theirs[pair.large])
        source, target = ends if pair.to == "large" else ends[::-1]
        back = None
        if pair in fixed:
            there = measured(fixed[pair], source, target, pair.offset)
            if pair.to == "large":
                back = Projection(there.matrix.T)
        else:
            if pair.to == "large":
                _check_spanned(pair, len(source.fitted))
            there = fits.fit(source, target, method, pair.offset)
            _check_tells(pair, there, method)
            if pair.to == "large":
                back = fits.fit(target, source, method, pair.offset)
        found[pair] = Fitted(there, source, target, back)
    return found


def _check_tells(pair: Pair, there: Projection, method: str) -> None:
    """That the map does anything.

    Raises:
        ValueError: it does not, and would carry nothing.
    """
    if there.matrix.any():
        return
    source, target = ("small", "large") if pair.to == "large" else ("large", "small")
    raise ValueError(
        f"layer {pair.large.module!r} cannot be mapped by {method!r}: the best map would be zero, "
        f"and carry nothing, as the {target} model's activations are zero, or the {source} one's "
        "do not tell them on the texts that are held out; give more batches, or map other layers"
    )


def _check_spanned(pair: Pair, rows: int) -> None:
    """That the rows can tell where each direction of the small model's activation goes.

    Raises:
        ValueError: they cannot.
    """
    width = pair.widths[0]
    if not pair.spanned:
        raise ValueError(
            f"layer {pair.large.module!r} cannot be mapped by activations: the small model's "
            f"{pair.small.module!r} has {width} outputs, more than inputs, so that text does not "
            "show all their directions; adapt other layers, or train on a bridge_model of large"
        )
    if rows < width:
        raise ValueError(
            f"layer {pair.large.module!r} cannot be mapped on {rows} rows of activations: there "
            f"must be as many as it has units in the small model, {width}; give more batches, or "
            "more tokens"
        )


def _same(pair: Pair, config: Any) -> Projection:
    """The map of units that are the same in both models; a bridge has some of them."""
    name, side = pair.large
    if side in CACHED:
        kept = kept_key_units(config, int(name.rpartition(".")[2]))
    else:
        kept = kept_units(config, name, side)
    small, large = pair.widths
    if small != (large if kept is None else len(kept)):
        raise ValueError(
            f"layer {name!r} cannot be mapped with width='same': its {side} has {large} units and "
            f"that of the small model's {pair.small.module!r} {small}; take 'least_squares'"
        )
    found = selection(kept, large)
    return found if pair.to == "small" else Projection(found.matrix.T.contiguous())
