"""The runner: check, time, report."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .machine import folder, header, load_average
from .measure import count, free_memory, measure
from .registry import Benchmark, Context, Unavailable, WrongResult, missing_device, select
from .report import SCHEMA, Printer, case_result, write_json
from .timing import CompileTimer, Effort

# many_tensors last: the profiler, once used, may slow what follows
MODULES = ("perturb", "step", "causal_lm", "streamed", "directions", "population", "journal")
for module in (*MODULES, "growth", "many_tensors"):
    importlib.import_module(f".{module}", __package__)  # enters its benchmark in the registry

DEVICES = ("cpu", "cuda")
FULL = Effort(repeats=15, budget=45.0)
CUDA_SAMPLE = 0.02  # seconds: waiting for the device costs some 20 µs a sample
BUSY = 0.5  # load average
WIDTH = 120  # columns, where no terminal says
QUICK = Effort(repeats=3, budget=1.0, sample=0.0002)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Run the benchmarks of zofo_kernels and zofo_optim.")
    p.add_argument("--only", metavar="PATTERN", help="benchmarks whose name holds or matches this")
    p.add_argument("--device", choices=DEVICES, help="only on this kind of device")
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
            if args.device not in (None, kind):
                continue
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
    One that runs out of the device's memory keeps the cases that it had measured.
    """
    kind = context.device.type
    if kind == "cuda" and not context.quick:
        effort = replace(effort, sample=CUDA_SAMPLE)
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
    where = out / folder(context.device) if out else None
    files = [where / f"{entry.name}.{ending}" for ending in ("json", "png")] if where else []
    compiling = CompileTimer()
    stopped = None
    with compiling:
        try:
            for found in _measured(entry, context, effort, printer):
                result["cases"].append(found)
            if entry.counts:
                _count(entry, context, result["cases"])
        except Unavailable as error:
            printer.missing(entry.name, kind, str(error))
            return True
        except torch.OutOfMemoryError as error:
            stopped = f"out of memory: {str(error).splitlines()[0]}"
        except WrongResult as error:
            printer.refused(entry.name, kind, str(error))
            for file in files:
                file.unlink(missing_ok=True)
            return False
    for found in result["cases"]:
        printer.case(found, kind)
    if stopped is not None:
        result["stopped"] = stopped
        printer.missing("the rest", kind, stopped)
    result["numba_compile_seconds"] = compiling.seconds
    if files and result["cases"]:
        write_json(result, files[0])
        entry.plot(result, files[1])
    return True


def _measured(
    entry: Benchmark, context: Context, effort: Effort, printer: Printer
) -> Iterator[dict[str, Any]]:
    """Results of one case after the other, each checked first; one at a time is in memory."""
    for case in entry.cases(context):
        printer.progress(f"{entry.name}, {context.device.type}: {case.name}")
        case.check()
        yield case_result(case, measure(case, context.device, effort))
        del case
        free_memory(context.device)


def _count(entry: Benchmark, context: Context, results: list[dict[str, Any]]) -> None:
    """Add what a call of each variant starts; when all is timed, since counting slows it."""
    for case in entry.cases(context):
        found = next(result for result in results if result["name"] == case.name)
        for name, variant in case.variants.items():
            found["variants"][name] |= count(variant, context.device)
        del case
        free_memory(context.device)
