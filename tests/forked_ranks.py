"""python -m forked_ranks COUNT SCRIPT: ranks with the environment that torchrun gives them.

Starting them takes what their imports take: so one process makes the script's own, and forks for
each rank. Like torchrun it ends all when one fails. Its store is that of the ranks, so that no two
launches meet on a port. Their hashes and addresses are alike, as those of torchrun's are not: what
would differ by the order of a set does not here.
"""

import ast
import contextlib
import os
import runpy
import signal
import sys
from pathlib import Path

from forked import OURS, imported
from torch.distributed import TCPStore

HOST = "127.0.0.1"


def main(count, script):
    """Exit with 0 when all ranks did."""
    _import_as(script)
    if "zofo_optim" in sys.modules:
        imported([*OURS, "torch.distributed.tensor"])
    ranks, told = {}, []
    for rank in range(count):
        mine, parents = os.pipe()
        ranks[pid := os.fork()] = rank
        if pid == 0:
            os.close(parents)
            return _run(rank, count, os.read(mine, 16).decode(), script)
        os.close(mine)
        told.append(parents)
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # whose thread no fork needs
    for pipe in told:
        os.write(pipe, str(store.port).encode())
        os.close(pipe)
    failed = False
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid, None)  # None: another process, of an import
        if rank is None:
            continue
        if code := os.waitstatus_to_exitcode(status):
            print(f"rank {rank} ended with {code}", flush=True)
            for other in () if failed else ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            failed = True
    sys.exit(failed)


def _import_as(script):
    """What it imports at its top, where that is there."""
    for node in ast.parse(Path(script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            with contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), script, "exec"), {})


def _run(rank, count, port, script):
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(count)
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    sys.argv = [script]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
