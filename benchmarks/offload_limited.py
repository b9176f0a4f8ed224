"""Steps in a process that may take less memory than the model's weights: in memory, and offloaded.

    python benchmarks/offload_limited.py --limit 200

runs each method without a limit and with it (in MB, beyond what the process has before the model),
and writes ``benchmarks/results/cpu/offload_limited.json``. The limit is a control group's, which
counts all of the process's memory, pages of files too; see ``zofo_bench/memory_limit.py``.
"""

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path

import torch
from offload import (
    METHODS,
    RESULTS,
    SIZES,
    closure_of,
    model_of,
    optimizer_of,
    times_of,
    warm_up,
    write,
)
from zofo_bench.machine import header
from zofo_bench.memory_limit import KINDS, run_limited, unavailable_reason

DTYPE = torch.float32


def read_from_the_disk() -> int:
    """Bytes, by this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith("read_bytes:")]
    return int(found.split()[1])


def measure(size: str, folder: str, method: str, offloaded: bool, steps: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = model_of(size, folder, DTYPE, "cpu", offloaded).requires_grad_(False).eval()
    nbytes = sum(p.nbytes for p in model.parameters())
    model, optimizer = optimizer_of(model, method)
    closure = closure_of(model, "cpu")
    losses, times, busy, read = [], [], [], []
    for _ in range(steps):
        before = read_from_the_disk()
        wall, processor = times_of(lambda: optimizer.step(closure), "cpu")
        times.append(wall)
        busy.append(processor)
        read.append(read_from_the_disk() - before)
        losses.append(float(optimizer.last_loss))
    return {
        "weights": nbytes,
        "losses": losses,
        "first_step": times[0],
        "step": statistics.median(times[1:]),
        "step_processor": statistics.median(busy[1:]),
        "read_in_a_step": statistics.median(read[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=200, help="in MB")
    parser.add_argument("--kind", choices=KINDS, default="cgroup", help="of the limit")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=4, help="the first one verifies")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="on a disk")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "offload_limited.json")
    args = parser.parse_args()
    if reason := unavailable_reason(args.kind):
        parser.error(f"--kind {args.kind}: {reason}")
    torch.set_num_threads(1)  # threads do not live on in forked processes
    cases = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = str(Path(scratch) / "checkpoint")
        write(args.size, folder, DTYPE)
        for method in METHODS:
            warm_up(method, DTYPE, "cpu")
            gc.collect()
            for offloaded, limited in ((False, False), (False, True), (True, False), (True, True)):

                def do(method: str = method, offloaded: bool = offloaded) -> dict[str, object]:
                    return measure(args.size, folder, method, offloaded, args.steps)

                limit = args.limit * 10**6 if limited else None
                outcome = run_limited(do, limit, args.kind)
                weights_in = "offloaded" if offloaded else "memory"
                case = {"method": method, "weights_in": weights_in, "limit": limit}
                cases.append({**case, "ended": outcome.ended, **(outcome.result or {})})
                print(cases[-1], flush=True)
    content = {
        "machine": header(torch.device("cpu")),
        "model": SIZES[args.size],
        "kind": args.kind,
        "cases": cases,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
