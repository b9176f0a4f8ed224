"""Hold back signals while weights are being written."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's core: a scan costs 2 us in place of 80
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Those of a fault in the program cannot wait: it would only meet the fault again.
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT")
_SIGNALS = sorted(
    int(number)
    for number in signal.valid_signals()
    if number not in {getattr(signal, name, None) for name in _FAULTS}
)

_held: _Held | None = None
"""What holds signals back now. Python runs handlers in the main thread only, so there is one."""


class _Held:
    """Signals with a handler in Python, which may raise. Their handlers wait until ``release``.

    Both methods may be cut off by a handler that raises, and may be called again.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[..., Any]] = {}
        self._waiting: dict[int, tuple[Callable[..., Any], FrameType | None]] = {}
        self.over = False
        """Nothing is held any more, though an :func:`interruptible` block ends later.

        One that a signal cut off as it ended, in contextlib, ends when it is collected.
        """

    def hold(self) -> None:
        global _held
        if self.over:
            return
        _held = self
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            if number not in self._handlers:
                if not callable(handler):  # the default, ignored, or not set by Python
                    continue
                self._handlers[number] = handler
            _signal.signal(number, self._wait)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._waiting.setdefault(number, (self._handlers[number], frame))

    def release(self) -> None:
        """Set all handlers back, then run those that wait, though some of them may raise."""
        global _held
        try:
            _held = None
            while self._handlers:
                number = next(iter(self._handlers))
                _signal.signal(number, self._handlers[number])
                del self._handlers[number]
            while self._waiting:
                number = next(iter(self._waiting))
                handler, frame = self._waiting.pop(number)
                handler(number, frame)
        finally:
            if self._handlers or self._waiting:
                self.release()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the handlers of all signals, such as Ctrl-C's, to the end of the block; may be nested.

    Python runs signal handlers in the main thread only, so elsewhere this does nothing. A signal
    that came several times in the block is handled once, as by Python itself.
    """
    if _held is not None or not _in_main_thread():
        yield
        return
    held = _Held()
    try:
        held.hold()
        yield
    finally:
        held.over = True
        held.release()


@contextmanager
def interruptible() -> Iterator[None]:
    """Handlers run in this block, though it is inside :func:`uninterrupted`; first those that wait.

    For code of others, which may take long, where an exception does no harm.
    """
    held = _held
    if held is None or not _in_main_thread():
        yield
        return
    try:
        held.release()
        yield
    finally:
        held.hold()
