"""What an estimate of memory says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..partition.budgets import parse_budget


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in tensors, at most, while a model trains. ``str()`` is a table.

    Made by :func:`estimate_memory`. The peak is what is there all the time (weights, adapter,
    optimizer state) and the largest of the moments: forward and backward, evaluations without
    gradients, and the update.
    """

    method: str
    """As a line: the method and its settings."""
    weights: int
    """Of the base model, its scales and its buffers."""
    adapter: int
    optimizer_state: int
    """Of first-order tensors; zeroth order has none."""
    gradients: int
    """Held after a backward; of the largest one where they are applied as they come."""
    activations: int
    """Kept by a forward for its backward; 0 where nothing trains first-order."""
    logits: int
    """Of the model's output, once. A language model's loss takes about two times as many numbers
    beside, in 32 bits: they are in the moments below."""
    copies: int
    """What streaming adds to an evaluation: perturbed copies, factors, displaced vectors."""
    forward_and_backward: int
    """A moment: the most beside what is always there."""
    evaluation: int
    """A moment: of an evaluation without gradients, and the gradients held meanwhile."""
    update: int
    """A moment: gradients, and what applying them takes."""
    verification: int
    """A moment of the first step only: its passes, evaluations that verify the perturbation among
    them, and copies of the model's buffers. There is no optimizer state by then."""
    visiting: int = 0
    """Of offloaded weights, the most that modules have resident, or on the GPU, at a time; in the
    moments above."""
    on_disk: int = 0
    """Of the file that offloaded weights are in; not in memory."""
    on_host: int = 0
    """Of the host's memory that offloaded weights are in, where they visit a GPU. Verification has
    the content of the largest one there, too."""

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.weights + self.adapter + self.optimizer_state

    @property
    def peak(self) -> int:
        """Of every step but the first one."""
        return self.resident + max(self.forward_and_backward, self.evaluation, self.update)

    @property
    def peak_while_verifying(self) -> int:
        """Of the first step, where it verifies a perturbation; 0 where there is none."""
        return self.verification and self.resident - self.optimizer_state + self.verification

    @property
    def most(self) -> int:
        """What must be there for training to begin and go on."""
        return max(self.peak, self.peak_while_verifying)

    def fits(self, memory: int | str) -> bool:
        """Whether :attr:`most` is at most this.

        What the device's context, libraries and fragmentation take is not counted: leave them
        room.

        Args:
            memory: bytes, or a string such as "24GB" or "80GiB".

        Raises:
            TypeError, ValueError: it is no such number of bytes.
        """
        return self.most <= bytes_of(memory)

    def __str__(self) -> str:
        always = [
            ("weights", self.weights),
            ("adapter", self.adapter),
            ("optimizer state", self.optimizer_state),
        ]
        moments = [
            ("forward and backward", self.forward_and_backward),
            ("evaluations without gradients", self.evaluation),
            ("update", self.update),
        ]
        parts = [
            ("activations kept", self.activations),
            ("gradients", self.gradients),
            ("logits", self.logits),
            ("copies and factors", self.copies),
            ("offloaded weights there", self.visiting),
        ]
        peaks = [("peak", self.peak), ("peak of the first step", self.most)]
        lines = [self.method]
        for title, rows in (
            ("always there", always),
            ("the largest of", moments),
            ("parts of these", parts),
            ("on the disk", [("offloaded weights", self.on_disk)]),
            ("on the host", [("offloaded weights", self.on_host)]),
        ):
            shown = [_line(f"  {name}", n) for name, n in rows if n]
            lines += [title, *shown] if shown else []
        lines += [_line(name, n) for name, n in peaks]
        return "\n".join(lines)


def _line(name: str, size: int) -> str:
    return f"{name:32}{size / 1e9:10.3f} GB"


def bytes_of(memory: Any) -> int:
    """
    Raises:
        TypeError, ValueError: see :meth:`MemoryEstimate.fits`.
    """
    must = f"memory must be bytes, such as '24GB', '80GiB' or an int above 1, got {memory!r}"
    try:
        found = parse_budget(memory, "memory").peak
    except TypeError as error:
        raise TypeError(must) from error
    except ValueError as error:
        raise ValueError(must) from error
    if found is None:
        raise ValueError(must)
    return found
