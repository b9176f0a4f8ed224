"""What FSDP2 has gathered of the weights: never older than the shards.

A forward pass leaves the root's parameters gathered, and those of modules that are told so; the
next one takes them as they are. Shards that moved meanwhile would not be seen: neither a
perturbation nor an update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from zofo_kernels._torch_compat import forget_forward_order, is_in_forward

from .sharding import check_model, fsdp_modules, is_fsdp, is_sharded, local_of, reshard
from .zo_groups import is_same

Named = Sequence[tuple[str, Tensor]]
"""Parameters, each with its name."""


class GatheredWeights:
    """Of the parameters that an optimizer moves."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._known: list[Tensor] = []
        self._modules: dict[nn.Module, None] = {}
        self._readers: set[str] = set()
        self._complete = self._is_left_inside = False

    def begin(self, model: nn.Module | None, params: Named) -> None:
        """These weights move from now on; nothing is watched anew where they are those of before.

        Where their memory alone is another, as FSDP2 of older torch moves shards that it pads, that
        may be so in some of the processes, and watching what they gather must be done in all.

        Args:
            model: that they are of; None where it is unknown.
            params: all whose weights move; sharded ones are DTensors.

        Raises:
            ValueError: FSDP2 may gather some, and the model is unknown; or one is what it gathers
                for a while, not the shard.
        """
        tensors = [p for _, p in params]
        self._readers = _readers(tensors)
        if model is self._model and is_same(tensors, self._known):
            return
        self._known = []  # in case of an error
        check_model(model, tensors)
        self._model = model
        self._modules = dict.fromkeys(() if model is None else fsdp_modules(model))
        self._complete = False
        if model is not None and self._modules:
            plain = _plain(params)
            for parameter in _freed_by_reshard(model, self._modules, plain):
                raise ValueError(_GATHERED.format(plain[parameter]))
        self._known = tensors

    def begin_step(self) -> None:
        """Before evaluations: shards may have been written since the last ones.

        Raises:
            RuntimeError: an evaluation raised within a forward pass, which torch cannot leave.
        """
        if self._is_left_inside and any(map(is_in_forward, self._modules)):
            raise RuntimeError(
                "closure must not raise within a forward pass of FSDP2, as it did in an earlier "
                f"step, where torch cannot leave that pass (torch {torch.__version__} has no "
                "FSDPModule.reset_iter_state): later losses would be of weights that were gathered "
                "then. Make the model and the optimizer anew and load a checkpoint, or use a newer "
                "torch"
            )
        self._is_left_inside = False
        self.reshard()

    def reshard(self) -> None:
        """Before the shards are written: what is gathered after it, is of what was written.

        Waits for accelerators that copy shards from the host, where these are offloaded: they read
        them when their turn comes, not when they are told to.
        """
        reshard(self._modules)
        for kind in self._readers:
            torch.get_device_module(kind).current_stream().synchronize()

    def updated(self) -> None:
        """No backward comes of earlier forward passes: FSDP2 may forget their order."""
        for module in self._modules:
            forget_forward_order(module)

    @contextmanager
    def fresh(self, named: Callable[[], Named]) -> Generator[None, None, None]:
        """Around an evaluation: what a module gathered before it is not used in it.

        Args:
            named: gives all whose weights move, by name.

        Raises:
            ValueError: one is what FSDP2 gathers for a while, not the shard; or modules gather it
                that the model does not have.
        """
        if not _is_initialized():
            yield
            return
        if self._complete:
            with self._abandoned_where_it_fails():
                yield
            return
        params = named()
        plain = _plain(params)
        freed: dict[int, nn.Module] = {}
        with self._abandoned_where_it_fails(), self._watched(plain, freed):
            yield
        for parameter, module in freed.items():
            del self._modules[module]
            module.unshard()  # type: ignore[operator]  # for what is displaced to move back
            raise ValueError(_GATHERED.format(plain[parameter]))
        self._check_known(params)
        self._complete = True

    def _check_known(self, params: Named) -> None:
        """They are the model's, and no other module keeps some gathered."""
        if self._model is None or not (self._modules or any(is_sharded(p) for _, p in params)):
            return
        reshard(self._modules)
        held = {id(p) for p in self._model.parameters()}
        if missing := [(name, p) for name, p in params if id(p) not in held]:
            name, p = missing[0]
            if not is_sharded(p):
                raise ValueError(
                    f"zeroth-order parameter {name!r} must be the model's, got one that it had "
                    "before fully_shard: call fully_shard first, then hybrid_param_groups(model)"
                )
            raise ValueError(
                "hybrid_param_groups must be given the model that fully_shard was applied to last, "
                f"with all modules that gather its parameters, got one in which {name!r} is not "
                "the shard"
            )

    @contextmanager
    def _watched(
        self, plain: Collection[int], freed: dict[int, nn.Module]
    ) -> Generator[None, None, None]:
        """Each FSDP module that is called in the block gathers anew, and is known from now on.

        The root may hold the model that the groups are of, and parameters that are no shards may
        be what a module has gathered.

        Args:
            plain: ids of parameters that are no shards.
            freed: is told of those whose memory goes by that, and of their modules.
        """
        seen = set[nn.Module]()

        def before(module: nn.Module, args: Any) -> None:
            if module in seen or not is_fsdp(module):
                return
            seen.add(module)  # once: a checkpointed layer runs again in the backward
            self._modules.setdefault(module)
            freed.update(dict.fromkeys(_freed_by_reshard(module, (module,), plain), module))

        hook = register_module_forward_pre_hook(before)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _abandoned_where_it_fails(self) -> Generator[None, None, None]:
        """An evaluation that raises leaves FSDP2 inside it: let the next one begin anew.

        Older torch has no way to.
        """
        try:
            yield
        except BaseException:
            for module in self._modules:
                if hasattr(module, "reset_iter_state"):
                    with suppress(RuntimeError):  # it is no root
                        module.reset_iter_state()  # type: ignore[operator]
            self._is_left_inside = any(map(is_in_forward, self._modules))
            raise


_GATHERED = (
    "zeroth-order parameter {!r} must be a shard of FSDP2, got what a forward pass had gathered "
    "when the groups were made: make them by hybrid_param_groups(model), or call reshard() of the "
    "FSDP modules before"
)


def _plain(params: Named) -> dict[int, str]:
    """Names of those that are no shards, by id."""
    return {id(p): name for name, p in params if not is_sharded(p)}


def _freed_by_reshard(
    module: nn.Module, modules: Iterable[nn.Module], plain: Collection[int]
) -> list[int]:
    """Those of the parameters that a module has as long as others of it gather them."""
    held = {id(p) for p in module.parameters()}
    reshard(modules)
    left = {id(p) for p in module.parameters()}
    return [p for p in plain if p in held and p not in left]


def _readers(params: Sequence[Tensor]) -> set[str]:
    """Kinds of accelerators to which FSDP2 copies shards from the host."""
    kinds: set[str] = {
        p.device_mesh.device_type  # type: ignore[attr-defined]
        for p in params
        if is_sharded(p) and local_of(p).device.type == "cpu"
    }
    return kinds - {"cpu"}


def _is_initialized() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
