"""Resident memory of steps with offloaded weights, each case in a process of its own.

    python -m experiments.memory.resident METHOD WEIGHTS FOLDER

prints, as JSON, how far the process's resident memory grew over what it was before the model was
there. What a first step imports and compiles is none of the model's: a small one is trained before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from zofo_optim.offload import offload_weights

from . import cases

BATCH = 2, 64
_SIZES: dict[str, Any] = dict(
    vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5,
    num_attention_heads=8, use_cache=False,
)  # fmt: skip
_TINY: dict[str, Any] = dict(
    _SIZES, vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1
)
_STREAMED = dict(perturbation="streamed", offloaded=True)
_LOW_RANK = dict(_STREAMED, structure="low_rank")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zo, streamed": ("zo", _STREAMED),
    "zo, low rank": ("zo", _LOW_RANK),
    "zo, per example": ("zo", dict(_LOW_RANK, directions="per_example")),
    "hybrid, streamed": ("hybrid", _STREAMED),
    "hybrid, low rank": ("hybrid", _LOW_RANK),
    "hybrid, low rank, checkpointed": ("hybrid", dict(_LOW_RANK, gradient_checkpointing=True)),
    "hybrid, streamed, coupled": ("hybrid", dict(_STREAMED, coupling=0.1)),
    "lora, AdamW": ("lora", dict(offloaded=True, fo_optimizer="adamw")),
}
"""By name: the method and the options of ``estimate_memory``."""
_DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)


def weights_of(method: str, options: dict[str, Any]) -> tuple[str, ...]:
    """Formats that a method is measured with."""
    full = options.get("structure") is None and "coupling" not in options
    return ("fp32", "bf16") if method == "zo" and full else ("fp32",)


def config(sizes: dict[str, Any] = _SIZES) -> Any:
    """Of transformers."""
    return transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])


def measured(method: str, weights: str) -> cases.Measured:
    """In another process, whose allocator gives memory back to the kernel at once.

    Args:
        method: one of ``METHODS``.
        weights: "fp32" or "bf16".
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        for name, sizes in (("tiny", _TINY), ("model", _SIZES)):
            made: Any = transformers.LlamaForCausalLM(config(sizes))
            made.to(_DTYPES[weights])
            made.save_pretrained(Path(folder) / name)
            del made
        command = [sys.executable, "-m", "experiments.memory.resident", method, weights, folder]
        at_once = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
        done = subprocess.run(
            command, env=os.environ | at_once, check=True, stdout=subprocess.PIPE, text=True
        )
    return cases.Measured(**json.loads(done.stdout.splitlines()[-1]))


def _resident(key: str) -> int:
    """Bytes that the kernel counts for this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (found,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(found.split()[1]) * 1024


def _forget() -> int:
    """Free what can be, and forget the peak; what is resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _resident("VmRSS")


def _step_of(name: str, weights: str, folder: Path, sizes: dict[str, Any]) -> Callable[[], None]:
    """A new model with its weights offloaded, and what does a step of it."""
    from accelerate import init_empty_weights

    method, options = METHODS[name]
    with init_empty_weights():
        model: Any = transformers.LlamaForCausalLM(config(sizes))
        model.to(_DTYPES[weights])
    offload_weights(model.requires_grad_(False), folder, folder=folder.parent)
    model = cases.with_adapter(model, method, options)
    _, step = cases.training(model, config(sizes), method, options, weights, BATCH)
    return step


def _main(name: str, weights: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for _ in range(2):
        step = _step_of(name, weights, Path(folder) / "tiny", _TINY)
        step()
        step()
    del step
    before = _forget()
    step = _step_of(name, weights, Path(folder) / "model", _SIZES)
    peaks = []
    for _ in range(2):
        _forget()
        step()
        peaks.append(_resident("VmHWM") - before)
    print(json.dumps(dict(first=peaks[0], later=peaks[1])))


if __name__ == "__main__":
    _main(*sys.argv[1:])
