"""Remaking trained weights from their starting point and a journal."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zofo_kernels import NOISE_VERSIONS, Direction, Pass, Program, Shift, Weights, replay_
from zofo_kernels.dispatch import backend_name

from ..checks import caller_level
from ..offload.in_turn import drop
from ..settings import BEFORE, direction_rank
from ..sharding import local_of, pieces_of
from ..zo_groups import Noise
from .errors import JournalError
from .fingerprint import fingerprints
from .format import Part
from .match import by_name, some
from .reader import Recording, read

PIECE_STEPS = 1 << 32
"""Elements times steps between calls of ``progress``: some seconds on a CPU."""
SMALLEST_PIECE = 1 << 20


class Replayed(NamedTuple):
    """What :func:`replay` did."""

    start: int
    """Step of the given weights: the number of updates in them."""
    stop: int
    """Step of the weights now."""
    verified: bool | None
    """Whether they are the trained weights to the bit; None where the journal has no fingerprints
    of the weights at that step."""


class Span(NamedTuple):
    """The part of a journal that is to be applied."""

    low: int
    high: int
    """Range in the journal's step records."""
    start: int
    stop: int
    parts: list[tuple[Part, ...]]


def replay(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str] | Recording,
    *,
    start: int | None = None,
    stop: int | None = None,
    partial: bool = False,
    check: bool = True,
    backend: str = "auto",
    progress: Callable[[int, int], Any] | None = None,
) -> Replayed:
    """Take a model's zeroth-order weights through the steps of a journal, in place.

    The result is bit-identical to the trained weights: with Rademacher noise on every backend and
    device, with Gaussian noise on the backend that trained. With Gaussian noise on another one,
    it agrees to the rounding of the noise. Needs no data and no forward pass. In-place
    perturbations are done again, as they round; streamed ones leave nothing to do.

    Each piece of the weights goes through all steps before the next one is touched. An error
    before the first write (everything but running out of memory, or a Ctrl-C) changes nothing.

    Args:
        model: holds the starting weights: the base model, its peft model, or a mapping from
            parameter names to tensors, such as a state dict. Parameters have the dtypes in which
            they were trained. Of sharded ones (DTensors) each process replays what it holds; all
            call this.
        path: the journal, or what :func:`read` made of it.
        start: the step of the given weights, if they are a later checkpoint; default: the
            journal's first.
        stop: the step to go to; default: the journal's last.
        partial: where the journal was not closed, or is damaged, go as far as it is sound, with
            a warning. Not needed if ``stop`` is within its sound part.
        check: compare fingerprints before (where there are any for the step) and after. Reads
            all weights twice.
        backend: as in :class:`HybridZOFO`.
        progress: called with the number of elements done and in all.

    Returns:
        :class:`Replayed`.

    Raises:
        JournalError: the journal is damaged or incomplete, belongs to other weights, or the result
            is not what was trained where it must be.
        TypeError, ValueError: an argument that cannot be used.
        OSError: the file cannot be read.
    """
    recording = path if isinstance(path, Recording) else read(path)
    span = choose(recording, start, stop, partial)
    found = by_name(model, recording)
    if check:
        check_start(recording, span.low, found)
    apply(recording, span, found, backend, progress)
    verified = verify_end(recording, span.high, found, backend) if check else None
    return Replayed(span.start, span.stop, verified)


class Words(NamedTuple):
    """What messages call the arguments."""

    stop: str = "stop"
    to_a_step: str = "stop=<step>"
    partial: str = "partial=True"
    weights: str = "model"


PYTHON = Words()


def choose(
    recording: Recording,
    start: int | None,
    stop: int | None,
    partial: bool,
    words: Words = PYTHON,
) -> Span:
    """The records to apply; see :func:`replay` for what it raises."""
    version = recording.header["noise_version"]
    if version not in NOISE_VERSIONS:
        raise JournalError(
            f"{recording.path} was made with noise version {version!r}, and this version of "
            f"zofo_optim knows {NOISE_VERSIONS}"
        )
    steps = recording.steps
    first, last = recording.start, recording.stop
    begin = first if start is None else start
    end = last if stop is None else stop
    for name, value in (("start", begin), ("stop", end)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if stop is not None and stop > last and partial:
        end = last
    if not first <= begin <= end <= last:
        which = (
            f"{words.stop} must be"
            if start is None
            else f"start and {words.stop} must be in order and"
        )
        got = f"{end}" if start is None else f"{begin} and {end}"
        raise JournalError(
            f"{which} within the journal's sound steps {first} to {last}, got {got}"
            + (f"; {recording.fault}" if recording.fault else "")
        )
    if recording.fault and (stop is None or stop > last):
        if not partial:
            raise JournalError(
                f"{recording.fault}. Pass {words.partial} to go to step {last}, or "
                f"{words.to_a_step}"
            )
        warnings.warn(f"{recording.fault}; replaying up to step {last}", stacklevel=caller_level())
    low = sum(parts[0].step < begin for parts in steps)
    high = len(steps) if stop is None else sum(parts[0].step < end for parts in steps)
    return Span(low, high, begin, end, steps[low:high])


def check_start(
    recording: Recording, low: int, found: Mapping[str, Tensor], words: Words = PYTHON
) -> None:
    """These weights, some or all, are as the journal says before its record ``low``.

    Raises:
        JournalError: they are not; names the parameters.
    """
    wrong = different(recording, low, found)
    if wrong:
        raise JournalError(
            f"{words.weights} must have the weights that {recording.path} starts from, but "
            f"{len(wrong)} of {len(found)} zeroth-order parameters differ: {some(wrong)}; is it "
            "the same base model and revision, in the same dtype? The journal's metadata: "
            f"{recording.header['metadata']}"
        )


def verify_end(
    recording: Recording, high: int, found: Mapping[str, Tensor], backend: str
) -> bool | None:
    """Compare with the fingerprints of the trained weights; see :class:`Replayed`.

    Raises:
        JournalError: they differ though they must not.
    """
    wrong = different(recording, high, found)
    if not wrong:
        return None if wrong is None else True
    if recording.header["distribution"] == "rademacher":
        raise JournalError(
            f"replaying {recording.path} did not give the weights that were trained: "
            f"{some(wrong)} differ"
        )
    warnings.warn(
        f"the weights replayed from {recording.path} are not bit-identical to those trained: with "
        "Gaussian noise only the same backend on the same kind of machine gives the same bits "
        f"(trained with {sorted(recording.backends())}, replayed with "
        f"{sorted({backend_name(p.device, backend) for p in found.values()})})",
        stacklevel=caller_level(),
    )
    return False


def different(recording: Recording, count: int, found: Mapping[str, Tensor]) -> list[str] | None:
    """Names whose fingerprints differ after ``count`` records; None where it has none."""
    known = recording.fingerprints(count)
    if known is None:
        return None
    ours = zip(found, fingerprints(found.values()), strict=True)
    return [name for name, mark in ours if known[name] != mark]


# ---- applying -------------------------------------------------------------------------------


def apply(
    recording: Recording,
    span: Span,
    found: Mapping[str, Tensor],
    backend: str = "auto",
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Take these weights, some or all, through the steps."""
    header = recording.header
    done, total = 0, sum(local_of(p).numel() for p in found.values())
    for position, group in enumerate(header["groups"]):
        parts = [every[position] for every in span.parts]
        passes = _passes(parts, header)
        for (_, moving), here in _alike(group, parts, found).items():
            program = Program(passes if moving is None else (passes[i] for i in moving))
            for weights, size in _pieces(here, _room(len(program.passes))):
                if program.passes:
                    replay_(weights, program, rounding=header["rounding"], backend=backend)
                for tensor in weights.tensors:
                    drop(tensor)
                done += size
                if progress is not None:
                    progress(done, total)


_Places = list[tuple[Tensor, int]]
"""Tensors, and their places in the noise."""


def _alike(
    group: Mapping[str, Any], parts: Sequence[Part], found: Mapping[str, Tensor]
) -> dict[tuple[torch.device, tuple[int, ...] | None], _Places]:
    """A group's tensors by device and by the steps that moved them; None: all of them did."""
    partly = any(part.active is not None for part in parts)
    sets = [None if part.active is None else set(part.active) for part in parts] if partly else []
    alike: dict[tuple[torch.device, tuple[int, ...] | None], _Places] = {}
    for position, (name, index) in enumerate(zip(group["names"], group["indices"], strict=True)):
        if name in found:
            moving = tuple(i for i, one in enumerate(sets) if one is None or position in one)
            key = local_of(found[name]).device, moving if partly else None
            alike.setdefault(key, []).append((found[name], index))
    return alike


def _room(steps: int) -> int:
    """Elements that go through all steps together."""
    return max(SMALLEST_PIECE, PIECE_STEPS // max(steps, 1))


def _pieces(whole: Sequence[tuple[Tensor, int]], room: int) -> Iterator[tuple[Weights, int]]:
    """The tensors as lists of views of together about ``room`` elements, with their places.

    Of sharded tensors, what this process holds; rectangles are not taken apart.
    """
    views: list[Tensor] = []
    places: list[tuple[int, int, torch.Size]] = []
    used = 0

    def weights() -> Weights:
        indices, offsets, shapes = zip(*places, strict=True)
        return Weights(views, indices, offsets, shapes=shapes)

    held = [(piece, index, tensor.shape) for tensor, index in whole for piece in pieces_of(tensor)]
    for (tensor, offset, rectangle), index, shape in held:
        content = tensor.detach()
        if rectangle is not None:
            single = Weights([content], [index], [offset], [rectangle], [shape])
            yield single, content.numel()
            continue
        dense = content.resolve_neg().contiguous()
        copied = dense.data_ptr() != content.data_ptr()
        flat = dense.view(-1)
        for low in range(0, flat.numel(), room):
            piece = flat[low : low + room]
            if used and used + piece.numel() > room:
                yield weights(), used
                views, places, used = [], [], 0
            views.append(piece)
            places.append((index, offset + low, shape))
            used += piece.numel()
        if copied:  # before the copy is written back
            if used:
                yield weights(), used
            views, places, used = [], [], 0
            content.copy_(dense)
    if used:
        yield weights(), used


def _passes(parts: Sequence[Part], header: Mapping[str, Any]) -> list[Pass]:
    """One group's steps as passes over its weights."""
    said = {**BEFORE, **header}
    rank = direction_rank(said["structure"], said["rank"])
    noise = Noise(header["distribution"], header["noise_version"], rank)
    return [_pass(part, noise) for part in parts]


def _pass(part: Part, noise: Noise) -> Pass:
    """Each move takes off what the one before it added; the update starts from where they end."""

    def along(sample: int) -> Direction:
        return Direction(part.seed, part.step, sample, *noise)

    shifts: list[Shift] = []
    carried: Shift | None = None
    for sample, scale in (*part.path, (0, 0.0)):
        if carried is not None:
            shifts.append(carried.taken_off())
        carried = Shift(along(sample), scale) if scale else None
        if carried is not None:
            shifts.append(carried)
    directions = tuple(along(sample) for sample in range(len(part.coefficients)))
    return Pass(tuple(shifts), directions, part.coefficients, part.lr, part.weight_decay)
