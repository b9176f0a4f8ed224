"""The code of README.md, of docs/ and of docstrings runs as it stands there.

A page is run from top to bottom, as it is read; docs/recipes.md by section, in test_recipes.py.
What code takes for granted is in doc_names.py: a ``model`` with an adapter, a ``loader``, and the
hub's ``facebook/opt-125m``, tiny. Shell commands are run where they start as in ``doc_run.RUN``.
"""

import pytest
from doc_blocks import ROOT, docstring_examples, modules_with_examples, pages, sections
from doc_names import IN_DOCSTRINGS, make_folders
from doc_run import fresh_names, run_python, run_section

pytest.importorskip("transformers")
pytest.importorskip("peft")

from doc_setup import hub, hub_cache, quiet  # noqa: F401  fixtures

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("hub", "quiet")]

LANGUAGES = {"python", "sh", "text"}


def has_code(path):
    return any(b.language == "python" for section in sections(path) for b in section.blocks)


ELSEWHERE = {"recipes.md", "engines.md", "distributed.md"}  # run by tests of their own
NEEDS = {
    "partition.md": [
        ("transformers", "5", "transformers 4 reads values of OPT's mask, on meta too")
    ],
    "side-updates.md": [("torchao", None, "its weights are torchao's")],
}
"""Packages that a page's code needs beside those of all pages: name, version, why."""
CODE = [path for path in pages() if path.name not in ELSEWHERE and has_code(path)]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(path):
    for package, version, reason in NEEDS.get(path.name, ()):
        pytest.importorskip(package, version, reason=reason)
    names = fresh_names()
    for section in sections(path):
        run_section(section, names)


def test_every_page_with_code_is_found():
    assert {path.name for path in CODE} >= {"README.md", "getting-started.md", "saving.md"}


def test_no_block_escapes():
    """Every fenced block says what it is; code in another language would not be run."""
    for path in pages():
        for section in sections(path):
            for block in section.blocks:
                assert block.language in LANGUAGES, f"{section.file}:{block.line}"


def test_loops_clear_gradients():
    """Or a reader who copies one trains on sums of them; zeroth order alone has none."""
    modules = [pytest.importorskip(name) for name in modules_with_examples()]
    shown = [(name, code) for m in modules for name, code, _ in docstring_examples(m)]
    shown += [
        (section.name, block.code)
        for path in pages()
        for section in sections(path)
        for block in section.blocks
    ]
    steps = ("for ", "optimizer.step(lambda")
    loops = [(name, code) for name, code in shown if all(part in code for part in steps)]
    assert len(loops) > 5
    for name, code in loops:
        assert "zero_grad()" in code or 'mode="zo"' in code, name


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples(name):
    """They see the names of their module, as in doctest, those of the pages, and a fine-tune."""
    make_folders()
    module = pytest.importorskip(name)
    found = list(docstring_examples(module))
    assert found
    for place, code, line in found:
        file = f"{module.__file__}: {place}"
        run_python(code, file, line, fresh_names(vars(module)), IN_DOCSTRINGS)
