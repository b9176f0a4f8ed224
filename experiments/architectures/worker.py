"""A process that examines class after class, and is replaced when one takes too long."""

from __future__ import annotations

import logging
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from .classes import Case


def _serve(connection: Connection) -> None:
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils.logging import set_verbosity

    from .one import examine

    torch.set_num_threads(1)
    set_verbosity(logging.CRITICAL)
    while (case := connection.recv()) is not None:
        try:
            connection.send(examine(case))
        except Exception as error:
            from .building import first_line

            connection.send({"not_built": first_line(error)})


class Worker:
    """Examines classes in a process of its own, which can be ended.

    Args:
        limit: seconds of one class.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._process: Any = None
        self._connection: Any = None

    def examine(self, case: Case) -> dict[str, Any]:
        """As :func:`.one.examine`; a class that takes too long or ends the process says so."""
        if self._process is None:
            self._start()
        head = {"task": case.task, "model_type": case.model_type}
        try:
            self._connection.send(case)
            if self._connection.poll(self.limit):
                return {**head, **self._connection.recv()}
            reason = f"takes longer than {self.limit:g} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            reason = f"ended the process (exit code {self._process.exitcode})"
        self.close()
        return head | {"not_built": reason, "seconds": self.limit}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
