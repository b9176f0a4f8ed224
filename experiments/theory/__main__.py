"""The paper's figures of smoothness and of two learning rates, from runs of small models.

    python -m experiments.theory example23 --out runs/theory
    ZOFO_DATA=path/with/all python -m experiments.theory fig1a fig1b --out runs/theory

example23     f = a |x|² + b y² by one rate, by another, and by one for each variable
fig2          training losses at a small rate, a large one, and one each for base and adapter
displacement  Hessian norms by finite differences, over the length of the difference
fig1a         smoothness of a whole model along its training
fig1b         smoothness of base, adapter and head along their training
scatter       smoothness over the gradient's norm, with the functions of Definition 2.1 fitted

They are those of Ma, Yu, Huang (ICLR 2026): Example 2.3, Figures 2, 1a and 1b, and what Definition
2.1 asks for. Each writes NAME.json and NAME.png (fig2 one a model, and a CSV) into `--out`, and one
`table.md` of all that is there. Runs lie in `OUT/runs`: one that is there is not made again.

Needs, in a checkout: pip install -e ".[experiments]"
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from zofo_optim.whole import write_json

from ..commands import Ending, parts_first, quiet_on_one_thread
from ..finetune import model_name, versions
from ..options import parse
from . import displacement, example23, fig1, fig2, scatter
from .options import FIGURES, TheoryOptions

ABOUT = "Draw the paper's figures of smoothness and of two learning rates, from runs made here."
MODULES: dict[str, Any] = {
    "example23": example23,
    "fig2": fig2,
    "displacement": displacement,
    "fig1a": fig1.fig1a,
    "fig1b": fig1.fig1b,
    "scatter": scatter,
}
"""Each measures, plots and tells by a table; what `measure` returns is the other two's "result"."""


def make(name: str, options: TheoryOptions, console: Console) -> None:
    """One figure, with its numbers."""
    result = MODULES[name].measure(options, console)
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("do", "out")}
    settings["data"] = None if options.data is None else Path(options.data).name
    settings["models"] = [model_name(model) for model in options.models]
    content = {"figure": name, "result": result, "settings": settings, "versions": versions()}
    write_json(options.out / f"{name}.json", content)
    MODULES[name].plot(options.out / f"{name}.png", content)


def write_table(out: Path) -> str:
    """`table.md` of all figures in the folder; returns it."""
    parts = []
    for name in FIGURES:
        file = out / f"{name}.json"
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            parts.append(f"## {name}\n\n{MODULES[name].table(content)}")
    text = "\n".join(parts)
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    given = parts_first(argv, FIGURES)
    options, parser = parse(TheoryOptions, "experiments.theory", ABOUT, given, epilog="")
    console = Console()
    quiet_on_one_thread()
    with Ending(parser, console) as ending:
        for name in FIGURES:
            if name in options.do:
                make(name, options, console)
    if ending.code:
        return ending.code
    console.print(write_table(options.out), highlight=False, soft_wrap=True, markup=False)
    console.print(f"Figures and numbers: {options.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
