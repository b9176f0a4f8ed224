"""Estimates of memory: beside measurements on small models, and of large models.

    python -m experiments.memory                 all parts
    python -m experiments.memory measured        small models, on this machine
    python -m experiments.memory sizes           Llama of 1 B to 70 B, estimated
    python -m experiments.memory measured --device cuda

Each part writes OUT/PART.json (measured-cuda.json on a GPU).
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

from zofo_optim.memory import estimate_memory

from ..commands import ended, parts_first, quiet_on_one_thread, run_parts
from ..finetune import versions
from ..options import OUT, option, parse
from . import cases, sizes

PARTS = ("measured", "sizes")
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
        """What is in the file already is not measured again."""
        device = self._options.device
        part = "measured" if device == "cpu" else f"measured-{device}"
        path = self._out / f"{part}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        there = {(row["model"], row["method"], row["weights"]) for row in rows}
        for model in self._options.models:
            for name, (method, settings) in cases.METHODS.items():
                for weights in cases.weights_of(method, settings):
                    if (model, name, weights) not in there:
                        rows.append(self._row(model, name, method, settings, weights))
                        self._console.print(json.dumps(rows[-1]), highlight=False)
                        self._write(part, dict(rows=rows))

    def _row(
        self, model: str, name: str, method: str, settings: dict[str, Any], weights: str
    ) -> dict[str, Any]:
        device, config = self._options.device, cases.MODELS[model]()
        found = estimate_memory(
            config, method, cases.BATCH, weights=weights, device=device, **settings
        )
        with tempfile.TemporaryDirectory() as folder:
            seen = cases.measured(config, method, settings, weights, device, folder)
        return dict(
            model=model,
            method=name,
            weights=weights,
            estimated=found.peak,
            measured=seen.later,
            estimated_first=found.peak_while_verifying,
            measured_first=seen.first,
        )

    def sizes(self) -> None:
        found = {
            name: {weights: sizes.peaks(name, weights) for weights in sizes.WEIGHTS}
            for name in sizes.SHAPES
        }
        self._write("sizes", dict(batch=sizes.BATCH, peaks=found))

    def _write(self, part: str, content: dict[str, Any]) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**content, "versions": versions()}, indent=1) + "\n"
        (self._out / f"{part}.json").write_text(text, encoding="utf-8")


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
