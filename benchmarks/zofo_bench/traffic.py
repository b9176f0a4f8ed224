"""What a process hands to collectives, counted where torch dispatches them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zofo_kernels._torch_compat import TorchDispatchMode

_INPUT = {
    "c10d::allreduce_": 0,
    "c10d::broadcast_": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "c10d::allgather_into_tensor_coalesced_": 1,
    "c10d::_reduce_scatter_base_": 1,
    "c10d::reduce_scatter_tensor_coalesced_": 1,
}
"""Of torch's operations: which argument holds what the process contributes."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts within its block the collectives, and the bytes of this process's contributions.

    A sum counts with all that is summed, a gathering with the process's own part. What algorithms
    send on, packets' heads and objects' pickling are not in it. DDP's sums are seen too, and
    FSDP2's gatherings.

    Raises:
        NotImplementedError: a collective that is not known.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.collectives = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith("wait_tensor"):
            if name not in _INPUT:
                raise NotImplementedError(f"traffic must be of known collectives, got {name}")
            self.collectives += 1
            self.bytes += _bytes(args[_INPUT[name]])
        return func(*args, **(kwargs or {}))


def _bytes(given: Any) -> int:
    if isinstance(given, Tensor):
        return given.nbytes
    return sum(map(_bytes, given))
