"""The code's own structure: no import circle, one home for private torch API, a readable step."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"zofo_optim": ROOT / "zofo_optim", "zofo_kernels": ROOT / "kernels" / "zofo_kernels"}
UNDOCUMENTED = ("torch.autograd.graph.increment_version",)


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


def circle(graph):
    """The names of one circle in ``graph``, a name -> names mapping; or nothing."""
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        found = []
        if name not in done:
            for other in sorted(graph[name]):
                found = found or visit(other, [*path, name])
            done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in graph)), [])


def test_no_import_circle():
    graph = {name: imports(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 100  # it reads something
    assert circle(graph) == []


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_kernels_know_nothing_of_the_optimizer():
    for name in MODULES:
        if name.startswith("zofo_kernels"):
            assert not any(other.startswith("zofo_optim") for other in imports(name)), name


def private(text):
    """Whether a dotted name of torch's has a private part."""
    return text.startswith("torch.") and any(
        part.startswith("_") and not part.startswith("__") for part in text.split(".")
    )


def torch_names(tree):
    """All that is taken from torch: imports, and attributes of what was imported."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in known:
                yield f"{known[first]}.{rest}"


def taken_privately(code):
    names = set(torch_names(ast.parse(code)))
    return sorted(n for n in names if private(n) or n.startswith(UNDOCUMENTED))


@pytest.mark.parametrize("name", [n for n in MODULES if not n.endswith("_torch_compat")])
def test_private_torch_api_has_one_home(name):
    assert taken_privately(MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._C.f()",
        "import torch._dynamo",
        "import torch._dynamo as dynamo",
        "from torch import _C",
        "from torch.utils import _python_dispatch as d",
        "from torch.utils._python_dispatch import x",
        "def f():\n from torch import nn\n nn.Module._call_impl",
        "from torch.autograd import graph\ngraph.increment_version(x)",
    ],
)
def test_what_counts_as_private(code):
    assert taken_privately(code)


def test_what_does_not():
    assert (
        taken_privately("import torch\ntorch.nn.Linear.__init__\nself._x\nfrom ._y import z") == []
    )


def test_that_home_is_seen_by_the_test_above():
    assert taken_privately(MODULES["zofo_kernels._torch_compat"].read_text())


def others_privately(code):
    """Private attributes of anything but ``self`` and ``cls``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            attribute, owner = node.attr, ast.unparse(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            named = node.args[1]
            attribute = named.value if isinstance(named, ast.Constant) else ""
            owner = ast.unparse(node.args[0])
        else:
            continue
        if attribute in ("_replace", "_asdict", "_fields"):  # what named tuples offer
            continue
        if attribute.startswith("_") and not attribute.startswith("__"):
            if owner not in ("self", "cls"):
                yield f"{owner}.{attribute}"


LISTENERS = ("zofo_optim.journal", "zofo_optim.monitor", "zofo_optim.listeners")


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(LISTENERS)])
def test_listeners_read_nothing_private(name):
    assert list(others_privately(MODULES[name].read_text())) == []


def test_what_would_be_private():
    code = "self._optimizer._x\nself._y\ngetattr(o, '_z')\nself._optimizer.ok"
    assert sorted(others_privately(code)) == ["o._z", "self._optimizer._x"]


def test_the_step_can_be_read_down_one_page():
    text = (PACKAGES["zofo_optim"] / "optimizer.py").read_text()
    _, step = text.split("# ---- a step: read from here down")
    assert len(step.splitlines()) <= 135  # what comes before says what each option means
    assert len(text.splitlines()) <= 300
    tree = ast.parse(text)
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    methods = [node.name for node in cls.body if isinstance(node, ast.FunctionDef)]
    wanted = ["step", "backward", "_add_estimate", "_apply"]
    assert [name for name in methods if name in wanted] == wanted  # callers before what they call


def test_importing_takes_nothing_along():
    code = (
        "import sys, zofo_optim; "
        "print([m for m in ('transformers', 'peft', 'numba', 'triton', 'safetensors', 'accelerate')"
        " if m in sys.modules])"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
