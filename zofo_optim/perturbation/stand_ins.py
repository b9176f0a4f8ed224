"""What forward passes see of sharded parameters.

FSDP2 gathers shards into plain parameters, which modules hold while they compute: one object for
each, made when it is first gathered, whose memory comes and goes. Torch functions get these, never
the DTensor that an optimizer has. Tensor parallelism computes with the DTensors themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..settings import Settings
from ..sharding import check_model, fsdp_modules, is_sharded, reshard

_Place = tuple[int, str]
"""The id of a module, and a parameter's name there."""


class StandIns:
    """Finds what stands for parameters in forward passes, and keeps it."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        """That gather parameters: the processes that share them run these together."""
        self._found: dict[int, tuple[Tensor, Tensor]] = {}  # by id; both are held

    def of(self, parameter: Tensor) -> Tensor:
        """What torch functions get for it; a plain parameter itself."""
        return self._found.get(id(parameter), (parameter, parameter))[1]

    def find(self, parameters: Sequence[Tensor], model: nn.Module | None) -> bool:
        """Look for those that are not known. All processes call this together.

        Args:
            parameters: as an optimizer has them.
            model: that they are of; None: unknown.

        Returns:
            Whether modules gathered them for that, which may give the shards other memory.

        Raises:
            ValueError: FSDP2 may gather one, and the model is not known.
        """
        sharded = [p for p in parameters if is_sharded(p)]
        if all(id(p) in self._found for p in sharded):
            return False
        check_model(model, sharded)
        self._found = {id(p): (p, p) for p in sharded}
        self.modules = [] if model is None else fsdp_modules(model)
        self._gather_in_turn()
        return True

    def _gather_in_turn(self) -> None:
        """Not all weights at once."""
        reshard(self.modules)
        with torch.inference_mode(False), torch.no_grad():
            for module in self.modules:
                shards = dict(_parameters(module))
                module.unshard()  # type: ignore[operator]
                for place, parameter in _parameters(module):
                    shard = shards[place]
                    if parameter is not shard:
                        self._found[id(shard)] = shard, parameter
                module.reshard()  # type: ignore[operator]


def _parameters(module: nn.Module) -> Iterator[tuple[_Place, Tensor]]:
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield (id(owner), name), parameter


def distributed(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor of which this process holds ``local``, placed as the DTensor ``like`` is."""
    return sys.modules["torch.distributed.tensor"].DTensor.from_local(  # type: ignore[no-any-return]
        local,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def check_alike(names: Sequence[str], settings: Settings) -> None:
    """Processes that compute a product together must displace it alike.

    Args:
        names: of parameters that layers compute with as DTensors.
        settings: the optimizer's.

    Raises:
        ValueError: some would be displaced otherwise than in another process.
    """
    for rule, kept in (
        ("directions must be 'shared'", settings.directions == "shared"),
        ("parallel must be 'data'", settings.parallel == "data"),
    ):
        if names and not kept:
            raise ValueError(
                f"{rule} where layers compute with DTensors, as in tensor parallelism, got "
                f"directions={settings.directions!r} and parallel={settings.parallel!r}, and "
                f"{names[0]!r} ({len(names)} in all): parallelize the model by FSDP2 alone"
            )
