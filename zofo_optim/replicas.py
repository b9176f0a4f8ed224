"""Who evaluates which points, and how their losses come together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .estimators import ESTIMATORS, Estimator, Point
from .settings import Settings


class Gathered(NamedTuple):
    """What all processes found at all points of a step; the same in each."""

    points: Sequence[Point]
    losses: Tensor
    """There, shape (points,); or of B examples of all processes, (points, B)."""
    differences: Tensor
    """Per unit of mu, shape (directions,); see :meth:`Estimator.differences`."""


class Share(NamedTuple):
    """What this process's loss counts, beside those of others."""

    factor: float
    """Of the loss; 1 on average over the processes."""
    differ: bool
    """Whether it is another one in some process."""


class Replicas(Protocol):
    """The processes that train one model together.

    Every process has the same zeroth-order weights, or its shards of them, so a few scalars are all
    that they exchange. Methods that exchange them are called by all processes, in the same order.
    """

    rank: int
    """Of this process, in [0, size)."""
    size: int
    group: Any
    """Of ``torch.distributed``; None for one process alone."""

    def mine(self, points: Sequence[Point]) -> Sequence[Point]:
        """Those of a step's points that this process evaluates, in order; at least one.

        The unperturbed point is among them, where the step has it: every process needs its own
        first-order gradients, and returns its own loss.
        """

    def direction(self, place: int, count: int) -> int:
        """Number among the directions of all processes' examples of one of this process's.

        Args:
            place: of the direction among this process's, in [0, count).
            count: of this process's.
        """

    def share(self, weight: float) -> Share:
        """By what this process's loss is multiplied, for the mean over all to be weighted.

        Args:
            weight: of this process's batch; NaN where it was given none that can be. Exchanged.

        Raises:
            ValueError: in all processes: in one it is NaN, or it is 0 in all.
        """

    def gather(
        self, points: Sequence[Point], losses: Tensor, share: Share | None = None
    ) -> Gathered:
        """The losses of all processes, and what they say along each direction. Exchanged.

        Args:
            points: of the step, before :meth:`mine`.
            losses: at ``mine(points)``, shape (own points,), on the loss's device; or of this
                process's examples, shape (own points, B).
            share: what :meth:`share` gave; None where all processes' batches count alike.
        """

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in all processes. Exchanged."""

    def all_set(self, flag: Tensor) -> Tensor:
        """As :meth:`agree`, of a 0-dim bool, on whose device the answer stays. Exchanged."""

    def all_of(self, value: Any) -> list[Any]:
        """The value of each process: any that can be pickled. Exchanged."""


class OneProcess:
    """One process evaluates everything."""

    rank, size = 0, 1

    def __init__(self, settings: Settings, group: Any = None) -> None:
        self._settings, self.group = settings, group

    def mine(self, points: Sequence[Point]) -> Sequence[Point]:
        return points

    def direction(self, place: int, count: int) -> int:
        return place

    def share(self, weight: float) -> Share:
        return Share(1.0, False)

    def gather(
        self, points: Sequence[Point], losses: Tensor, share: Share | None = None
    ) -> Gathered:
        return Gathered(points, losses, _differences(self._settings, points, losses))

    def agree(self, flag: bool) -> bool:
        return flag

    def all_set(self, flag: Tensor) -> Tensor:
        return flag

    def all_of(self, value: Any) -> list[Any]:
        return [value]


class Processes:
    """Several processes of ``torch.distributed``.

    An estimate takes one collective, of a number an evaluation; where batches have weights, or
    losses are those of examples, another one, of a number. Losses are summed in float64, in the
    order of ranks: all processes find the same to the bit.

    Args:
        settings: the optimizer's.
        group: of at least two processes.
    """

    def __init__(self, settings: Settings, group: Any) -> None:
        self._settings, self.group = settings, group
        self.rank, self.size = int(group.rank()), int(group.size())
        estimator = ESTIMATORS[settings.estimator]
        self._per_example = settings.directions == "per_example"
        self._own_samples = settings.parallel == "samples" and not self._per_example
        self._signs = len(estimator.signs)
        if self._own_samples and settings.num_samples % self.size:
            raise ValueError(
                f"num_samples must be a multiple of the {self.size} processes where "
                f"parallel='samples', got {settings.num_samples}"
            )
        if self._per_example and settings.capturable:
            raise ValueError(
                "directions must be 'shared' where capturable=True and several processes train: "
                "they exchange how many examples each has"
            )

    def mine(self, points: Sequence[Point]) -> Sequence[Point]:
        if not self._own_samples:
            return points
        # gradients are averaged over processes, each of which has its part of the sum
        return [
            point._replace(gradient=point.gradient * self.size) if point.sign else point
            for point in points
            if point.sign == 0 or point.sample % self.size == self.rank
        ]

    def direction(self, place: int, count: int) -> int:
        if self._settings.example_order == "contiguous":
            return self.rank * count + place
        return place * self.size + self.rank

    def share(self, weight: float) -> Share:
        if self._settings.capturable:
            raise ValueError("weight must be None where capturable=True: processes exchange it")
        weights = self._numbers(weight)
        total = sum(weights)
        if not total > 0:
            raise ValueError(
                "weight must be a finite number >= 0 in every process, and above 0 in some, got "
                f"{weights} by rank"
            )
        return Share(weight * self.size / total, len(set(weights)) > 1)

    def gather(
        self, points: Sequence[Point], losses: Tensor, share: Share | None = None
    ) -> Gathered:
        losses = losses.to(_wide(losses))
        if self._per_example:
            return self._of_examples(points, losses, share)
        own = torch.cat([losses.new_full((1,), 1.0 if share is None else share.factor), losses])
        every = self._all_gather(own).to(losses.device)
        shares, each = every[:, :1], every[:, 1:]
        # what a process without a batch returned counts nothing; but gradients of NaN are NaN
        counts = shares > 0 if not any(p.gradient for p in points) else shares >= 0
        weighted = torch.where(counts, each * shares, 0.0)
        if not self._own_samples:
            together = weighted.mean(0)
            return Gathered(points, together, _differences(self._settings, points, together))
        clean = weighted[:, : int(points[0].sign == 0)].mean(0)
        displaced = weighted[:, len(clean) :].view(self.size, -1, self._signs)
        mine = [point for point in points if point.sample % self.size == 0 or point.sign == 0]
        along = torch.stack([_differences(self._settings, mine, one) for one in each])
        along = torch.where(shares > 0, along * shares, 0.0)
        # sample j k + r is the j-th of process r
        return Gathered(
            points,
            torch.cat([clean, displaced.transpose(0, 1).flatten()]),
            along.t().flatten(),
        )

    def _of_examples(
        self, points: Sequence[Point], losses: Tensor, share: Share | None
    ) -> Gathered:
        """Put side by side, in the order of their directions.

        Their mean is that of the processes' means, as these count; with no share, that of all.
        """
        each = self._settings.examples_of_a_direction
        counts = [int(count) for count in self._numbers(losses.shape[1])]
        self._check([count // each for count in counts], counts)
        if len(set(counts)) > 1 and share is None and any(point.gradient for point in points):
            raise ValueError(
                "weight must be given where processes have batches of different size and there are "
                f"first-order groups, whose gradients are averaged, got {counts} losses by rank: "
                "step(closure, weight=len(batch))"
            )
        if share is not None and (share.differ or len(set(counts)) > 1):
            factor = share.factor * sum(counts) / (self.size * losses.shape[1])
            losses = losses * factor if factor else torch.zeros_like(losses)
        room = max(counts)
        own = torch.nn.functional.pad(losses, (0, room - losses.shape[1]))
        every = self._all_gather(own).to(losses.device)
        of_process = every.view(self.size, len(losses), -1, each)
        if self._settings.example_order == "contiguous":
            joined = of_process.permute(1, 0, 2, 3)
        else:
            joined = of_process.permute(1, 2, 0, 3)
        # what some lack comes last
        found = joined.reshape(len(losses), -1)[:, : sum(counts)]
        return Gathered(points, found, _differences(self._settings, points, found))

    def _check(self, directions: list[int], counts: list[int]) -> None:
        if self._settings.example_order == "contiguous":
            if len(set(counts)) > 1:
                raise ValueError(
                    "closure must return as many losses in every process where example_order="
                    f"'contiguous', got {counts} by rank; drop the last batch, or fill it up"
                )
            return
        turns = sorted(directions, reverse=True)
        if directions != turns or turns[0] - turns[-1] > 1:
            raise ValueError(
                "closure must return losses of examples that were dealt by turns where "
                "example_order='interleaved': as many directions in every process, or one less "
                f"from some rank on, got {counts} losses by rank"
            )

    def agree(self, flag: bool) -> bool:
        return all(self._numbers(float(flag)))

    def _numbers(self, number: float) -> list[float]:
        """The number of each process."""
        every = self._all_gather(torch.tensor([number], dtype=torch.float64, device="cpu"))
        return every.flatten().tolist()  # type: ignore[no-any-return]

    def all_set(self, flag: Tensor) -> Tensor:
        # no backend needs to know bool
        least = flag.to(self._device(flag.device), torch.int32)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=self.group)
        return least.to(flag.device, torch.bool)

    def all_of(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def _all_gather(self, own: Tensor) -> Tensor:
        """Of all processes, shape (size, own shape)."""
        own = own.to(self._device(own.device)).contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(found, own, group=self.group)
        return torch.stack(found)

    def _device(self, device: torch.device) -> torch.device:
        """One that the group's backend can send from: the loss's, or the process's accelerator."""
        kinds = _kinds(torch.distributed.get_backend_config(self.group))
        if device.type in kinds or not kinds:
            return device
        kind = next((kind for kind in kinds if kind != "cpu"), "cpu")
        if kind == "cpu":
            return torch.device("cpu")
        return torch.device(kind, torch.get_device_module(kind).current_device())


@functools.cache
def _kinds(config: str) -> tuple[str, ...]:
    """Types of devices that a backend's configuration names, such as "cpu:gloo,cuda:nccl"."""
    return tuple(part.split(":")[0] for part in config.split(",") if ":" in part)


def _differences(settings: Settings, points: Sequence[Point], losses: Tensor) -> Tensor:
    estimator: Estimator = ESTIMATORS[settings.estimator]
    return estimator.differences(points, losses, settings.examples_per_direction)


def _wide(losses: Tensor) -> torch.dtype:
    """What sums over processes are taken in: float64, where the device has it."""
    return losses.dtype if losses.device.type == "mps" else torch.float64


LOST = "lost"
"""In place of a group that was not copied along."""


def group_now(group: Any) -> Any:
    """The group that a ``process_group`` speaks of; None: this process is alone.

    Raises:
        ValueError: it is no group that has this process.
    """
    distributed = torch.distributed
    if group is None:
        initialised = distributed.is_available() and distributed.is_initialized()
        return distributed.group.WORLD if initialised else None
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise ValueError(
            "process_group must be None or a group of torch.distributed that has this process, got "
            f"{group!r}"
        )
    return group


def replicas_of(settings: Settings, group: Any) -> Replicas:
    """The processes of what :func:`group_now` gave.

    Raises:
        ValueError: they are too many for ``num_samples``.
    """
    alone = group is None or group.size() == 1
    return OneProcess(settings, group) if alone else Processes(settings, group)
