"""Scripts, each in a process of its own that has imported the slow packages already.

One process imports them once, and forks for each script: most of the time of a short script is
that of its imports. What a script imports itself, it still asks for.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

LONGEST = 300
"""Seconds of a script, before it is killed."""
OURS = ("zofo_optim", "zofo_kernels.cpu", "torch._dynamo", "numba.np.arraymath")
"""What each step of ours comes to import, sooner or later."""


@contextlib.contextmanager
def scripts_after(*modules):
    """A function that runs a script as ``subprocess.run`` would: (script, *arguments, cwd, env).

    The modules are imported where they are there. Where there is no fork, it starts Python anew.
    """
    if not hasattr(os, "fork"):
        yield started
        return
    command = [sys.executable, __file__, *OURS, *modules]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as server:

        def run(script, *arguments, cwd, env=os.environ):
            argv = [str(word) for word in (script, *arguments)]
            with tempfile.TemporaryDirectory() as folder:
                out, err = Path(folder, "out"), Path(folder, "err")
                request = dict(argv=argv, cwd=str(cwd), env=dict(env), out=str(out), err=str(err))
                server.stdin.write(json.dumps(request) + "\n")
                server.stdin.flush()
                code = json.loads(server.stdout.readline())
                return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())

        yield run


def started(script, *arguments, cwd, env=os.environ):
    """Run a script by a new Python."""
    argv = [str(word) for word in (script, *arguments)]
    command = [sys.executable, *argv]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=LONGEST
    )


def imported(modules):
    """Import those that are there."""
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def _serve(modules):
    imported(modules)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            replies.close()
            return _run(**request)
        replies.write(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) + "\n")
        replies.flush()


def _run(argv, cwd, env, out, err):
    signal.alarm(LONGEST)
    flags = os.O_WRONLY | os.O_CREAT
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, flags if number else os.O_RDONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as of this environment
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1:])
