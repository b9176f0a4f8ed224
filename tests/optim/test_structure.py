"""The code's own structure: no import circle, one home for private torch API, a readable step."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"zofo_optim": ROOT / "zofo_optim", "zofo_kernels": ROOT / "kernels" / "zofo_kernels"}
PRIVATE = ("torch._", "torch.utils._", "torch.cuda._", "torch.autograd.graph.increment_version")


def modules():
    """Dotted name -> file of every module."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


MODULES = modules()


def top_level(tree):
    """Statements that run at import; not the bodies of functions, nor for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from top_level(node)


def imports(name):
    """The modules of ours that ``name`` imports as it is imported itself."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in top_level(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{whole}.{alias.name}"
                found.add(inner if inner in MODULES else whole)
    return {module for module in found if module in MODULES and module != name}


def test_no_import_circle():
    graph = {name: imports(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 100  # it reads something
    done = set()

    def visit(name, path):
        assert name not in path, "circle: " + " -> ".join([*path, name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_kernels_know_nothing_of_the_optimizer():
    for name in MODULES:
        if name.startswith("zofo_kernels"):
            assert not any(other.startswith("zofo_optim") for other in imports(name)), name


def attributes(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", [n for n in MODULES if not n.endswith("_torch_compat")])
def test_private_torch_api_has_one_home(name):
    used = set(attributes(ast.parse(MODULES[name].read_text())))
    assert [text for text in used if text.startswith(PRIVATE)] == []


def test_that_home_is_seen_by_the_test_above():
    used = set(attributes(ast.parse(MODULES["zofo_kernels._torch_compat"].read_text())))
    assert any(text.startswith(PRIVATE) for text in used)


@pytest.mark.parametrize(
    "name", [n for n in MODULES if n.startswith("zofo_optim.journal") or n.endswith("monitor")]
)
def test_listeners_read_nothing_private(name):
    used = attributes(ast.parse(MODULES[name].read_text()))
    assert [text for text in used if "optimizer._" in text] == []


def test_the_step_can_be_read_down_one_page():
    text = (PACKAGES["zofo_optim"] / "optimizer.py").read_text()
    assert len(text.splitlines()) <= 270
    tree = ast.parse(text)
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    methods = [node.name for node in cls.body if isinstance(node, ast.FunctionDef)]
    wanted = ["step", "backward", "_at_rest", "_add_estimate", "_apply"]
    assert [name for name in methods if name in wanted] == wanted  # callers before what they call


def test_importing_takes_nothing_along():
    code = (
        "import sys, zofo_optim; "
        "print([m for m in ('transformers', 'peft', 'numba', 'triton', 'safetensors', 'accelerate')"
        " if m in sys.modules])"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
