"""Steps by several processes on this machine, and projections to many GPUs; see docs/scaling.md.

    python benchmarks/distributed.py --out benchmarks/results

measures with gloo, on 1, 2 and 4 processes of one thread, and writes ``cpu/distributed.json``.
Projections, which measure nothing, are written to ``projected/``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of experiments

import torch
from zofo_bench import projections
from zofo_bench.machine import header
from zofo_bench.report import SCHEMA, durations, write_json
from zofo_bench.scaling_check import predicted
from zofo_bench.timing import tidy

HERE = Path(__file__).resolve().parent
LONGEST = 900
"""Seconds of a launch."""


def launch(ranks: Sequence[int], *, quick: bool, rounds: int) -> dict[str, Any]:
    """What so many processes measure, by their number.

    Raises:
        subprocess.CalledProcessError: one of them failed.
        subprocess.TimeoutExpired: they took longer than ``LONGEST``.
    """
    paths = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    if sys.platform == "linux":  # the machine's name may resolve to nothing
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        words += ["--nproc-per-node", str(max(ranks)), "-m", "zofo_bench.ranks", str(file)]
        words += ["--rounds", str(rounds), *["--quick"] * quick, "--counts", *map(str, ranks)]
        command = [sys.executable, *words]
        process = subprocess.Popen(command, env=environment)
        try:
            code = process.wait(LONGEST)
        except BaseException:
            process.send_signal(signal.SIGTERM)  # torchrun ends its processes
            process.wait()
            raise
        if code:
            raise subprocess.CalledProcessError(code, command)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def measure(ranks: Sequence[int], *, quick: bool, rounds: int) -> dict[str, Any]:
    """The content of ``distributed.json``; the first of ``ranks`` is what others are over."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": "distributed",
        "quick": quick,
        "machine": {**header(torch.device("cpu")), "torch_threads": 1},
        "rounds": rounds,
        "ranks": launch(ranks, quick=quick, rounds=rounds),
    }
    alone = result["ranks"][str(ranks[0])]["steps"]
    for count, found in result["ranks"].items():
        for name, model in predicted(found, int(count)).items():
            step = found["steps"][name]
            over = step["seconds"]["median"] / alone[name]["seconds"]["median"]
            step["over_first"] = tidy(over)
            step["predicted"] = {key: tidy(value) for key, value in model.items()}
            said = f"{durations(step['seconds'])}, {step['bytes']:,} bytes"
            print(f"{count} processes, {name}: {said}, model {model['over_measured']:.2f}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are written")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="a tiny model: a test of this file")
    args = parser.parse_args(argv)
    if args.ranks:
        result = measure(args.ranks, quick=args.quick, rounds=args.rounds)
        if args.out:
            write_json(result, args.out / "cpu" / "distributed.json")
    if args.out:
        projections.write(args.out / "projected")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
