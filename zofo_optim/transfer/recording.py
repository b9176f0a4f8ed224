"""Rows of activations of a model on unlabelled text, at the same places for every model."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..names import within_peft
from .activations import Positions, Tap, forward
from .projections import Rows


def record(
    model: nn.Module,
    taps: Iterable[Tap],
    batches: Sequence[Mapping[str, Any]],
    places: Sequence[Positions],
) -> dict[Tap, Rows]:
    """Rows at the taps: of the tokens that are taken; of all texts where a module has one row each.

    Forward passes alone, without a graph, in evaluation mode, without adapters; of batches without
    a token that is taken only where a module has one row a text. Memory: that of one forward pass
    on the model's device; on the CPU, in float32, 4 bytes · tokens · the sum of the widths. Taps
    that see one and the same tensor, as those of query, key and value do, share their rows.

    Raises:
        ValueError: a module has no such activation, or not once a batch, or none that is finite.
    """
    recording = Recording(taps)
    texts = list(zip(batches, places, strict=True))
    with recording.on(model):
        for batch, place in sorted(texts, key=lambda both: not both[1].tokens.any()):
            if place.tokens.any() or recording.one_a_text:
                recording.start(place)
                forward(within_peft(model), batch)
                recording.check()
    return joined(recording.parts)


def joined(parts: dict[Tap, list[tuple[Tensor, Tensor]]]) -> dict[Tap, Rows]:
    """One after the other, so that no more than one tap's rows are there twice; empties ``parts``.

    Taps of the same parts share their rows.
    """
    sharing = defaultdict(list)
    for tap, own in parts.items():
        sharing[tuple(map(id, own))].append(tap)
    found = {}
    for taps in sharing.values():
        fitted, held = zip(*[parts.pop(tap) for tap in taps][-1], strict=True)
        found.update(dict.fromkeys(taps, Rows(torch.cat(fitted), torch.cat(held))))
    return found


class Recording:
    """Rows at the taps of a model, taken while it runs: it may change its tensors afterwards."""

    def __init__(self, taps: Iterable[Tap]) -> None:
        self.parts: dict[Tap, list[tuple[Tensor, Tensor]]] = {tap: [] for tap in taps}
        """Of each batch: fitted and held."""
        self.one_a_text = False
        """Whether a module was seen that has one row a text."""

    def start(self, place: Positions) -> None:
        """Of the next batch, these rows are taken."""
        self._place, self._uses = place, Counter[Tap]()
        self._seen: dict[int, tuple[weakref.ref[Tensor], tuple[Tensor, Tensor]]] = {}

    def check(self) -> None:
        """That each module was used once since."""
        for tap in self.parts:
            if self._uses[tap] != 1:
                raise ValueError(
                    f"module {tap.module!r} must be used once in a forward pass to be mapped, "
                    f"got {self._uses[tap]} times"
                )

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Takes what passes the taps of the model in here."""
        modules = dict(within_peft(model).named_modules())
        with ExitStack() as stack:
            for tap in self.parts:
                module = modules.get(tap.module)
                if module is None:
                    raise ValueError(
                        f"{type(within_peft(model)).__name__} must have the module {tap.module!r}"
                    )
                register: Any = (
                    module.register_forward_pre_hook
                    if tap.side == "input"
                    else module.register_forward_hook
                )
                stack.callback(register(self._taking(tap), with_kwargs=True).remove)
            yield

    def _taking(self, tap: Tap) -> Callable[..., None]:
        def take(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            self._uses[tap] += 1
            if self._uses[tap] > 1:
                return
            value = _first((*args, *kwargs.values()) if tap.side == "input" else output, tap)
            new = taken(tap, value, self._place)
            self.one_a_text |= _one_a_text(value, self._place)
            seen, old = self._seen.get(id(value), (None, new))
            if seen is None or seen() is not value or not all(map(torch.equal, old, new)):
                self._seen[id(value)] = (weakref.ref(value), new)
                old = new  # another tensor, or the same one with other values
            self.parts[tap].append(old)

        return take


def _first(value: Any, tap: Tap) -> Tensor:
    for part in value if isinstance(value, list | tuple) else (value,):
        if isinstance(part, Tensor):
            return part
    raise ValueError(f"module {tap.module!r} must have a tensor as {tap.side}, got none")


def _one_a_text(value: Tensor, place: Positions) -> bool:
    texts, length = place.tokens.shape
    return value.dim() == 2 and len(value) == texts != texts * length


def taken(tap: Tap, value: Tensor, place: Positions) -> tuple[Tensor, Tensor]:
    """The rows of a batch's activation, to fit on and held out: copies."""
    texts, length = place.tokens.shape
    if value.dim() == 2 and len(value) == texts * length:
        value = value.reshape(texts, length, value.shape[1])
    if value.shape[:2] == (texts, length) and value.dim() == 3:
        held = place.held[:, None].expand(texts, length)
        parts = (place.tokens & ~held, place.tokens & held)
    elif _one_a_text(value, place):
        parts = (~place.held, place.held)
    else:
        raise ValueError(
            f"module {tap.module!r} must have an {tap.side} of shape ({texts}, {length}, width) or "
            f"({texts}, width), got {tuple(value.shape)}"
        )
    fitted, held_out = (value[part.to(value.device)].float().cpu() for part in parts)
    if not (fitted.isfinite().all() and held_out.isfinite().all()):
        raise ValueError(
            f"module {tap.module!r} must have finite activations to be mapped, got NaN or infinite "
            f"ones as {tap.side}"
        )
    return fitted, held_out
