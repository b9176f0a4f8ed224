"""Estimates of memory: beside measurements on small models, and of large models.

    python -m experiments.memory                 all parts
    python -m experiments.memory measured        small models, on this machine
    python -m experiments.memory offloaded       a small model, offloaded, on this machine
    python -m experiments.memory sizes           Llama of 1 B to 70 B, estimated
    python -m experiments.memory measured --device cuda

Each part writes OUT/PART.json (measured-cuda.json on a GPU), and table.md beside: all measured
cases, and the greatest error by kind, with columns of a GPU where there are results of one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zofo_optim.memory import MemoryEstimate, estimate_memory

from ..commands import ended, parts_first, quiet_on_one_thread, run_parts
from ..finetune import versions
from ..options import OUT, option, parse
from . import cases, resident, sizes, tables

PARTS = ("measured", "offloaded", "sizes")
Key = tuple[str, str, str]
"""Model, method and weights."""
ABOUT = "Estimates of memory, beside measurements, and of large models."


@dataclass
class MemoryOptions:
    """The command line of `memory`."""

    do: list[str] = option(
        list(PARTS), f"some of {', '.join(PARTS)}", choices=PARTS, metavar="PART"
    )
    models: list[str] = option(
        list(cases.MODELS), "some of the small models", choices=tuple(cases.MODELS)
    )
    device: str = option("cpu", "where small models train", choices=("cpu", "cuda"))
    out: Path = option(Path("runs/memory"), OUT)


class Command:
    """The parts.

    Args:
        options: the command line.
        console: to print to.
    """

    def __init__(self, options: MemoryOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._out = options.out

    def measured(self) -> None:
        """What is in the file already is not measured again, only estimated."""
        device = self._options.device
        part = "measured" if device == "cpu" else f"measured-{device}"
        rows = self._rows(part)
        for model in self._options.models:
            for name, (method, settings) in cases.METHODS.items():
                for weights in cases.weights_of(method, settings, model):
                    key = model, name, weights
                    found = estimate_memory(
                        cases.MODELS[model](), method, cases.BATCH,
                        weights=cases.format_of(weights), device=device, **settings,
                    )  # fmt: skip
                    if key not in rows:
                        with tempfile.TemporaryDirectory() as folder:
                            seen = cases.measured(
                                cases.MODELS[model](), method, settings, weights, device, folder
                            )
                        rows[key] = dict(measured=seen.later, measured_first=seen.first)
                    rows[key] |= _estimated(found)
                    self._keep(part, rows, key)

    def offloaded(self) -> None:
        """Likewise; of resident memory."""
        rows = self._rows("offloaded")
        for name, (method, settings) in resident.METHODS.items():
            for weights in resident.weights_of(method, settings):
                key = "Llama", name, weights
                found = estimate_memory(
                    resident.config(), method, resident.BATCH,
                    weights=weights, device="cpu", **settings,
                )  # fmt: skip
                if key not in rows:
                    seen = resident.measured(name, weights)
                    rows[key] = dict(measured=seen.later, measured_first=seen.first)
                rows[key] |= _estimated(found)
                self._keep("offloaded", rows, key)

    def _rows(self, part: str) -> dict[Key, dict[str, Any]]:
        path = self._out / f"{part}.json"
        found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        return {(row["model"], row["method"], row["weights"]): row for row in found}

    def _keep(self, part: str, rows: dict[Key, dict[str, Any]], key: Key) -> None:
        names = ("model", "method", "weights")
        rows[key] = dict(zip(names, key, strict=True)) | rows[key]
        self._console.print(json.dumps(rows[key]), highlight=False)
        self._write(part, dict(rows=list(rows.values())))
        tables.write(self._out)

    def sizes(self) -> None:
        """What is in the file already is not estimated again."""
        path = self._out / "sizes.json"
        before = json.loads(path.read_text(encoding="utf-8"))["peaks"] if path.exists() else {}
        found: dict[str, dict[str, Any]] = {name: before.get(name, {}) for name in sizes.SHAPES}
        for name, by_weights in found.items():
            for weights in sizes.WEIGHTS:
                if weights not in by_weights:
                    by_weights[weights] = sizes.peaks(name, weights)
                    self._write("sizes", dict(batch=sizes.BATCH, peaks=found))

    def _write(self, part: str, content: dict[str, Any]) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**content, "versions": versions()}, indent=1) + "\n"
        (self._out / f"{part}.json").write_text(text, encoding="utf-8")


def _estimated(found: MemoryEstimate) -> dict[str, int]:
    return dict(estimated=found.peak, estimated_first=found.most)


def main(argv: Sequence[str] | None = None) -> int:
    given = parts_first(argv, PARTS)
    options, parser = parse(MemoryOptions, "experiments.memory", ABOUT, given, epilog="")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none")
    console = Console(width=1000)
    quiet_on_one_thread()

    def run() -> None:
        run_parts(Command(options, console), PARTS, options.do)

    return ended(parser, console, run, f"Results: {options.out}")


if __name__ == "__main__":
    raise SystemExit(main())
