"""Bytes that are alive in tensors, followed through a block."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from zofo_kernels._torch_compat import TorchDispatchMode, tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts memory that operations in the block allocate; on every device, meta included.

    What kernels take for themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes allocated in the block and not freed."""
        self.most = 0
        """The largest that ``now`` has been."""
        self._alive: dict[int, Any] = {}  # id of a storage -> its weakref

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.set_:
            return result  # a tensor in memory that is there
        for out in tree_leaves(result):
            if _is_tensor(out):
                storage = out.untyped_storage()
                key = id(storage)
                if key not in given and key not in self._alive:
                    self._add(key, storage)
        return result

    def _add(self, key: int, storage: Any) -> None:
        nbytes = storage.nbytes()

        def gone(_: Any) -> None:
            self._alive.pop(key, None)
            self.now -= nbytes

        self._alive[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.most = max(self.most, self.now)


def _is_tensor(leaf: Any) -> bool:
    """Whether it is a tensor with memory: sparse gradients are not seen."""
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided
