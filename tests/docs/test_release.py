"""What is published: links that work on a package index, workflows, and the citation."""

import fnmatch
import importlib.util
import json
import re
import shutil
import subprocess

import pytest
from doc_blocks import ROOT, prose

import zofo_optim

yaml = pytest.importorskip("yaml")

URL = "https://example.org/owner/name"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load_release():
    spec = importlib.util.spec_from_file_location("release", ROOT / ".github" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = load_release()


@pytest.fixture
def published(tmp_path):
    """README.md and pyproject.toml as they are released."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "zofo_optim").mkdir()  # the package, which may be installed from a wheel
    shutil.copy(zofo_optim.__file__, tmp_path / "zofo_optim" / "__init__.py")
    release.main(f"{URL}/", f"v{zofo_optim.__version__}", tmp_path)
    return tmp_path


def test_the_readme_is_of_one_screen_or_few():
    assert len(README.splitlines()) <= 150


def test_links_of_the_published_readme_are_absolute(published):
    text = (published / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(([^)\s]+)\)", README))
    assert all(link.startswith("https://") for link in links)
    ours = [link for link in links if link.startswith(URL)]
    tag = f"v{zofo_optim.__version__}"
    assert len(ours) >= 10
    for link in ours:
        kind, at, path = link.removeprefix(f"{URL}/").split("/", 2)
        assert (kind, at) == ("blob", tag)
        assert (ROOT / path.split("#")[0]).is_file(), link


def test_images_are_linked_as_files():
    text = release.absolute("![a](b/c.png) [d](e.md#f) [g](#h) [i](https://j.org/k)", URL, "v1")
    assert text == (
        f"![a]({URL}/raw/v1/b/c.png) [d]({URL}/blob/v1/e.md#f) "
        f"[g]({URL}/blob/v1/README.md#h) [i](https://j.org/k)"
    )


def test_the_published_metadata_has_the_repository(published):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    before = tomllib.loads(PYPROJECT)["project"]
    after = tomllib.loads((published / "pyproject.toml").read_text())["project"]
    urls = after.pop("urls")
    assert before.pop("urls").items() <= urls.items()
    assert before == after
    assert urls["Source"] == URL
    for name in ("Documentation", "Changelog"):
        path = urls[name].removeprefix(f"{URL}/blob/v{zofo_optim.__version__}/")
        assert (ROOT / path).is_file()


def test_a_release_is_refused(published):
    with pytest.raises(ValueError, match="must not have a Source yet"):
        release.main(URL, f"v{zofo_optim.__version__}", published)
    with pytest.raises(ValueError, match="the tag must be v"):
        release.main(URL, "v999.0", published)
    with pytest.raises(ValueError, match=r"must have a table \[project.urls\]"):
        release.with_urls("[project]\n", URL, "v1")


@pytest.mark.parametrize("path", prose(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(path):
    """Wherever the repository is read. Anchors are checked by ``make docs``."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.split("#")[0]
        if target and not target.startswith(("https:", "http:")):
            assert (path.parent / target).exists(), link


def test_files_that_are_named_exist():
    folders = "benchmarks|docs|examples|experiments|kernels|tests|zofo_optim"
    for path in prose():
        text = path.read_text(encoding="utf-8")
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows(path):
    """Jobs have a machine and steps, wait for jobs that exist, and call targets that exist."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert job.get("needs", next(iter(workflow["jobs"]))) in workflow["jobs"]
        for step in job["steps"]:
            assert len({"uses", "run"} & set(step)) == 1
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"])
            else:
                assert "${{ github" not in step["run"], "names are given as variables"
                assert set(re.findall(r"^make (\S+)", step["run"], re.M)) <= targets
    linter = shutil.which("actionlint")
    if linter is not None:
        subprocess.run([linter, str(path)], check=True)


def floors():
    """The oldest versions that pyproject.toml accepts where everything is tested."""
    found = {}
    for name, version in re.findall(r'"(torch|transformers|peft)>=([\d.]+)"', PYPROJECT):
        found[name] = max(found.get(name, "0"), version, key=lambda v: [*map(int, v.split("."))])
    return found


def test_the_oldest_versions_tested_are_those_accepted():
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    matrix = matrix["jobs"]["tests"]["strategy"]["matrix"]
    (oldest,) = [entry for entry in matrix["include"] if entry["versions"] == "oldest"]
    tested = dict(re.findall(r"(\w+)==([\d.]+)\.\*", f"{oldest['torch']} {oldest['others']}"))
    assert tested == floors()
    needed = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]
    assert matrix["python"][0] == needed


def test_other_files_for_the_host():
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text()), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[0] for hook in hooks] == ["ruff", "ruff", "mypy"]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == zofo_optim.__version__
    assert citation["license"] == "Apache-2.0"
    assert json.dumps(citation["references"]).count("2604.09940") == 2


def test_tests_of_the_guarantees_exist():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    section = page.split("## What can be relied on")[1].split("\n## ")[0]
    lines = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
    files = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    named = [name for line in lines[1:] for name in re.findall(r"`([\w*]+)`", line[2])]
    assert len(named) > 15
    for name in named:
        assert fnmatch.filter(files, f"test_{name}"), name
