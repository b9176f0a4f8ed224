"""Peak memory and time of a step with weights in memory, and offloaded to a private file.

    python benchmarks/offload.py

runs each case in a process of its own and writes ``benchmarks/results/DEVICE/offload.json``. The
model is a Llama with random weights, which each process reads from a checkpoint. Memory on the CPU
is the growth of the process's peak resident size over what it was before the model was read.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of experiments

import torch
from zofo_bench.machine import header

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {
    "tiny": dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1),
    "small": dict(hidden_size=1024, intermediate_size=8192, num_hidden_layers=3),
    "large": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=3),
}
"""Of 0.1, 89 and 203 million parameters."""
METHODS: dict[str, dict[str, str]] = {
    "zeroth order, full directions": dict(distribution="rademacher"),
    "zeroth order, low rank": dict(structure="low_rank"),
    "hybrid LoRA, low rank": dict(structure="low_rank"),
}
VOCABULARY, TOKENS = 512, (2, 32)


def config(size: str):
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES[size], num_attention_heads=16, vocab_size=VOCABULARY)


def write(size: str, folder: str, dtype: torch.dtype) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(config(size)).to(dtype).save_pretrained(folder)


def resident(key: str) -> int:
    """Bytes that the kernel counts for this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(key + ":")]
    return int(found.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def optimizer_of(model, method: str):
    import peft

    from zofo_optim import HybridZOFO, hybrid_param_groups

    options: dict[str, dict[str, float]] = dict(zo=dict(lr=1e-6, mu=1e-3))
    if "LoRA" in method:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        options |= dict(fo=dict(lr=1e-3))
    groups = hybrid_param_groups(model, **options, verbose=False)
    return model, HybridZOFO(groups, perturbation="streamed", **METHODS[method])


def closure_of(model, device: str) -> Callable[[], torch.Tensor]:
    tokens = torch.randint(VOCABULARY, TOKENS, device=device)
    return lambda: model(input_ids=tokens, labels=tokens).loss


def warm_up(method: str, dtype: torch.dtype, device: str) -> None:
    """What is imported and compiled by a first step is not the model's."""
    with tempfile.TemporaryDirectory() as folder:
        write("tiny", folder, dtype)
        for offloaded in (False, True):
            model = model_of("tiny", folder, dtype, device, offloaded).requires_grad_(False)
            model, optimizer = optimizer_of(model, method)
            optimizer.step(closure_of(model, device))


def model_of(size: str, folder: str, dtype: torch.dtype, device: str, offloaded: bool):
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    from zofo_optim.offload import offload_weights

    if not offloaded:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    with init_empty_weights():
        model = LlamaForCausalLM(config(size)).to(dtype)
    if device == "cpu":
        offload_weights(model.requires_grad_(False), folder, folder=Path(folder).parent)
    else:
        offload_weights(model.requires_grad_(False), folder, device=device)
    return model


def measure(args: argparse.Namespace) -> dict[str, object]:
    """One case, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    warm_up(args.method, dtype, args.device)
    gc.collect()
    before = resident("VmRSS")
    forget_peak()
    model = model_of(args.size, args.folder, dtype, args.device, args.offloaded)
    model.requires_grad_(False).eval()
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model, optimizer = optimizer_of(model, args.method)
    closure = closure_of(model, args.device)
    loaded = resident("VmHWM") - before
    forget_peak()
    taken = [times_of(lambda: optimizer.step(closure), args.device) for _ in range(args.steps)]
    (first, *_), (wall, processor) = taken[0], map(list, zip(*taken[1:], strict=True))
    found = {
        "weights": nbytes,
        "loading": loaded,
        "stepping": resident("VmHWM") - before,
        "first_step": first,
        "step": statistics.median(wall),
        "step_processor": statistics.median(processor),
        "loss": float(optimizer.last_loss),
    }
    if args.device != "cpu":
        found["on_device"] = torch.cuda.max_memory_allocated()
    return found


def times_of(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds, and seconds of the processor, which others on the machine change less."""
    start, busy = time.perf_counter(), time.process_time()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def child(args: argparse.Namespace, *more: str) -> dict[str, object]:
    """The last line that such a process prints."""
    command = [sys.executable, __file__, "--size", args.size, "--dtype", args.dtype, *more]
    command += ["--device", args.device, "--steps", str(args.steps), "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=4, help="the first one verifies")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="on a disk")
    parser.add_argument("--out", type=Path, help="of the results, in place of the project's own")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--offloaded", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.size, args.folder, getattr(torch, args.dtype))
    elif args.method:
        print(json.dumps(measure(args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    cases = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = str(Path(scratch) / "checkpoint")
        child(args, "--folder", folder, "--write")
        for method in METHODS:
            for place in ("memory", "offloaded"):
                more = ["--offloaded"] * (place == "offloaded")
                found = child(args, "--folder", folder, "--method", method, *more)
                print(f"{method}, {place}: {found}", flush=True)
                cases.append({"method": method, "weights_in": place, **found})
    path = args.out or RESULTS / args.device / "offload.json"
    content = {
        "machine": header(torch.device(args.device)),
        "model": {**SIZES[args.size], "vocabulary": VOCABULARY, "dtype": args.dtype},
        "tokens": TOKENS,
        "cases": cases,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
