"""Reading a journal: its header, its sound records, and what is wrong with the rest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .format import Chain, Part, Record, decode_header, decode_records


@dataclass(frozen=True)
class Recording:
    """A journal's content up to the first record that is incomplete or damaged."""

    path: Path
    header: dict[str, Any]
    first: int
    """Offset of the first record."""
    crc: int
    """Checksum of the header."""
    records: list[Record]
    size: int
    """The file's size in bytes."""

    @property
    def end(self) -> int:
        """Offset of what follows the last sound record."""
        return self.records[-1].end if self.records else self.first

    @property
    def steps(self) -> list[tuple[Part, ...]]:
        """The parts of every step record, in order."""
        return [record.parts for record in self.records if record.event is None]

    @property
    def start(self) -> int:
        """The step at which the journal begins: number of updates before it."""
        return int(self.header["groups"][0]["step"])

    @property
    def stop(self) -> int:
        """The step at which its last sound record ends."""
        steps = self.steps
        return steps[-1][0].next_step if steps else self.start

    @property
    def closed(self) -> bool:
        """Whether it was closed, and nothing is missing after that."""
        event = self.records[-1].event if self.records else None
        return bool(event and event.get("closed")) and self.end == self.size

    @property
    def fault(self) -> str | None:
        """Why the journal may lack steps at its end; None where it was closed."""
        if self.closed:
            return None
        if self.end < self.size:
            return (
                f"{self.path} is incomplete or damaged after step {self.stop} (byte {self.end} "
                f"of {self.size})"
            )
        return (
            f"{self.path} was not closed and ends at step {self.stop}; later steps may be missing"
        )

    def marginal_size(self) -> float | None:
        """Mean size in bytes of the steps' records; None where there are fewer than two.

        Without the fixed parts: the header, the first step, which says all that later ones leave
        out, and events such as stamps.
        """
        starts = [self.first, *(record.end for record in self.records)]
        sizes = [
            record.end - start
            for start, record in zip(starts, self.records, strict=False)
            if record.parts and record.parts[0].coefficients
        ]
        return sum(sizes[1:]) / (len(sizes) - 1) if len(sizes) > 1 else None

    def names(self) -> list[str]:
        """All parameters, group by group."""
        return [name for group in self.header["groups"] for name in group["names"]]

    def kinds(self) -> list[tuple[str, torch.Size, torch.dtype]]:
        """(name, shape, dtype) of all parameters."""
        return [
            (name, torch.Size(shape), getattr(torch, dtype))
            for group in self.header["groups"]
            for name, shape, dtype in zip(
                group["names"], group["shapes"], group["dtypes"], strict=True
            )
        ]

    def fingerprints(self, count: int) -> dict[str, str] | None:
        """Of all parameters after ``count`` step records; None where the journal has none."""
        groups = self.header["groups"]
        known = self._stamps().get(count)
        if count == 0:
            known = [group["fingerprints"] for group in groups]
        if known is None:
            return None
        return {
            name: mark
            for group, marks in zip(groups, known, strict=True)
            for name, mark in zip(group["names"], marks, strict=True)
        }

    def _stamps(self) -> dict[int, list[list[str]]]:
        found: dict[int, list[list[str]]] = {}
        count = 0
        for record in self.records:
            if record.event is None:
                count += 1
            elif "fingerprints" in record.event:
                found[count] = record.event["fingerprints"]
        return found

    def backends(self) -> set[str]:
        """The kernels that made the weights."""
        found = set(self.header["backends"])
        for record in self.records:
            if record.event is not None:
                found.update(record.event.get("backends", ()))
        return found


def read(path: str | os.PathLike[str]) -> Recording:
    """Read a journal.

    Raises:
        OSError: the file cannot be read.
        JournalError: it is no journal, or its header is damaged. Later damage is no error here:
            see :attr:`Recording.fault`.
    """
    path = Path(path)
    data = path.read_bytes()
    header, first, crc = decode_header(data, path)
    records = list(decode_records(data, first, Chain(header, crc)))
    return Recording(path, header, first, crc, records, len(data))
