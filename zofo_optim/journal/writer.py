"""Journal: writes what each step did to the zeroth-order weights, as it happens."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import caller_level
from ..listeners import Estimated, Listener, Move
from ..moves import Moves
from ..optimizer import HybridZOFO
from ..parallel import processes
from ..plain import plain
from ..update import Update
from ..whole import whole
from .cut import Cut, cut_before
from .errors import JournalError
from .format import Chain, Part, encode_header, precise
from .header import Kinds, check_recordable, check_same, header_of
from .ranks import Ranks
from .reader import Recording, read

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]


class _Waiting(NamedTuple):
    """A step whose numbers are on their way from the device."""

    updates: Sequence[Update]
    paths: list[tuple[tuple[int, float], ...]]
    values: Tensor
    arrived: Any


class Journal(Listener):
    """Writes one small record a step to a file, from which :func:`replay` remakes the weights.

    A record has about 10 bytes: the projected gradients, and what else is new. It goes to the
    file at every step (on a GPU a few steps late, as nothing waits for the device), so it
    outlives the process; every ``fsync_every`` steps it is made to outlive the machine. With
    first-order groups, save these (the adapter) and ``optimizer.state_dict()`` as usual; the
    base model need not be saved. Close it at the end, or use it in a ``with`` block: a journal
    that was not closed may lack steps, and is replayed only with ``partial=True``. Where a
    zeroth-order parameter gets another shape or dtype, the next step or stamp raises JournalError,
    and the journal is over.

    Where several processes train one model, each makes a journal of the same path and attaches it;
    the first one writes the file. Call ``attach``, ``flush``, ``stamp`` and ``close`` in all of
    them, and load state dicts in all: an error with the file is then raised in each. Within
    ``step``, which does not wait for the file, it is raised in the first process alone: let it end
    that process, by which torchrun ends the others. A ``with`` block that ends by an error does not
    close it, as the others may be elsewhere. Fingerprints of sharded weights gather one
    parameter at a time. The file is of full parameters, so replays and resumed runs may have
    another number of processes.

    Args:
        path: the file; it must not exist, unless ``resume=True``.
        resume: go on with the file where there is one. What it has past the optimizer's step,
            from a run that was not saved, is cut off; the file as it was is kept beside as
            ``<path>.bak``.
        fsync_every: steps between calls of ``fsync``; 0 for none but those of ``flush``.
        metadata: what else the header should say, such as ``{"base": "facebook/opt-1.3b"}``;
            must be valid JSON.

    Raises:
        FileExistsError: there is a file and ``resume=False``.
        TypeError, ValueError: an argument that cannot be used.

    Example:
        >>> with Journal("run.zofo").attach(optimizer):
        ...     for batch in loader:
        ...         optimizer.zero_grad()
        ...         optimizer.step(lambda: model(**batch).loss)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        fsync_every: int = 100,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        fsync_every = plain(fsync_every)
        self.path = Path(path).absolute()  # the program may change its folder
        if not isinstance(fsync_every, int) or isinstance(fsync_every, bool) or fsync_every < 0:
            raise ValueError(f"fsync_every must be an int >= 0, got {fsync_every!r}")
        self._resume = resume
        self._fsync_every = fsync_every
        self._metadata = dict(metadata or {})
        if processes() == 1:  # else another one may have begun it by now
            self._refuse_existing()
        encode_header({"metadata": self._metadata})  # raises where it is no JSON
        self._optimizer: HybridZOFO | None = None
        self._ranks: Ranks
        self._file: Any = None
        self._chain: Chain
        self._header: dict[str, Any] = {}
        self._kinds: Kinds
        self._buffer = bytearray()
        self._waiting: deque[_Waiting] = deque()
        self._moves = Moves()  # since the last update or record
        self._told = False  # of moves that no update has followed yet
        self._unsynced = 0

    def _refuse_existing(self) -> None:
        if not self._resume and self.path.exists():
            raise FileExistsError(
                f"path must not exist unless resume=True, got {str(self.path)!r}, which does"
            )

    @property
    def start(self) -> int:
        """The step of the optimizer at which it begins: 0 where that is the first.

        Raises:
            RuntimeError: it is attached to no optimizer yet.
        """
        if not self._header:
            raise RuntimeError("the journal has no start before attach(optimizer)")
        return max(int(group["step"]) for group in self._header["groups"])

    # ---- beginning --------------------------------------------------------------------------

    def attach(self, optimizer: HybridZOFO, model: nn.Module | None = None) -> Journal:
        """Write down every step of ``optimizer`` from now on.

        Reads all zeroth-order weights once, for their fingerprints, where the file is new.
        Loading a state dict into the optimizer later moves the journal to the loaded step.

        Args:
            optimizer: with at least one zeroth-order group; its weights are the journal's
                starting point. To resume, load model and state dict first.
            model: names the parameters, where the groups have no ``param_names``
                (``hybrid_param_groups`` sets them).

        Returns:
            The journal.

        Raises:
            TypeError, ValueError: an optimizer that cannot be recorded.
            RuntimeError: called twice, or while a closure is evaluated.
            FileExistsError: see the class.
            JournalError: the file belongs to other parameters, weights or settings, or lacks
                steps before the optimizer's.
            OSError: the file cannot be written.
        """
        if self._optimizer is not None:
            raise RuntimeError("the journal is attached already; use one journal an optimizer")
        check_recordable(optimizer)
        if any(isinstance(listener, Journal) for listener in optimizer.listeners):
            raise RuntimeError("optimizer has a journal already; close that first")
        header = header_of(optimizer, model, self._metadata)
        ranks = self._ranks = Ranks(optimizer.replicas)
        if ranks.first(lambda: self._resume and self.path.exists()):
            self._go_on(optimizer, header)
        else:
            ranks.first(self._refuse_existing)  # before the weights are read
            marks = self._fingerprints(optimizer)
            self._header = ranks.first(lambda: self._begin(header, marks))
        self._kinds = Kinds(header)
        self._optimizer = optimizer
        return optimizer.add_listener(self)

    def _fingerprints(self, optimizer: HybridZOFO) -> list[list[str]]:
        return self._ranks.fingerprints([group.params for group in optimizer.zo_groups()])

    def _begin(self, header: dict[str, Any], marks: list[list[str]]) -> dict[str, Any]:
        self._refuse_existing()
        for entry, of_group in zip(header["groups"], marks, strict=True):
            entry["fingerprints"] = of_group
        content, crc = encode_header(header)
        # so that no header is ever cut short
        with whole(self.path) as fresh, open(fresh, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._chain = Chain(header, crc)
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._file.seek(0, os.SEEK_END)
        self._lock()
        return header

    def _go_on(self, optimizer: HybridZOFO, header: dict[str, Any]) -> None:
        cut: Cut

        def opened() -> tuple[dict[str, Any], bool]:
            nonlocal cut
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
            self._lock()
            recording = read(self.path)
            check_same(recording, header)
            self._header = recording.header
            cut = self._cut(optimizer, recording)
            return self._header, cut.known is not None and not self._moves  # moved since

        def cut_there(marks: list[list[str]]) -> None:
            cut.check_weights(marks)
            self._cut_at(cut)
            if set(header["backends"]) - cut.recording.backends():
                self._put(self._chain.event({"backends": header["backends"]}))

        try:
            self._header, comparable = self._ranks.first(opened)
            marks = self._fingerprints(optimizer) if comparable else []
            self._ranks.first(lambda: cut_there(marks))
        except BaseException:
            if self._file is not None:
                self._file.close()
            raise

    def _cut(self, optimizer: HybridZOFO, recording: Recording) -> Cut:
        steps = [group.options["zo_step"] for group in optimizer.zo_groups()]
        cut = cut_before(recording, steps)
        self._moves = self._unrecorded(optimizer)
        return cut

    def _cut_at(self, cut: Cut) -> None:
        """Stand there; drop what follows."""
        recording = cut.recording
        if cut.end < recording.size:
            dropped = recording.stop - cut.chain.last[0].next_step
            if dropped or recording.end < recording.size:
                backup = self.path.with_name(self.path.name + ".bak")
                shutil.copyfile(self.path, backup)
                warnings.warn(
                    f"{self.path} is cut at the optimizer's step {cut.step}: {dropped} later "
                    f"steps and what is incomplete are dropped; the file as it was is {backup}",
                    stacklevel=caller_level(),
                )
            self._file.truncate(cut.end)
        self._file.seek(cut.end)
        self._chain, self._told = cut.chain, False

    def _unrecorded(self, optimizer: HybridZOFO) -> Moves:
        """The optimizer's moves since its last update, less those before the journal began."""
        moves, before = list(optimizer.moves), self._header.get("moves", 0)
        steps = [group.options["zo_step"] for group in optimizer.zo_groups()]
        if steps != [group["step"] for group in self._header["groups"]]:
            return Moves(moves)
        if len(moves) < before:
            raise JournalError(
                f"{self.path} begins after {before} moves of step {steps[0]}, got a state dict "
                f"of {len(moves)}; load a later one, or begin a new journal"
            )
        return Moves(moves[before:])

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{self.path} is being written by another journal") from None
        except OSError:  # a file system without locks
            return

    # ---- recording --------------------------------------------------------------------------

    def moved(self, move: Move) -> None:
        self._moves.append(move)

    def estimated(self, estimated: Estimated) -> None:
        self._end_if_changed()  # before the update

    def _end_if_changed(self) -> None:
        """Raise JournalError where a parameter has another shape or dtype: the journal is over."""
        optimizer = self._require_attached()
        change = self._kinds.change(optimizer.zo_groups())
        if change is None:
            return
        ends = ""
        if self._ranks.writes:
            self._store()
            ends = f" and ends at step {self._chain.last[0].next_step}"
        self._detach()
        raise JournalError(
            "zeroth-order parameters must keep their shape and dtype while a journal is attached, "
            f"but {change}. {self.path} is not closed{ends}, which replay(..., partial=True) "
            "reaches; call close() before such a change, and begin another journal after it"
        )

    def adding(self, optimizer: HybridZOFO) -> None:
        if self._optimizer is not optimizer:
            raise RuntimeError("a journal must be added by its attach(optimizer), which begins it")

    def removing(self, optimizer: HybridZOFO) -> None:
        if self._optimizer is optimizer:
            raise RuntimeError("a journal must be removed by its close(), which ends the file")

    def group_adding(self, group: dict[str, Any]) -> None:
        raise RuntimeError(
            "a zeroth-order group cannot be added while a journal is attached; close it, and "
            "begin a new one after"
        )

    def places_changing(self) -> None:
        raise RuntimeError(
            "parameters cannot go from group to group while a journal is attached, whose noise "
            "follows their places; close it, and begin a new one after"
        )

    def updated(self, updates: Sequence[Update]) -> None:
        self._end_if_changed()
        paths = [_path(self._moves, position) for position in range(len(updates))]
        self._moves.clear()
        self._told = False
        if not self._ranks.writes:
            return
        real = [t for u in updates for t in (u.coefficients, u.lr.reshape(1))]
        kind = real[0].device.type
        exact = torch.float32 if kind == "mps" else torch.float64
        values = torch.cat([t.detach().to(exact) for t in real])
        arrived = None
        if kind != "cpu":
            values = values.to("cpu", non_blocking=True)
            module = torch.get_device_module(kind)
            arrived = module.Event()
            if kind == "mps":
                arrived.record()
            else:  # the current device may be another one
                arrived.record(module.current_stream(real[0].device))
        self._waiting.append(_Waiting(updates, paths, values, arrived))
        self._encode(wait=False)
        self._unsynced += 1
        self._write()
        if self._fsync_every and self._unsynced >= self._fsync_every:
            self._sync()

    def _encode(self, wait: bool) -> None:
        """Turn the steps whose numbers have arrived into records."""
        while self._waiting:
            updates, paths, values, arrived = self._waiting[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            self._waiting.popleft()
            numbers = iter(values.tolist())
            parts = []
            for position, (update, path) in enumerate(zip(updates, paths, strict=True)):
                wide = self._chain.wide[position]
                found = [precise(next(numbers), wide) for _ in range(update.coefficients.numel())]
                lr = precise(next(numbers), wide)
                first = update.directions[0]
                step = int(first.step)
                active = self._kinds.active(position, update.active)
                parts.append(
                    Part(step, first.seed, path, tuple(found), lr, update.weight_decay, active)
                )
            self._buffer += self._chain.step(parts)

    def _put(self, record: bytes) -> None:
        self._buffer += record
        self._write()

    def _write(self) -> None:
        while self._buffer:  # what a full disk refuses stays here for the next attempt
            del self._buffer[: self._file.write(self._buffer)]

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def state_loaded(self) -> None:
        """Go to the loaded step."""
        optimizer = self._require_attached()
        self.flush()

        def go() -> None:
            steps = [group.options["zo_step"] for group in optimizer.zo_groups()]
            if not self._told and steps == [part.next_step for part in self._chain.last]:
                self._moves = self._unrecorded(optimizer)
            else:
                self._cut_at(self._cut(optimizer, read(self.path)))

        try:
            self._ranks.first(go)
        except JournalError:
            self._detach()
            raise

    def flush(self) -> None:
        """Write all steps so far, durably. Waits for the device.

        Raises:
            RuntimeError: not attached.
            JournalError: a parameter has another shape or dtype than before.
        """
        self._end_if_changed()
        self._ranks.first(self._store)

    def _store(self) -> None:
        self._encode(wait=True)
        self._write()
        self._sync()

    # ---- ending -----------------------------------------------------------------------------

    def stamp(self) -> None:
        """Write fingerprints of the weights as they are, by which :func:`replay` checks its own.

        Reads all zeroth-order weights once.

        Raises:
            RuntimeError: not attached, or called while a closure is evaluated.
            JournalError: a parameter has another shape or dtype than before.
        """
        self._mark(closed=False)

    def close(self, stamp: bool = True) -> None:
        """End the journal: the last records, fingerprints of the weights, and a closing mark.

        Args:
            stamp: see :meth:`stamp`. Does nothing where the journal is not attached.

        Raises:
            RuntimeError, JournalError: as :meth:`stamp`.
        """
        if self._optimizer is None:
            return
        self._mark(closed=True, stamp=stamp)
        self._detach()

    def _mark(self, closed: bool, stamp: bool = True) -> None:
        optimizer = self._require_attached()
        if optimizer.evaluating:
            raise RuntimeError("a journal must not be stamped or closed inside a closure")
        self._end_if_changed()
        event: dict[str, Any] = {"closed": True} if closed else {}
        if stamp:
            event["fingerprints"] = self._fingerprints(optimizer)

        def write() -> None:
            self._encode(wait=True)
            self._tell_moves(optimizer)
            self._put(self._chain.event(event))
            self._sync()

        self._ranks.first(write)

    def _tell_moves(self, optimizer: HybridZOFO) -> None:
        """Moves that no update followed yet: they may have rounded the weights."""
        if not self._moves:
            return
        groups = optimizer.active_groups()
        paths = [_path(self._moves, position) for position in range(len(groups))]
        parts = [
            Part(
                group.options["zo_step"],
                group.options["seed"],
                path,
                (),
                last.lr,
                last.weight_decay,
                self._kinds.active(position, group.active),
            )
            for position, (group, path, last) in enumerate(
                zip(groups, paths, self._chain.last, strict=True)
            )
        ]
        self._buffer += self._chain.step(parts)
        self._moves.clear()
        self._told = True

    def _detach(self) -> None:
        optimizer, self._optimizer = self._optimizer, None
        if optimizer is not None:
            optimizer.remove_listener(self)
        if self._file is None:  # another process's
            return
        if fcntl is not None:  # closing is not enough where a forked child has the file too
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _require_attached(self) -> HybridZOFO:
        if self._optimizer is None:
            raise RuntimeError("the journal is not attached to an optimizer")
        return self._optimizer

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object = None, *error: object) -> None:
        if kind is not None and self._optimizer is not None and self._ranks.several:
            self._abandon()
            return
        try:
            self.close()
        except JournalError as failed:
            if kind is None:
                raise
            warnings.warn(str(failed), stacklevel=caller_level())  # what came first is raised

    def _abandon(self) -> None:
        """End without a closing mark, and without the other processes, which may not be here."""
        try:
            if self._ranks.writes:
                self._store()
        finally:
            self._detach()


def _path(moves: Iterable[Move], position: int) -> tuple[tuple[int, float], ...]:
    """(sample, scale) of each move of the group at ``position``, since it was added."""
    return tuple((m.sample, m.scales[position]) for m in moves if position < len(m.scales))
