"""Where Triton's interpreter is asked for, and where it is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arranged import GAUSSIAN, HERE

from zofo_kernels import perturb_

pytestmark = pytest.mark.usefixtures("interpreted")


ROOT = Path(__file__).parents[2]
COMPILED = """
import os, torch
from zofo_kernels import Direction, perturb_

def refused():
    w = torch.ones(3)
    try:
        perturb_([w], Direction(0, 0), 1.0, backend="triton")
    except RuntimeError as error:
        assert w.eq(1).all()
        return error

print(refused())
os.environ["TRITON_INTERPRET"] = "1"
print(refused())
"""
SEVERAL = """
import torch
from zofo_kernels import Direction, Shift, perturb_, update_

def moved():
    along = [Direction(1, step, 0, kind) for step, kind in enumerate(("gaussian", "rademacher"))]
    tensors = [torch.linspace(-1, 1, 203).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    for _ in range(2):
        for direction in along:
            perturb_(tensors, direction, 0.25, backend="triton")
            recover = Shift(direction, 0.25)
            update_(tensors, along, torch.ones(2), 0.1, recover=recover, backend="triton")
    return [w.double().tolist() for w in tensors]
"""
INTERPRETED = f"""{SEVERAL}
print(moved())
from zofo_kernels import noise
w = torch.ones(11)
perturb_([w], Direction(1, 2, 0, "rademacher"), 0.25, backend="triton")
expected = 1 + 0.25 * noise((11,), Direction(1, 2, 0, "rademacher"), backend="reference")
print(torch.equal(w, expected))
"""


def python(code, **variables):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": path} | variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_gpu_and_without_the_interpreter(monkeypatch):
    w = torch.ones(3)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="'triton' is not available: torch sees no CUDA device"):
        perturb_([w], GAUSSIAN, 1.0, **HERE)
    assert w.eq(1).all()


def test_the_interpreter_must_be_asked_for_before_triton_is_imported():
    unset, late = python(COMPILED)
    assert unset == "backend='triton' is not available: torch sees no CUDA device"
    assert late.startswith("backend='triton' is not available: TRITON_INTERPRET must be set before")


def test_the_interpreter_as_users_ask_for_it():
    """And the same bits as here, where it repeats itself less."""
    here = {}
    exec(SEVERAL, here)
    assert python(INTERPRETED, TRITON_INTERPRET="1") == [str(here["moved"]()), "True"]
