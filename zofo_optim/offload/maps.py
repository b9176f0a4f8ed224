"""Where offloaded weights are: in a private file that is mapped into memory, or on the host.

A map is shared with its file: pages that were written can go back to it, so what is resident is
the kernel's choice, and ours. Dropping a page never loses what was written to it.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes; where tensors begin."""
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
"""File systems whose files are memory."""


class Memory(mmap.mmap):
    """Bytes that tensors are made of; they are gone when the last tensor is."""

    address: int
    """Of the first byte."""

    def tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The bytes from ``start`` on, as a tensor that is not empty."""
        count = math.prod(shape)
        return torch.frombuffer(self, dtype=dtype, count=count, offset=start).view(tuple(shape))

    def _register(self) -> None:
        self.address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        _memories.add(self)


class HostMemory(Memory):
    """Memory of this process, pinned for a GPU."""

    @classmethod
    def of(cls, nbytes: int, device: torch.device) -> HostMemory:
        """Of ``nbytes`` > 0 zeros, from which copies to ``device`` need not wait.

        torch's own pinned memory would be a power of two of bytes for each tensor.
        """
        made = cls(-1, nbytes)  # shared: processes that are forked get no copies of pinned pages
        made._register()
        if device.type == "cuda":
            with torch.cuda.device(device):
                made._pin()
        return made

    def _pin(self) -> None:
        library = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        try:
            torch.cuda.check_error(library.cudaHostRegister(self.address, len(self), 0))
        except RuntimeError as error:
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # else the next kernel finds this error
            warnings.warn(
                f"{len(self) / 1e9:.2f} GB of host memory could not be pinned, so copies to the "
                f"GPU do not overlap with computation: {error}",
                stacklevel=5,
            )
            return
        weakref.finalize(self, library.cudaHostUnregister, self.address)


class Map(Memory):
    """A file that nobody else can open, mapped; it is gone when the last tensor of it is."""

    def drop(self, start: int, nbytes: int) -> None:
        """Pages are no longer resident; the file and the kernel's cache of it have them."""
        with suppress(OSError):  # advice: a kernel that does not take it keeps more in memory
            self.madvise(mmap.MADV_DONTNEED, start, nbytes)

    def prefetch(self, start: int, nbytes: int) -> None:
        """Begin to read from the disk what is not in the kernel's cache; returns at once."""
        with suppress(OSError):
            self.madvise(mmap.MADV_WILLNEED, start, nbytes)


_memories: WeakSet[Memory] = WeakSet()


def new_map(folder: str | os.PathLike[str] | None, nbytes: int) -> Map:
    """A map of ``nbytes`` > 0 zeros, whose file has no name.

    Args:
        folder: on the disk that has the file; None: that of temporary files.
        nbytes: all of them are reserved on the disk.

    Raises:
        ValueError: the folder is in memory.
        OSError: it is missing, or its disk has no room.
        RuntimeError: the system cannot drop pages of a map.
    """
    if not (hasattr(mmap.mmap, "madvise") and hasattr(os, "posix_fallocate")):
        raise RuntimeError("offloading needs Linux, whose maps drop pages when told to")
    where = Path(tempfile.gettempdir() if folder is None else folder).resolve()
    if not where.is_dir():
        raise FileNotFoundError(f"folder must be one that is there, got {str(where)!r}")
    kind = _file_system(where)
    if kind in _IN_MEMORY:
        raise ValueError(
            f"folder must be on a disk, got {str(where)!r}, which is a {kind}: its files are memory"
        )
    with tempfile.TemporaryFile(dir=where) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"folder must have room for {nbytes / 1e9:.2f} GB of weights, {str(where)!r} has "
                "not: give another folder",
            ) from error
        made = Map(file.fileno(), nbytes)
    made._register()
    return made


def _file_system(folder: Path) -> str:
    """As the kernel names it; "" where it does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = ""
    longest = -1
    for _, point, kind, *_ in (line.split(" ") for line in lines):
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        if folder.is_relative_to(mounted) and len(mounted.parts) >= longest:
            found, longest = kind, len(mounted.parts)
    return found


class Plan:
    """Places for tensors in a file, one after the other."""

    def __init__(self) -> None:
        self.nbytes = 0

    def place(self, nbytes: int) -> int:
        """Where the next tensor begins."""
        start = self.nbytes
        self.nbytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return start


class Pages(NamedTuple):
    """The whole pages around a run of a map's bytes."""

    map: Map
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def drop(self) -> None:
        """See :meth:`Map.drop`."""
        self.map.drop(self.start, self.nbytes)

    def prefetch(self) -> None:
        """See :meth:`Map.prefetch`."""
        self.map.prefetch(self.start, self.nbytes)


def memory_of(tensor: Tensor) -> tuple[Memory, int] | None:
    """What a tensor is offloaded to, and the byte it starts at; None where it is elsewhere."""
    if not _memories or tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # it wraps others, and has no memory of its own
        return None
    for one in list(_memories):
        if 0 <= address - one.address < len(one):
            return one, address - one.address
    return None


def pages_of(tensor: Tensor) -> Pages | None:
    """Those of a contiguous tensor in a map; None where it is elsewhere."""
    one, start = memory_of(tensor) or (None, 0)
    if not isinstance(one, Map):
        return None
    low = start // mmap.PAGESIZE * mmap.PAGESIZE
    high = -(-(start + tensor.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    return Pages(one, low, min(high, len(one)))


def merged(some: Iterable[Pages]) -> list[Pages]:
    """The same pages in as few runs as there can be."""
    found: list[Pages] = []
    for pages in sorted(some, key=lambda p: (p.map.address, p.start)):
        last = found[-1] if found else None
        if last is not None and last.map is pages.map and pages.start <= last.stop:
            found[-1] = last._replace(stop=max(last.stop, pages.stop))
        else:
            found.append(pages)
    return found
