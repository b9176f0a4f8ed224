"""Whether the processes that train one model still do: the same settings, step and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zofo_kernels.dispatch import backend_name
from zofo_kernels.memory import check_storage

from .listeners import Listener
from .replicas import Replicas
from .sharding import is_sharded, local_of, pieces_of
from .update import Update
from .zo_groups import ZOGroup

if TYPE_CHECKING:
    from .settings import Settings

_WORD = 8
"""Bytes that are summed as one integer; sums of smaller ones take the host 20 times as long."""
_PRIME = 1_000_003


class Agreement(Listener):
    """Compares the processes before their first estimate, and their weights now and then.

    Args:
        settings: the optimizer's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._compared = False
        self._steps = 0  # since
        self._checked = -1  # the last of them whose weights were compared

    def state_loaded(self) -> None:
        self._compared = False

    def updated(self, updates: Sequence[Update]) -> None:
        self._steps += 1

    def check(
        self,
        replicas: Replicas,
        param_groups: Sequence[dict[str, Any]],
        groups: list[ZOGroup],
        others: Mapping[str, Any],
    ) -> None:
        """Before an estimate.

        Args:
            replicas: the processes.
            param_groups: of the optimizer.
            groups: the zeroth-order ones of them, with all that ever moves.
            others: what else must be the same, with what messages call it.

        Raises:
            RuntimeError: names what differs, and between which ranks.
            ValueError: processes that shard a parameter are not among them.
        """
        if not self._compared:
            _check_meshes(replicas, groups)
        if replicas.size == 1:
            self._compared = True
            return
        if not self._compared:
            self._compare(replicas, param_groups, groups, others)
            self._compared, self._steps, self._checked = True, 0, -1
        every = self._settings.check_ranks_every
        # after the first step, too: what is not synchronised differs then
        due = self._steps in (0, 1) or (every and self._steps % every == 0)
        if every and due and self._checked != self._steps:  # once for all micro-batches
            self._checked = self._steps
            self._check_weights(replicas, param_groups, groups)

    def _compare(
        self,
        replicas: Replicas,
        param_groups: Sequence[dict[str, Any]],
        groups: list[ZOGroup],
        others: Mapping[str, Any],
    ) -> None:
        said = {**vars(self._settings), **others}
        ours = {name: repr(value) for name, value in said.items()}
        devices = sorted({p.device.type for group in groups for p in group.placed.locals})
        served = [backend_name(torch.device(d), self._settings.backend) for d in devices]
        ours["backend in use"] = repr(served)
        for position, group in enumerate(groups):
            ours |= {f"{k} of zeroth-order group {position}": v for k, v in _layout(group).items()}
        first_order = [g for g in param_groups if g.get("mode") != "zo"]
        for position, options in enumerate(first_order):
            kinds = [(tuple(p.shape), p.dtype) for p in options["params"]]
            ours[f"parameters of first-order group {position}"] = repr(kinds)
            names = options.get("param_names")
            ours[f"names of first-order group {position}"] = repr(names)
            ours[f"lr of first-order group {position}"] = _number(options.get("lr"))
        marks = replicas.all_of({name: _mark(value) for name, value in ours.items()})
        for rank, theirs in enumerate(marks):
            wrong = [n for n in {**marks[0], **theirs} if marks[0].get(n) != theirs.get(n)]
            if wrong:
                values = replicas.all_of(ours.get(wrong[0], "nothing"))
                raise RuntimeError(
                    f"processes must train alike, but rank {rank} has another {wrong[0]} than "
                    f"rank 0: {values[rank]:.200} and {values[0]:.200}"
                    + f" ({len(wrong)} differences in all)"
                    * (len(wrong) > 1)
                )

    def _check_weights(
        self, replicas: Replicas, param_groups: Sequence[dict[str, Any]], groups: list[ZOGroup]
    ) -> None:
        zeroth_order = {
            name: p for group in groups for name, p in zip(group.names, group.params, strict=True)
        }
        first_order = {
            _name(group, position, place): p
            for position, group in enumerate(param_groups)
            if group.get("mode") != "zo"
            for place, p in enumerate(group["params"])
        }
        every = {**zeroth_order, **first_order}
        sums = _checksums(every)
        parts = [_part(p) for p in every.values()]
        kinds: dict[str, list[int]] = {}
        for position, (kind, _) in enumerate(parts):
            kinds.setdefault(kind, []).append(position)
        # few numbers; processes that hold the same parts of all parameters of a kind compare them
        ours: dict[str, int] = {}
        for kind, positions in kinds.items():
            total = 0
            for position in positions:
                total = (total * _PRIME + sums[position]) & (1 << 63) - 1
            ours[_mark(repr([kind, *(parts[position] for position in positions)]))] = total
        if not _different(replicas.all_of(ours)):
            return
        detailed = {(name, *part): n for name, part, n in zip(every, parts, sums, strict=True)}
        wrong = _different(replicas.all_of(detailed))
        names = [name for name, *_ in wrong]
        raise RuntimeError(_of_weights(names, *next(iter(wrong.values())), first_order))


def _check_meshes(replicas: Replicas, groups: Sequence[ZOGroup]) -> None:
    """Processes that hold parts of a parameter must all make the same update."""
    for group in groups:
        for name, p in zip(group.names, group.params, strict=True):
            if is_sharded(p):
                sharing = set(p.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
                ours = set(torch.distributed.get_process_group_ranks(replicas.group))
                if missing := sharing - ours:
                    raise ValueError(
                        f"process_group must have all processes that share the parameter {name!r}, "
                        f"got ranks {sorted(ours)}, which lack {sorted(missing)}"
                    )


def _different(numbers: Sequence[dict[Any, int]]) -> dict[Any, tuple[int, int]]:
    """What has two numbers, with two ranks that have them."""
    known: dict[Any, tuple[int, int]] = {}
    found: dict[Any, tuple[int, int]] = {}
    for rank, ours in enumerate(numbers):
        for key, number in ours.items():
            first, other = known.setdefault(key, (rank, number))
            if other != number:
                found.setdefault(key, (first, rank))
    return found


def _of_weights(wrong: list[str], before: int, rank: int, first_order: dict[str, Tensor]) -> str:
    said = (
        f"parameters must be the same in all processes, but rank {rank} has others than rank "
        f"{before}: {', '.join(wrong[:5])}" + f" and {len(wrong) - 5} more" * (len(wrong) > 5)
    )
    if wrong[0] in first_order:
        return (
            f"{said}. First-order gradients are averaged by DistributedDataParallel or "
            "fully_shard: wrap the model, and begin with the same weights (one seed before they "
            "are made)"
        )
    return (
        f"{said}. Begin with the same weights, let nothing else write to them, and make shards "
        "DTensors (fully_shard, parallelize_module); processes that train models of their own each "
        "pass process_group=torch.distributed.new_group([rank], use_local_synchronization=True)"
    )


def _layout(group: ZOGroup) -> dict[str, str]:
    options = group.options
    return {
        "names": repr(group.names),
        "shapes": repr([tuple(p.shape) for p in group.params]),
        "dtypes": repr([p.dtype for p in group.params]),
        "seed": repr(options["seed"]),
        "step": _number(options["zo_step"]),
        **{name: _number(options[name]) for name in ("lr", "mu", "weight_decay", "maximize")},
        "unit": _number(group.unit),
    }


def _number(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, Tensor) else value)


def _mark(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]


def _name(group: dict[str, Any], position: int, place: int) -> str:
    names = group.get("param_names")
    return f"parameter {place} of group {position}" if names is None else str(names[place])


def _part(parameter: Any) -> tuple[str, str]:
    """How processes share a parameter, and which elements of it this one holds."""
    if not is_sharded(parameter):
        return "", ""
    kind = repr((parameter.device_mesh.mesh.tolist(), parameter.placements))
    pieces = pieces_of(parameter)
    held = [(piece.offset, piece.tensor.shape, piece.rectangle) for piece in pieces]
    return _mark(kind), _mark(repr(held))


def _checksums(parameters: Mapping[str, Tensor]) -> list[int]:
    """Sums of the elements' bits, exact on every device. Waits for the devices once each.

    Raises:
        ValueError: the memory behind one is gone.
    """
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, (name, p) in enumerate(parameters.items()):
        local = local_of(p).detach()
        check_storage(local, f"parameter {name!r}")
        total = _sum_of_bits(local)
        by_device.setdefault(total.device, []).append((place, total))
    found = [0] * len(parameters)
    for some in by_device.values():
        values = torch.stack([total for _, total in some]).tolist()
        for (place, _), value in zip(some, values, strict=True):
            found[place] = value
    return found


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """0-dim int64, the same for the same elements, wherever they lie."""
    flat = tensor.resolve_neg().resolve_conj().reshape(-1)
    # a single element is contiguous whatever its stride
    if flat.storage_offset() * flat.element_size() % _WORD or flat.stride() != (1,):
        flat = flat.new_empty(flat.shape).copy_(flat)
    bytes_ = flat.view(torch.uint8)
    whole = bytes_.numel() // _WORD * _WORD
    rest = bytes_[whole:].sum(dtype=torch.int64)
    return bytes_[:whole].view(torch.int64).sum() + rest
