"""Under a hard limit of memory that is less than its weights, a model trains as without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file
from zofo_bench.memory_limit import KINDS, run_limited, unavailable_reason

from experiments.measure import growth

SCRIPT = Path(__file__).with_name("limited_steps.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    paths = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("limited"))]
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def reads_twice(folder):
    """Whether torch allocates a tensor's bytes twice where safetensors reads it.

    So does torch 2.6: what it lets go at once, unused, malloc keeps as private memory.
    """
    tensor = torch.ones(1 << 16)
    save_file({"weight": tensor}, folder / "weight.safetensors")
    return growth(lambda: load_file(folder / "weight.safetensors")).most >= 2 * tensor.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_less_memory_than_the_weights(kind, request, tmp_path):
    if reason := unavailable_reason(kind):
        pytest.skip(reason)
    if kind == "data" and reads_twice(tmp_path):
        pytest.skip(f"torch {torch.__version__} reads weights by way of as much private memory")
    found = request.getfixturevalue("found")
    in_memory, offloaded = found[kind]["in memory"], found[kind]["offloaded"]
    assert in_memory["result"] is None
    assert in_memory["ended"] == "killed" or "allocate memory" in in_memory["ended"]
    assert offloaded["ended"] == "done"
    assert offloaded["result"] == found["none"]["in memory"]["result"]


def test_what_is_raised_comes_back():
    if reason := unavailable_reason("data"):
        pytest.skip(reason)
    outcome = run_limited(lambda: {}[1])
    assert outcome == (None, "KeyError: 1")
    assert run_limited(lambda: {"one": 1}) == ({"one": 1}, "done")
