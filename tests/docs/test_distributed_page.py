"""The page of several processes runs in several, and its scripts print what it shows."""

import json
import os
import re

import pytest
from conftest import needs_cpu_sharding
from doc_blocks import ROOT, sections
from doc_names import ROWS, make_base, make_model
from doc_run import fresh_names, run_section
from launch import PATH, end, torchrun

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

PAGE = ROOT / "docs" / "distributed.md"
RESTART = "Journal, and a process that dies"


def shown():
    """Commands of the page, and what it says that they print."""
    for section in sections(PAGE):
        for block, after in zip(section.blocks, section.blocks[1:], strict=False):
            if block.language == "sh" and after.language == "text":
                yield block.code.strip(), after.code


def without_fractions(text):
    """Machines round differently."""
    return re.sub(r"\d+\.\d{2,}", "#", text)


SHOWN = [
    pytest.param(*pair, marks=needs_cpu_sharding) if "fsdp2" in pair[0] else pair
    for pair in shown()
]


@pytest.mark.parametrize(("command", "printed"), SHOWN, ids=lambda value: value.split()[-1])
def test_scripts_print_what_is_shown(command, printed, tmp_path):
    program, option, ranks, script = command.split()
    assert (program, option) == ("torchrun", "--nproc-per-node")
    done = torchrun(ROOT / script, ranks, env={"TMPDIR": str(tmp_path)})
    lines = without_fractions(done.stdout).splitlines()
    for line in without_fractions(printed).splitlines():
        assert line in lines, done.stdout
    told = re.search(r"2 processes, loss (\S+) -> (\S+)", done.stdout)
    assert told, done.stdout
    first, last = map(float, told.groups())
    assert last < 0.8 * first
    for held, whole in re.findall(r"the first holds (\S+) of (\S+) weights", done.stdout):
        assert int(whole.replace(",", "")) == 2 * int(held.replace(",", ""))


def test_both_scripts_are_shown():
    assert {command.split()[-1] for command, _ in shown()} == {
        "examples/ddp.py",
        "examples/fsdp2.py",
    }


def test_memory_is_what_was_measured():
    path = ROOT / "benchmarks" / "results" / "cpu" / "fsdp2_memory.json"
    found = json.loads(path.read_text())["ranks"]
    for ranks, sizes in found.items():
        step = max(sizes["steps"].values())
        numbers = [f"{size / 1e6:.1f}" for size in (sizes["shards"], sizes["forward"], step)]
        assert f"| {ranks} | {' | '.join(numbers)} |" in PAGE.read_text()


@needs_cpu_sharding
def test_page_runs_in_two_processes(tmp_path):
    where = os.pathsep.join(map(str, [*PATH, ROOT / "tests" / "docs"]))
    done = torchrun(__file__, 2, tmp_path, env={"PYTHONPATH": where})
    assert done.stdout.count("the page has run") == 2, done.stdout
    assert (tmp_path / "run.zofo").exists()


def main(folder):
    os.chdir(folder)
    made = {"model": make_model(), "sharded_model": make_model(), "base_model": make_base()}
    names = fresh_names({**made, "dataset": ROWS})
    for section in sections(PAGE):
        for _ in range(1 + (section.title == RESTART)):  # it starts again
            if section.title == RESTART:
                names["model"] = make_model()
                names["parallel"] = names["DistributedDataParallel"](names["model"])
            run_section(section, names)
    assert names["state"]["step"] == names["start"] == 2
    assert names["optimizer"].zo_groups()[0].options["zo_step"] == 4
    end()
    print("the page has run")


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
