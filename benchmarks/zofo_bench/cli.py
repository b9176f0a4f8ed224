"""The runner: check, time, report."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .machine import header, load_average
from .registry import Benchmark, Context, Unavailable, WrongResult, missing_device, select
from .report import SCHEMA, Printer, case_result, write_json
from .timing import CompileTimer, Effort, interleave

for module in ("perturb", "many_tensors", "step", "growth"):
    importlib.import_module(f".{module}", __package__)  # enters its benchmark in the registry

FULL = Effort(repeats=15, budget=45.0)
BUSY = 0.5  # load average
WIDTH = 120  # columns, where no terminal says
QUICK = Effort(repeats=3, budget=1.0, sample=0.0002)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Run the benchmarks of zofo_kernels and zofo_optim.")
    p.add_argument("--only", metavar="PATTERN", help="benchmarks whose name holds or matches this")
    p.add_argument("--out", type=Path, metavar="DIR", help="write DIR/DEVICE/BENCHMARK.json, .png")
    p.add_argument("--quick", action="store_true", help="tiny sizes: a test of the benchmarks")
    p.add_argument("--repeats", type=int, metavar="N", help="rounds of every timing, exactly")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a benchmark refused to time a wrong result, else 0; see ``--help``."""
    p = parser()
    args = p.parse_args(argv)
    if args.repeats is not None and args.repeats < 1:
        p.error(f"--repeats must be at least 1, got {args.repeats}")
    try:
        chosen = select(args.only)
    except ValueError as error:
        p.error(str(error))
    effort = QUICK if args.quick else FULL
    if args.repeats is not None:
        effort = Effort(repeats=args.repeats, sample=effort.sample)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    load = load_average()
    if load is not None and load > BUSY:
        console.print(f"The machine is busy (load average {load:.1f}): timings will be off.")
    refused = False
    for entry in chosen:
        printer = Printer(console, entry)
        for kind in entry.devices:
            reason = missing_device(kind)
            if reason is not None:
                printer.missing(entry.name, kind, reason)
                continue
            context = Context(torch.device(kind), args.quick)
            refused |= not run(entry, context, effort, printer, args.out)
        printer.print()
    return int(refused)


def run(
    entry: Benchmark, context: Context, effort: Effort, printer: Printer, out: Path | None
) -> bool:
    """Run one benchmark on one device; False where it refused a wrong result.

    A refused benchmark writes no file, so that no old or partial numbers pass for its result.
    """
    kind = context.device.type
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": entry.name,
        "summary": entry.summary,
        "device": kind,
        "quick": context.quick,
        "machine": header(context.device),
        "effort": asdict(effort),
        "cases": [],
    }
    files = [out / kind / f"{entry.name}.{ending}" for ending in ("json", "png")] if out else []
    compiling = CompileTimer()
    with compiling:
        try:
            for case in entry.cases(context):
                case.check()
                timings = interleave(case.variants, context.device, effort)
                result["cases"].append(case_result(case, timings))
                printer.case(result["cases"][-1], kind)
                del case
        except Unavailable as error:
            printer.missing(entry.name, kind, str(error))
            return True
        except WrongResult as error:
            printer.refused(entry.name, kind, str(error))
            for file in files:
                file.unlink(missing_ok=True)
            return False
    result["numba_compile_seconds"] = compiling.seconds
    if files:
        write_json(result, files[0])
        entry.plot(result, files[1])
    return True
