"""What the three loop examples share: their options, the model under LoRA, batches without end."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from experiments.methods import METHODS, AdapterOptions, prepare
from experiments.models import DEFAULT_MODEL_PACKAGE, Data, ModelError, load_problem
from experiments.options import number
from experiments.presets import preset
from experiments.tasks import TASKS, DataError, default_source, protocol

CPU = torch.device("cpu")


def loop_parser(doc: str | None) -> argparse.ArgumentParser:
    """Options; learning rates and what zeroth order trains have presets (presets.py)."""
    p = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    p.add_argument("--model", help="hub id or folder; default: the packaged MiniLM")
    p.add_argument("--task", choices=list(TASKS), default="sentiment")
    p.add_argument("--data", help="folder with the task's files, or hub")
    p.add_argument("--steps", type=number(int, 1), default=60)
    p.add_argument("--batch-size", type=number(int, 1), default=8)
    rate = number(float, 0)
    p.add_argument("--lr-zo", type=rate, help="of the base; default: the model's preset")
    p.add_argument("--lr-fo", type=rate, help="of LoRA, by SGD; default: ten times the preset's")
    p.add_argument("--include", nargs="*", help="trained by zeroth order; default: the preset's")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--out", type=Path, default=Path("runs/loop"))
    return p


def start(args: argparse.Namespace) -> tuple[Any, Data, Any]:
    """The model under LoRA, the training data, and a loader of its batches."""
    args.model = args.model or DEFAULT_MODEL_PACKAGE
    settings = preset(args.model, "hybrid-lora", args.task)
    args.include = settings.get("include", ()) if args.include is None else args.include
    for name, factor in (("lr_zo", 1), ("lr_fo", 10)):  # SGD takes more than AdamW
        if getattr(args, name) is None and name not in settings:
            raise SystemExit(f"no preset for the model {args.model!r}: give --lr-zo and --lr-fo")
        if getattr(args, name) is None:
            setattr(args, name, factor * settings[name])
    torch.manual_seed(args.seed)
    try:
        rows = protocol(args.task, args.data or default_source(args.task), args.seed)
        problem = load_problem(args.model, args.task, rows, dtype=torch.float32, device=CPU)
    except (DataError, ModelError) as error:
        raise SystemExit(str(error)) from error
    args.out.mkdir(parents=True, exist_ok=True)
    model, _ = prepare(
        METHODS["fo-lora"], problem, AdapterOptions(), zo={}, fo={}, include=(), device=CPU
    )
    return model, problem.train, Batches(problem.train, args.batch_size)


class Batches(DataLoader[Any]):
    """A DataLoader of shuffled batches, epoch after epoch."""

    def __init__(self, data: Data, size: int) -> None:
        super().__init__(
            range(len(data)),  # type: ignore[arg-type]
            batch_size=size,
            shuffle=True,
            collate_fn=data.batch,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        while True:
            yield from super().__iter__()
