"""The journal's file format, version 1: a header, then one small record a step.

::

    file    = magic, uint32 length, header (JSON, UTF-8), uint32 crc, record...
    record  = uint8 kind, body, uint32 crc

All numbers are little-endian. A crc is the CRC-32 of everything before it in the file (crcs left
out), so that records which are changed, left out, repeated or exchanged are found.

A STEP has a part for each zeroth-order group: a byte that says what is new, then that: each thing
not said is as in the record before, the step one more. Which parameters moved is a bit for each,
the first in the lowest bit of the first byte; at first, all. Then the coefficients. Coefficients
and the learning rate have the precision in which the kernels compute: float64 where the group has
float64 weights, else float32. A part without coefficients has moves (perturbed evaluations that
no update followed) and no update. An EVENT is a JSON object.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import JournalError

FORMAT_VERSION = 1
MAGIC = b"ZOFOJRN1"
STEP, EVENT = 1, 2
_STEP, _PATH, _LR, _DECAY, _SEED, _COUNT, _ACTIVE = (1 << bit for bit in range(7))


@dataclass(frozen=True)
class Part:
    """What one record says of one group: moves, then an update along ``len(coefficients)``
    directions, where there are any."""

    step: int
    seed: int
    path: tuple[tuple[int, float], ...]
    """(sample, scale) of each move; scale 0 restores."""
    coefficients: tuple[float, ...]
    lr: float
    weight_decay: float
    active: tuple[int, ...] | None = None
    """Positions of the parameters that moved, among the group's; None: all."""

    @property
    def next_step(self) -> int:
        return self.step + bool(self.coefficients)


@dataclass(frozen=True)
class Record:
    """A step (``parts``, one a group) or an event."""

    parts: tuple[Part, ...] = ()
    event: dict[str, Any] | None = None
    end: int = 0
    """Offset in the file of the first byte after it."""


class Chain:
    """What a record depends on: the file's checksum so far, and each group's last part."""

    def __init__(self, header: dict[str, Any], crc: int) -> None:
        self.crc = crc
        self.wide = [group["float64"] for group in header["groups"]]
        self.counts = [len(group["names"]) for group in header["groups"]]
        self.last: list[Part] = [
            Part(group["step"], group["seed"], (), (0.0,) * header["num_samples"], 0.0, 0.0)
            for group in header["groups"]
        ]
        # the first step is the group's own, not one more
        self.last = [replace(part, step=part.step - 1) for part in self.last]

    def seal(self, record: bytes) -> bytes:
        """A record with its checksum."""
        self.crc = zlib.crc32(record, self.crc)
        return record + struct.pack("<I", self.crc)

    def step(self, parts: Sequence[Part]) -> bytes:
        body = [self._part(position, part) for position, part in enumerate(parts)]
        return self.seal(bytes([STEP]) + b"".join(body))

    def _part(self, position: int, part: Part) -> bytes:
        last = self.last[position]
        number = struct.Struct("<d" if self.wide[position] else "<f")
        news, body = 0, bytearray()

        def say(bit: int, what: bytes) -> None:
            nonlocal news
            news |= bit
            body.extend(what)

        if part.step != last.next_step:
            say(_STEP, struct.pack("<Q", part.step))
        if part.path != last.path:
            moves = (struct.pack("<Id", *move) for move in part.path)
            say(_PATH, struct.pack("<I", len(part.path)) + b"".join(moves))
        if part.lr != last.lr:
            say(_LR, number.pack(part.lr))
        if part.weight_decay != last.weight_decay:
            say(_DECAY, struct.pack("<d", part.weight_decay))
        if part.seed != last.seed:
            say(_SEED, struct.pack("<Q", part.seed))
        if len(part.coefficients) != len(last.coefficients):
            say(_COUNT, struct.pack("<I", len(part.coefficients)))
        if part.active != last.active:
            say(_ACTIVE, _bits(part.active, self.counts[position]))
        self.last[position] = part
        values = b"".join(number.pack(c) for c in part.coefficients)
        return bytes([news]) + bytes(body) + values

    def event(self, event: dict[str, Any]) -> bytes:
        text = json.dumps(event).encode()
        return self.seal(bytes([EVENT]) + struct.pack("<I", len(text)) + text)


def _bits(active: Sequence[int] | None, count: int) -> bytes:
    chosen = range(count) if active is None else active
    return sum(1 << position for position in chosen).to_bytes((count + 7) // 8, "little")


def _positions(bits: bytes, count: int) -> tuple[int, ...] | None:
    """The inverse of :func:`_bits`; all are None."""
    number = int.from_bytes(bits, "little")
    found = tuple(position for position in range(count) if number >> position & 1)
    return None if len(found) == count else found


def precise(value: float, wide: bool) -> float:
    """The number as the journal keeps it and the kernels use it."""
    with np.errstate(over="ignore"):
        return float(np.float64(value) if wide else np.float32(value))


def encode_header(header: dict[str, Any]) -> tuple[bytes, int]:
    """The file's beginning, and its checksum."""
    text = json.dumps(header).encode()
    content = MAGIC + struct.pack("<I", len(text)) + text
    crc = zlib.crc32(content)
    return content + struct.pack("<I", crc), crc


class _Cursor:
    """Reads on; IndexError where the file ends."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise IndexError
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]


def decode_header(data: bytes, path: object) -> tuple[dict[str, Any], int, int]:
    """Header, offset of the first record, and checksum.

    Raises:
        JournalError: not a journal, of another version, or damaged.
    """
    if data[: len(MAGIC)] != MAGIC:
        version = len(data) >= len(MAGIC) and data[:7] == MAGIC[:7]
        kind = "of another format version" if version else "no journal"
        raise JournalError(f"{path} is {kind}: it must begin with {MAGIC!r}, got {data[:8]!r}")
    cursor = _Cursor(data, len(MAGIC))
    try:
        text = cursor.take(cursor.number("I"))
        crc = zlib.crc32(data[: cursor.at])
        if cursor.number("I") != crc:
            raise JournalError(f"{path} has a damaged header (its checksum differs)")
    except IndexError:
        raise JournalError(f"{path} ends within its header ({len(data)} bytes)") from None
    header: dict[str, Any] = json.loads(text)
    return header, cursor.at, crc


def decode_records(data: bytes, at: int, chain: Chain) -> Iterator[Record]:
    """The records up to the end, or to the first that is incomplete or damaged.

    ``chain`` then stands after the last record given.
    """
    while at < len(data):
        cursor = _Cursor(data, at)
        try:
            kind = cursor.number("B")
            last = list(chain.last)
            record = Record()
            if kind == STEP:
                record = Record(parts=_read_step(cursor, last, chain))
            elif kind == EVENT:
                text = cursor.take(cursor.number("I"))
            else:
                return
            crc = zlib.crc32(data[at : cursor.at], chain.crc)
            if cursor.number("I") != crc:
                return
        except IndexError:
            return
        if kind == EVENT:
            record = Record(event=json.loads(text))
        at, chain.crc, chain.last = cursor.at, crc, last
        yield replace(record, end=at)


def _read_step(cursor: _Cursor, last: list[Part], chain: Chain) -> tuple[Part, ...]:
    for position, (double, parameters) in enumerate(zip(chain.wide, chain.counts, strict=True)):
        news, old = cursor.number("B"), last[position]
        number = "d" if double else "f"
        step = cursor.number("Q") if news & _STEP else old.next_step
        path = old.path
        if news & _PATH:
            count = cursor.number("I")
            moves = struct.iter_unpack("<Id", cursor.take(12 * count))
            path = tuple((sample, scale) for sample, scale in moves)
        lr = cursor.number(number) if news & _LR else old.lr
        decay = cursor.number("d") if news & _DECAY else old.weight_decay
        seed = cursor.number("Q") if news & _SEED else old.seed
        count = cursor.number("I") if news & _COUNT else len(old.coefficients)
        active = old.active
        if news & _ACTIVE:
            active = _positions(cursor.take((parameters + 7) // 8), parameters)
        values = cursor.take(struct.calcsize(f"<{count}{number}"))
        coefficients = struct.unpack(f"<{count}{number}", values)
        last[position] = Part(step, seed, path, coefficients, lr, decay, active)
    return tuple(last)
