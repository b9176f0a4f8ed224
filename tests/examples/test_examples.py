"""Every example runs as a person runs it, keeps its promise, is short, and stands alone."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import needs_cpu_sharding
from forked import scripts_after, started

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
LINES = 80

NEEDS = ("transformers", "peft", "accelerate", "datasets", "lightning", "trl", "sklearn", "vllm")
"""Packages without which an example cannot run."""
NEEDS_ALSO = {"quantized.py": {"bitsandbytes"}}
"""Those that no import shows."""

PROMISES = {
    "ddp.py": ["the same weights in all: True"],
    "accuracy_objective.py": [r"F1 (?P<low>\S+) -> (?P<high>\S+)"],
    "generated_text.py": [r"score (?P<low>\S+) -> (?P<high>\S+)"],
    "score_trainer.py": [r"score (?P<low>\S+) -> (?P<high>\S+);"],
    "population_on_vllm.py": [r"score (?P<low>\S+) -> (?P<high>\S+)"],
    "journal_replay.py": ["weights of the base model remade to the bit: True"],
    "save_merge_generate.py": [r"trained: '(.*)'\nmerged:  '\1'\n", "the same text: True"],
    "fsdp2.py": ["the first holds 30,880 of 30,880 weights"],
    "suggested_rates.py": [r"loss (?P<high>\S+) -> (?P<low>\S+)"],
    "transfer.py": [
        r"the whole model: accuracy (?P<low>\S+),(?s:.*)with the adapter.*accuracy (?P<high>\S+),",
        r"with the adapter.*loss (?P<high>\S+)\nrefined .*loss (?P<low>\S+)",
    ],
    "quantized.py": ["the same after loading: True"],
    "own_csv.py": ["'The parcel never arrived.' is about 'delivery'"],
}
"""What is printed beside the loss, if not instead of it."""
FEWER = {"transfer.py": ["--passes", "2"]}
"""Arguments of those that learn for longer than a test needs."""
LOSS = r"loss (?P<first>\d+\.\d+) -> (?P<last>\d+\.\d+)"
WITHOUT_LOSS = {
    "accuracy_objective.py",
    "generated_text.py",
    "population_on_vllm.py",
    "score_trainer.py",
    "suggested_rates.py",
    "transfer.py",
}


def test_the_examples_are_there():
    assert len(SCRIPTS) >= 10
    assert set(PROMISES) <= set(SCRIPTS)


PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "HF_HUB_OFFLINE": "1"}
IMPORTED = ("transformers.models.auto", "transformers.models.llama", "transformers.trainer", "peft")
"""What most of them spend their time on."""
ALONE = {"plain_loop.py", "population_on_vllm.py"}
"""Run by a Python that has imported nothing, as a person runs it."""


@pytest.fixture(scope="module")
def run():
    with scripts_after(*IMPORTED) as run:
        yield run


@pytest.mark.parametrize(
    "name",
    [pytest.param(s, marks=needs_cpu_sharding) if s == "fsdp2.py" else s for s in SCRIPTS],
)
def test_runs(name, tmp_path, run):
    tree = ast.parse((FOLDER / name).read_text(encoding="utf-8"))
    for package in sorted((imported(tree) & set(NEEDS)) | NEEDS_ALSO.get(name, set())):
        pytest.importorskip(package, reason=f"{name} needs it")
    run = started if name in ALONE else run
    fewer = FEWER.get(name, [])
    done = run(FOLDER / name, *fewer, env={**ENVIRONMENT, "TMPDIR": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    if name not in WITHOUT_LOSS:
        told = re.search(LOSS, done.stdout)
        assert told, done.stdout
        assert float(told["last"]) < 0.8 * float(told["first"])
    for promise in PROMISES.get(name, []):
        told = re.search(promise, done.stdout)
        assert told, done.stdout
        if "low" in told.groupdict():
            assert float(told["low"]) < float(told["high"])
    assert not list(tmp_path.glob("*.zofo"))


def is_installed(package):
    """Beside pytest, that is; Python 3.10 does not know who published some packages."""
    spec = importlib.util.find_spec(package)
    folder = Path(pytest.__file__).parents[1]
    return spec is not None and spec.origin is not None and folder in Path(spec.origin).parents


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_short_and_stands_alone(name):
    """No module of the repository, nothing private, no file that would hide a package."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    tree = ast.parse(text)
    assert f"python examples/{name}" in (ast.get_docstring(tree) or "")
    published = importlib.metadata.packages_distributions()
    for package in imported(tree) - {"zofo_optim"}:
        by = set(published.get(package, ())) - {"zofo-optim"}
        known = package in {*sys.stdlib_module_names, *NEEDS} or by or is_installed(package)
        assert known, f"{package} is no public package"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not [part for part in parts if part.startswith("_")]
    stem = name.removesuffix(".py")
    assert stem not in published
    assert stem not in sys.stdlib_module_names


def imported(tree):
    """Top-level names of what a script imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_readme_lists_them_all():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \|", table, re.MULTILINE) == sorted(
        SCRIPTS, key=table.index
    )
    assert all(f"[`{name}`]({name})" in table for name in SCRIPTS)
