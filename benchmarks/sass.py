"""Count the machine instructions of the Triton kernels, without a GPU.

    python benchmarks/sass.py            # a table
    python benchmarks/sass.py --json     # the same as a list
    python benchmarks/sass.py --check    # exit status 1 where a budget is exceeded

Each kernel is compiled for the architecture and disassembled; the count is of all instructions in
its code, up to the padding, over the elements that one thread handles. A pass is bound by memory
where the GPU can issue that many instructions in the time that an element's bytes take: on an
H200 about 31 for 4 bytes at 4.3 TB/s (132 multiprocessors, 4 instructions of 32 threads a
cycle, 1.98 GHz). The share of threads is what the registers let a multiprocessor hold at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # this is about compiled code
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from zofo_bench.stock_triton import BLOCK, randn4x_perturb  # noqa: E402

from zofo_kernels import triton_kernels as kernels  # noqa: E402
from zofo_kernels import triton_low_rank as low_rank  # noqa: E402
from zofo_kernels.distributions import BY_NAME  # noqa: E402
from zofo_kernels.structure import STREAM_LEFT, STREAM_RIGHT  # noqa: E402
from zofo_kernels.triton import COARSE_WARPS, VECTORS, WARPS  # noqa: E402

DTYPES = {
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "float32": tl.float32,
    "float64": tl.float64,
}
NARROW = ("bfloat16", "float16")
KINDS = {name: distribution.code for name, distribution in BY_NAME.items()}
NONE = kernels.NONE.value
BUDGETS = {
    ("perturb", "gaussian"): 22,
    ("perturb", "rademacher"): 12,
    ("recover_and_perturb", "gaussian"): 26,
    ("recover_and_perturb", "rademacher"): 15,
    ("restore_and_update", "gaussian"): 26,
    ("restore_and_update", "rademacher"): 15,
    ("perturb, rank 1", None): 10,
    ("recover_and_perturb, rank 1", None): 15,
    ("restore_and_update, rank 1", None): 15,
}
"""Most instructions an element, for bfloat16 rounded to nearest."""
ARGUMENTS = {
    "table": "*i64",
    "items": "*i64",
    "keys": "*i32",
    "coefficients": "*fp32",
    "rate": "*fp64",
    "a0": "u32",
    "a1": "u32",
    "b0": "u32",
    "b1": "u32",
    "scale_a": "i64",
    "scale_b": "i64",
    "weight_decay": "i64",
    "samples": "i32",
    **dict.fromkeys(("coarse_a", "coarse_b", "backs"), "i32"),
    **{f"only_{name}": "i64" for name in ("address", "size", "offset", "parameter", "source")},
}
LOW_RANK_ARGUMENTS = {
    **ARGUMENTS,
    "factors": "*fp32",
    "units": "i64",
    **{f"{name}_{of}": "i64" for of in ("a", "b") for name in ("rank", "root", "at")},
    **{f"only_{name}": "i64" for name in ("column", "row", "columns", "by_columns", "by_rows")},
    **{f"only_{name}": "i64" for name in ("left", "right")},
    **{f"rank_{of}": "i32" for of in ("a", "b")},
}
FACTORS_ARGUMENTS = {
    **{name: kind for name, kind in ARGUMENTS.items() if name in ("table", "items", "keys")},
    "factors": "*fp32",
    "k0": "u32",
    "k1": "u32",
    "rank": "i32",
    "at": "i64",
    "units": "i64",
    "half": "i32",
    "parameter": "i64",
    **{
        f"{side}_{name}": "i64"
        for side in ("left", "right")
        for name in ("first", "count", "begin")
    },
}


class Kernel(NamedTuple):
    """A row of the table, and how to compile it."""

    name: str
    dtype: str
    distribution: str | None
    rounding: str | None
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    elements: int
    """That one program handles."""


MOVES: dict[str, dict[str, Any]] = {
    "perturb": {"KIND_A": True},
    "perturb_copy": {"KIND_A": True, "SOURCE": kernels.COPY.value},
    "recover_and_perturb": {"KIND_A": True, "KIND_B": True, "SAME": True},
    "restore_and_update": {"KIND_A": True, "UPDATE": True, "SAME": True},
}
"""Those that shift weights. Of 16-bit dtypes they are "coarse": they can round stochastically."""


def variants() -> dict[str, dict[str, Any]]:
    """The constants of each of our kernels, but for dtype, distribution and rounding."""
    return {
        "copy": {"SOURCE": kernels.COPY.value},
        **MOVES,
        "restore_and_update, decay": {
            "KIND_A": True,
            "UPDATE": True,
            "SAME": True,
            "DECAY": True,
        },
        **{f"{name}, coarse": {**constants, "COARSE": True} for name, constants in MOVES.items()},
    }


def ours(name: str, dtype: str, distribution: str | None, rounding: str | None) -> Kernel:
    """One variant of the pass over the weights."""
    base = {
        "STORAGE": DTYPES[dtype],
        "ALIGNED": True,
        "ONLY": False,
        "SOURCE": kernels.IN_PLACE.value,
        "KIND_A": NONE,
        "KIND_B": NONE,
        "UPDATE": NONE,
        "SAME": False,
        "SEVERAL": False,
        "DECAY": False,
        "STOCHASTIC": rounding == "stochastic",
        "KEYS_ON_DEVICE": False,
        "COARSE": False,
        "VECTORS": VECTORS,
        "NATIVE": True,
    }
    chosen = dict(variants()[name])
    for place in ("KIND_A", "KIND_B", "UPDATE"):
        if place in chosen:
            chosen[place] = KINDS[distribution or "gaussian"]
    constants = {**base, **chosen}
    return Kernel(
        name,
        dtype,
        distribution,
        rounding,
        kernels.pass_kernel,
        ARGUMENTS,
        constants,
        COARSE_WARPS if constants["COARSE"] else WARPS,
        8 * VECTORS,
    )


LOW_RANK: dict[str, dict[str, Any]] = {
    "perturb, rank 1": {"A": True},
    "perturb, rank 4": {"A": True, "RANK": 4},
    "recover_and_perturb, rank 1": {"A": True, "B": True},
    "restore_and_update, rank 1": {"A": True, "UPDATE": True},
}
"""Moves of matrices along directions of low rank, of either distribution."""


def of_low_rank(name: str, dtype: str, rounding: str, **more: Any) -> Kernel:
    """One variant of the pass along directions of low rank; ``more`` are other constants."""
    constants = {
        "STORAGE": DTYPES[dtype],
        "ALIGNED": True,
        "ONLY": False,
        "SOURCE": kernels.IN_PLACE.value,
        "A": False,
        "B": False,
        "UPDATE": False,
        "SEVERAL": False,
        "RANK": 1,
        "MIXED": False,
        "DECAY": False,
        "STOCHASTIC": rounding == "stochastic",
        "KEYS_ON_DEVICE": False,
        "COARSE": "coarse" in name,
        "VECTORS": VECTORS,
        "NATIVE": True,
        **LOW_RANK[name.removesuffix(", coarse")],
        **more,
    }
    return Kernel(
        name,
        dtype,
        None,
        rounding,
        low_rank.low_rank_kernel,
        LOW_RANK_ARGUMENTS,
        constants,
        COARSE_WARPS if constants["COARSE"] else WARPS,
        8 * VECTORS,
    )


def factors(distribution: str, **more: Any) -> Kernel:
    """What makes the factors; its elements are a tile's, a loop goes through tiles."""
    constants = {
        "LEFT": STREAM_LEFT,
        "RIGHT": STREAM_RIGHT,
        "KIND": KINDS[distribution],
        "ONLY": False,
        "KEYS_ON_DEVICE": False,
        "NATIVE": True,
        **more,
    }
    return Kernel(
        "factors",
        "float32",
        distribution,
        None,
        low_rank.factors_kernel,
        FACTORS_ARGUMENTS,
        constants,
        WARPS,
        low_rank.PIECE.value,
    )


def stock(dtype: str) -> Kernel:
    """In-place perturbation with Triton's own generator, for comparison."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}[dtype]
    signature = {"w_ptr": f"*{short}", "n": "i32", "scale": "fp32", "seed": "i32"}
    return Kernel(
        "tl.randn4x perturb",
        dtype,
        "gaussian",
        "nearest",
        randn4x_perturb,
        signature,
        {"BLOCK": BLOCK},
        WARPS,
        BLOCK,
    )


def table(dtypes: list[str]) -> Iterator[Kernel]:
    """All rows."""
    for dtype in dtypes:
        yield ours("copy", dtype, None, None)
        for distribution in KINDS:
            for name in variants():
                if name == "copy" or ("coarse" in name and dtype not in NARROW):
                    continue
                yield ours(name, dtype, distribution, "nearest")
                if "update" in name and dtype in NARROW:
                    yield ours(name, dtype, distribution, "stochastic")
        for name in LOW_RANK:
            for full_name in (name, f"{name}, coarse")[: 1 + (dtype in NARROW)]:
                yield of_low_rank(full_name, dtype, "nearest")
                if "update" in name and dtype in NARROW:
                    yield of_low_rank(full_name, dtype, "stochastic")
        if dtype == "float32":
            yield from map(factors, KINDS)
        yield stock(dtype)


def compile_for(kernel: Kernel, architecture: int) -> bytes:
    """The kernel's cubin."""
    names = kernel.function.arg_names
    signature = {name: kernel.signature.get(name, "constexpr") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") or name == "n")
        and not kernel.function.params[i].do_not_specialize_on_alignment
    }
    source = ASTSource(
        kernel.function, signature=signature, constexprs=kernel.constants, attrs=attributes
    )
    options = {"num_warps": kernel.warps}
    if kernel.function is not randn4x_perturb:
        options["enable_fp_fusion"] = False
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return bytes(compiled.asm["cubin"])


def tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA binary tools in Triton's package.

    Raises:
        FileNotFoundError: Triton's package has no such tool.
    """
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"Triton {triton.__version__} has no {name} at {path}")
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def opcodes(listing: str) -> list[str]:
    """Opcodes of a disassembly, with modifiers, without the padding after the end."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing)
    while found and found[-1] == "NOP":
        found.pop()
    return found


def occupancy(registers: int, warps: int) -> float:
    """Share of a multiprocessor's 2,048 threads that its 65,536 registers serve (sm_80, sm_90).

    Registers are given to whole blocks, in eights a thread.
    """
    threads = 32 * warps
    blocks = 65536 // (-(-registers // 8) * 8 * threads)
    return min(1.0, blocks * threads / 2048)


def measure(kernel: Kernel, architecture: int) -> dict[str, Any]:
    """Compile, disassemble, count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compile_for(kernel, architecture))
        file.flush()
        codes = opcodes(tool("nvdisasm", "-c", file.name))
        usage = tool("cuobjdump", "-res-usage", file.name)
    resources = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    spilled = sum(code.startswith(("LDL", "STL")) for code in codes)
    return {
        "kernel": kernel.name,
        "dtype": kernel.dtype,
        "distribution": kernel.distribution,
        "rounding": kernel.rounding,
        "instructions_per_element": round(len(codes) / (kernel.elements / (32 * kernel.warps)), 2),
        "spill_bytes": resources["STACK"] + resources["LOCAL"] + 4 * spilled,
        "registers": resources["REG"],
        "occupancy": round(occupancy(resources["REG"], kernel.warps), 2),
    }


def budget(row: dict[str, Any]) -> int | None:
    """Most instructions an element that this row may have; None where nothing is set."""
    if row["dtype"] != "bfloat16" or row["rounding"] != "nearest":
        return None
    return BUDGETS.get((row["kernel"], row["distribution"]))


def exceeded(row: dict[str, Any]) -> bool:
    most = budget(row)
    too_many = most is not None and row["instructions_per_element"] > most
    return too_many or (most is not None and row["spill_bytes"] > 0)


def show(rows: list[dict[str, Any]], architecture: int) -> None:
    print(f"Instructions an element, sm_{architecture}, Triton {triton.__version__}\n")
    head = ("kernel", "dtype", "distribution", "rounding", "count", "budget", "regs", "threads")
    line = "{:36}{:10}{:13}{:12}{:>7}{:>8}{:>6}{:>8}{:>8}"
    print(line.format(*head, "spills"))
    for row in rows:
        print(
            line.format(
                row["kernel"],
                row["dtype"],
                row["distribution"] or "",
                row["rounding"] or "",
                f"{row['instructions_per_element']:.1f}",
                budget(row) or "",
                row["registers"],
                f"{row['occupancy']:.0%}",
                row["spill_bytes"],
            )
        )


def main() -> int:
    p = argparse.ArgumentParser(description="Count the instructions of the Triton kernels.")
    p.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    p.add_argument("--check", action="store_true", help="status 1 where a budget is exceeded")
    p.add_argument("--dtype", choices=DTYPES, action="append", help="only this one; may repeat")
    p.add_argument("--arch", type=int, default=90, metavar="N", help="compute capability, 90")
    p.add_argument("--kernel", action="append", metavar="NAME", help="only this one; may repeat")
    args = p.parse_args()
    chosen = table(args.dtype or list(DTYPES))
    rows = [measure(k, args.arch) for k in chosen if not args.kernel or k.name in args.kernel]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows, args.arch)
    return int(args.check and any(exceeded(row) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
