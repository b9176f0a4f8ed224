"""What a transfer carried, and how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Carried:
    """One module's adapter, carried from the small model to the large one.

    Errors are relative, ‖mapped - wanted‖ / ‖wanted‖ on texts that no map was fitted on: 0 is
    exact, 1 no better than nothing. None where nothing was measured, or nothing is changed.
    """

    kind: str
    """"lora", "head", "prompt", "keys" or "values" (of a prefix), or "bottleneck"."""
    small: str
    """The module's name in the small model."""
    large: str
    input_error: float | None = None
    """Of the small model's activations, which the adapter reads, told from the large model's."""
    output_error: float | None = None
    """Of the large model's activations, which the adapter writes, told from the small model's:
    of deviations from the mean where the adapter adds a change."""
    change_error: float | None = None
    """Of what the adapter adds in the small model: read from the large model's activations, and
    carried there and back, against as it is."""


@dataclass(frozen=True)
class TransferReport:
    """What :func:`transfer_adapter` carried; ``print`` shows a table.

    Attributes:
        rows: one for each adapted module of the large model.
        layers: for each layer of the large model that got an adapter, the small model's layer.
        width: the method by which widths were mapped.
        unmapped: layers of the large model without an adapter.
        tokens: rows of activations that maps were fitted on and measured with; 0 without text.
    """

    rows: tuple[Carried, ...]
    layers: Mapping[int, int]
    width: str
    unmapped: tuple[int, ...] = ()
    tokens: int = 0

    def __str__(self) -> str:
        said = ", ".join(f"{small} -> {large}" for large, small in self.layers.items())
        on = f"on {self.tokens} tokens" if self.tokens else "not measured, as no text was given"
        lines = [f"width: {self.width}, {on}"]
        if self.layers:
            lines.append(f"layers, small -> large: {said}")
        if self.unmapped:
            lines.append(f"no adapter: {', '.join(map(str, self.unmapped))}")
        names = max([len(row.large) for row in self.rows], default=0)
        lines.append(f"{'module':{names}}  {'kind':10}  {'input':>6}  {'output':>6}  {'change':>6}")
        for row in self.rows:
            errors = (row.input_error, row.output_error, row.change_error)
            shown = "  ".join(f"{'-' if e is None else f'{e:.3f}':>6}" for e in errors)
            lines.append(f"{row.large:{names}}  {row.kind:10}  {shown}")
        return "\n".join(lines)
