"""What the targets of the Makefile install, and in which environment they run."""

import os
import shutil
import subprocess

import pytest
from doc_blocks import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


def would_run(target, venv, **variables):
    """The commands of a target, which are not run."""
    given = [f"{name}={value}" for name, value in {"VENV": venv, **variables}.items()]
    command = ["make", "--dry-run", "--no-print-directory", *given, target]
    plain = {name: os.environ[name] for name in os.environ if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def installed(target, venv):
    lines = [line for line in would_run(target, venv) if " pip install " in line]
    assert all(" -c constraints.txt " in line for line in lines)
    return [line.split()[-1].strip("'") for line in lines]


def stamp(venv, name):
    venv.mkdir(exist_ok=True)
    (venv / name).touch()


def test_the_demo_installs_what_it_needs_and_the_tests_the_rest(tmp_path):
    venv = tmp_path / "venv"
    assert installed("demo", venv) == [".[experiments]"]
    assert installed("test", venv) == [".[experiments]", ".[dev]"]
    stamp(venv, ".installed-demo")
    assert installed("demo", venv) == []
    assert installed("test", venv) == [".[dev]"]
    stamp(venv, ".installed")
    assert installed("demo", venv) == installed("test", venv) == []


def test_waiting_threads_of_demo_and_tests_leave_the_processors(tmp_path):
    for target in ("demo", "test"):
        assert "OMP_WAIT_POLICY=passive " in would_run(target, tmp_path / "venv")[-1]


def test_vllm_has_an_environment_of_its_own(tmp_path):
    ours, own = tmp_path / "venv", tmp_path / "venv-vllm"
    commands = would_run("vllm", ours, VLLM_VENV=own)
    assert not any(f"{ours}/" in line for line in commands)
    assert sum(f"{own}/bin/python -m pip install " in line for line in commands) == 2
    assert any("uninstall" in line and "torchvision" in line for line in commands)
    assert f"{own}/bin/python -m pytest tests/engines" in commands[-1]
    stamp(own, ".installed")
    assert would_run("vllm", ours, VLLM_VENV=own) == commands[-1:]
