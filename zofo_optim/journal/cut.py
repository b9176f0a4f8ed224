"""Where a journal is gone on with: after the update before an optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from .errors import JournalError
from .format import Chain, decode_records
from .match import some
from .reader import Recording


class Cut(NamedTuple):
    """A place in a journal."""

    recording: Recording
    chain: Chain
    """As of the records before."""
    end: int
    """Their size in bytes, with the header."""
    step: int
    """The optimizer's."""
    known: dict[str, str] | None
    """Fingerprints of the weights there; None where it has none."""

    def check_weights(self, marks: Sequence[Sequence[str]]) -> None:
        """The weights are those of the journal there, where it knows them.

        Args:
            marks: fingerprints of each group's; empty where they are not to be compared.

        Raises:
            JournalError: names those that differ.
        """
        ours = [mark for of_group in marks for mark in of_group]
        known = self.known or {}
        wrong = [name for name, own in zip(known, ours, strict=False) if known[name] != own]
        if wrong:
            raise JournalError(
                "the optimizer's weights are not those of its step in "
                f"{self.recording.path}: {some(wrong)} differ; load the model of that step, or "
                "replay the journal, before attaching"
            )


def cut_before(recording: Recording, steps: Sequence[int]) -> Cut:
    """The place before the steps of an optimizer's groups.

    Raises:
        JournalError: the journal does not reach it, or begins after it.
    """
    kept = _kept(recording, steps)
    chain = Chain(recording.header, recording.crc)
    data = recording.path.read_bytes()
    end = recording.first
    for record in islice(decode_records(data, recording.first, chain), kept):
        end = record.end
    for part, at in zip(chain.last, steps, strict=True):
        if part.next_step != at:
            raise JournalError(
                f"{recording.path} must reach the optimizer's step {at} to be resumed, got steps "
                f"{recording.start} to {part.next_step} "
                f"({recording.fault or 'it was closed there'}); load a state dict of one of "
                "these steps, or begin a new journal"
            )
    updates = sum(record.event is None for record in recording.records[:kept])
    return Cut(recording, chain, end, steps[0], recording.fingerprints(updates))


def _kept(recording: Recording, steps: Sequence[int]) -> int:
    """Number of records before."""
    for position, record in enumerate(recording.records):
        if any(part.step >= at for part, at in zip(record.parts, steps, strict=False)):
            return position
    return len(recording.records)
