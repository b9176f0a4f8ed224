"""Shell commands of the pages: those that are not run there name things that exist.

The journal's command line is run by test_pages.py. The others are run by their own tests, or by
hand:

- ``make``: its targets take minutes, install packages, or need a GPU;
- ``pip install``: it would change the environment of the tests;
- ``examples``, ``experiments`` and ``benchmarks`` have tests of their own;
- ``torchrun`` is run by test_distributed_page.py.

So these are checked: the target, the extra, the program and its options exist.
"""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest
from doc_blocks import ROOT, commands, prose, sections
from doc_run import RUN

FILES = [path for path in prose() if "results" not in path.parts]
COMMANDS = sorted(
    {
        command
        for path in FILES
        for section in sections(path)
        for block in section.blocks
        if block.language in ("sh", "")  # the latter beside examples and experiments
        for command in commands(block.code)
        if not command.startswith(RUN)
    }
)


def extras():
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", table, re.M))


def check_make(*arguments):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    asked = {argument for argument in arguments if "=" not in argument}
    assert asked
    assert asked <= targets


def check_pip(action, *arguments):
    assert action == "install"
    (what,) = [argument for argument in arguments if not argument.startswith("-")]
    place, _, chosen = what.rstrip("]").partition("[")
    assert place in (".", "zofo-optim", "dist/*.whl", "pre-commit")
    assert set(filter(None, chosen.split(","))) <= extras()


@functools.cache
def printed_help(program):
    """What the program prints for ``--help``."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        mock.patch.object(sys, "argv", [*program, "--help"]),
        contextlib.suppress(SystemExit),
    ):
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    assert "--help" in printed.getvalue()
    return printed.getvalue()


def check_python(*arguments):
    program = arguments[:2] if arguments[0] == "-m" else arguments[:1]
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        assert (ROOT / arguments[0]).is_file()
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    if options:
        assert options <= set(re.findall(r"--[\w-]+", printed_help(program)))


def check_pre_commit(*arguments):
    assert arguments == ("install",)
    assert (ROOT / ".pre-commit-config.yaml").is_file()


def check_torchrun(*arguments):
    """Its options take values; then comes a script, and nothing after it."""
    *options, script = arguments
    assert script == OWN or (ROOT / script).is_file()
    assert set(options[::2]) <= {"--nproc-per-node", "--max-restarts"}
    assert all(value.isdigit() for value in options[1::2])


def check_accelerate(action, *arguments):
    option, number, script = arguments
    assert (action, option, script) == ("launch", "--num_processes", OWN)
    assert number.isdigit()


OWN = "my_training.py"
"""A script of the reader's."""
CHECKS = {
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "pre-commit": check_pre_commit,
}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    program, *arguments = shlex.split(command)
    if "=" in program:  # a variable of the environment
        program, *arguments = arguments
    assert program in CHECKS, "a command of another kind needs a check of its own"
    CHECKS[program](*arguments)


def test_the_first_commands_are_there():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert any(command.startswith("pip install -e") for command in COMMANDS)


def test_options_are_read_from_the_help():
    test_command("python benchmarks/distributed.py --quick --ranks 2")


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        'pip install -e ".[no-such-extra]"',
        "python examples/no_such_file.py",
        "python benchmarks/distributed.py --no-such-option",
        "rm -r somewhere",
        "torchrun --nproc-per-node 2 examples/no_such_file.py",
        "torchrun --no-such-option 2 examples/ddp.py",
    ],
)
def test_wrong_commands_are_found(command):
    with pytest.raises(AssertionError):
        test_command(command)
