"""Work in a process that has only so much memory.

Where the kernel lets us, the process is in a control group of its own (cgroups, version 1): all of
its memory counts there, pages of files too, which the kernel takes back when the limit is reached;
where that is not enough, it kills the process. Else ``RLIMIT_DATA`` limits the memory that is
private to the process: weights in a map that is shared with a file do not count, and a request
for more fails.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("cgroup", "data")
_MOUNT = Path("/sys/fs/cgroup/memory")


class Outcome(NamedTuple):
    """What became of the work."""

    result: dict[str, Any] | None
    """What it returned; None where it did not come to an end."""
    ended: str
    """"done", "killed", or what was raised."""


def unavailable_reason(kind: str) -> str | None:
    """Why a limit of this kind cannot be set here; None where it can."""
    if not (sys.platform == "linux" and hasattr(os, "fork")):
        return "only Linux limits memory in the way that is needed"
    if kind == "data":
        return None
    try:
        with _group(1 << 30):
            return None
    except OSError as error:
        return f"no control group of version 1 can be made: {error}"


def run_limited(
    do: Callable[[], Mapping[str, Any]], nbytes: int | None = None, kind: str = "cgroup"
) -> Outcome:
    """Call ``do`` in a forked process that may take ``nbytes`` more than it has at the start.

    Fork where torch runs on one thread: threads of its own do not live on in the child.

    Args:
        do: returns what JSON can hold.
        nbytes: None for no limit.
        kind: "cgroup" or "data".

    Raises:
        OSError: the limit cannot be set, see :func:`unavailable_reason`.
    """
    if nbytes is None:
        return _forked(do, lambda: None)
    if kind == "data":
        return _forked(do, lambda: _limit_data(nbytes))
    with _group(nbytes) as group:
        return _forked(do, lambda: _write(group / "cgroup.procs", os.getpid()))


def _limit_data(nbytes: int) -> None:
    import resource

    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (now,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")]
    resource.setrlimit(resource.RLIMIT_DATA, (now + nbytes, now + nbytes))


@contextmanager
def _group(nbytes: int) -> Iterator[Path]:
    """A control group within this process's own, while the block runs."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    own = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
    if not own:
        raise OSError("the kernel has no groups of version 1 that count memory")
    group = _MOUNT / own[0].lstrip("/") / f"zofo-{os.getpid()}"
    group.mkdir()
    try:
        _write(group / "memory.limit_in_bytes", nbytes)
        swap = group / "memory.memsw.limit_in_bytes"
        if swap.exists():
            _write(swap, nbytes)
        yield group
    finally:
        group.rmdir()


def _write(file: Path, number: int) -> None:
    file.write_text(str(number), encoding="utf-8")


def _forked(do: Callable[[], Mapping[str, Any]], enter: Callable[[], object]) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(do, enter, writing)
    os.close(writing)
    try:
        with os.fdopen(reading, encoding="utf-8") as answer:
            said = answer.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status) == signal.SIGKILL
        return Outcome(None, "killed" if killed else f"signal {os.WTERMSIG(status)}")
    found = json.loads(said)
    return Outcome(found.get("result"), found["ended"])


def _work(do: Callable[[], Mapping[str, Any]], enter: Callable[[], object], writing: int) -> None:
    """In the child, which ends here."""
    try:
        enter()
        found: dict[str, Any] = {"result": dict(do()), "ended": "done"}
    except BaseException as error:
        found = {"ended": f"{type(error).__name__}: {error}".splitlines()[0]}
        traceback.print_exc()
    try:
        with os.fdopen(writing, "w", encoding="utf-8") as answer:
            json.dump(found, answer)
    finally:
        sys.stderr.flush()
        os._exit(0)
