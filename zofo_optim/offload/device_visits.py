"""Offloaded weights visit a GPU block by block.

The parameter that a block computes with is the one that the optimizer has: while the block
computes, its data are a copy on the GPU, and otherwise those on the host. The next block's copies
are made meanwhile on a stream of their own, in the order of the last forward pass. Graphs keep no
copy: what a backward needs comes again (:mod:`zofo_optim.saved_copies`). Signals wait while weights
come and go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zofo_kernels import uninterrupted
from zofo_kernels._torch_compat import (
    in_a_backward,
    in_functorch,
    tree_flatten,
    tree_unflatten,
    uncompiled,
    without_functorch,
    without_torch_functions,
)

from ..saved_copies import SavedCopies, keeping_out
from .copies import Copier, Copies, content
from .hooks import Hook
from .maps import memory_of

WHOLE = ("MultiheadAttention", "TransformerDecoderLayer", "TransformerEncoderLayer")
"""Classes of torch's modules that compute with their parts' weights themselves."""


class _Home(NamedTuple):
    """What a visiting parameter has on the host."""

    parameter: Tensor
    data: Tensor
    copy: int
    """The address of its copy."""
    version: int


class DeviceVisits:
    """The hooks of a model's modules, and what is on its way. One thread may run the model.

    Args:
        model: some of whose parameters are offloaded, and visit nothing yet.
        device: that they visit.
        blocks: names of classes of modules whose weights come and go together; those of other
            modules do so one by one.
    """

    def __init__(self, model: nn.Module, device: torch.device, blocks: Collection[str]) -> None:
        self.device = device
        self._copier = Copier(device)
        self._own: dict[int, list[Tensor]] = {}  # by id of the module
        self._ids: set[int] = set()  # of the parameters
        self._home: dict[int, _Home] = {}  # by id of a parameter that visits
        self._present: list[int] = []  # modules
        self._coming: tuple[int, Copies] | None = None
        self._next: dict[int, int] = {}
        self._last: int | None = None
        self._inside: list[int] = []  # modules that compute, outermost first
        self._pass = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._hook(model, {*blocks, *WHOLE})
        _every.add(self)

    def _hook(self, module: nn.Module, blocks: Collection[str]) -> bool:
        """Whether offloaded weights are in it."""
        inside = [self._hook(child, blocks) for child in module.children()]
        together = type(module).__name__ in blocks
        own: list[Tensor] = [p for p in module.parameters(together) if self._goes(p)]
        if own:
            self._own[id(module)] = own
            self._ids |= {id(p) for p in own}
        elif not any(inside):
            return False
        enter, leave = _Enter(self), _Leave(self)
        self._handles += [
            module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
        return True

    def remove(self) -> None:
        """No hooks any more; weights are on the host."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _every.discard(self)

    def has(self, parameter: Tensor) -> bool:
        """Whether it visits the device."""
        return id(parameter) in self._ids

    def on_device(self, parameter: Tensor) -> Tensor:
        """Its elements there, detached: those of its visit, or a copy."""
        if id(parameter) in self._home:
            return parameter.detach()
        return parameter.detach().to(self.device, copy=True)

    # ---- forward passes ---------------------------------------------------------------------

    def enter(self, module: nn.Module, inputs: Any) -> Any:
        """Its weights come, and the next module's are on their way; the inputs, on the device."""
        here, recording = id(module), torch.is_grad_enabled()
        with uninterrupted():
            if self._inside[:1] == [here] and not in_a_backward():  # the last one was interrupted
                self.settle()
            alone = not (self._inside or keeping_out() or in_a_backward() or in_functorch())
            if recording and alone:
                self._pass.enter_context(self._saved_copies().unkept())
            self._inside.append(here)
            if here in self._own:
                with _plainly():
                    self._come(here, keeping_out() if recording else None)
        return self._moved(inputs)

    def leave(self, module: nn.Module) -> None:
        """Its weights go."""
        here = id(module)
        with uninterrupted():
            if here in self._present:
                with _plainly():
                    self._go(here)
            if self._inside[-1:] == [here]:
                self._inside.pop()
            if not self._inside:
                self.settle()

    def settle(self) -> None:
        """All weights are on the host, and no copy of them is being made."""
        with uninterrupted():
            self._inside.clear()
            self._present.clear()
            self._last = None
            try:
                with _plainly():
                    for home in list(self._home.values()):
                        self._bring(home)
                    self._drop_coming()
                    self._copier.finish()
            finally:
                self._pass.close()

    def _come(self, here: int, saved: SavedCopies | None) -> None:
        known = self._known(here)
        missing = self._fetched(here, known)
        if known is not None:
            self._coming = None
        for some in (known, missing):
            self._copier.wait(some)
            for parameter, tensor, of in () if some is None else some.of:
                home = _Home(parameter, parameter.data, tensor.data_ptr(), parameter._version)
                self._home[id(parameter)] = home
                parameter.data = tensor
                if saved is not None:
                    saved.remember(parameter, partial(self._again, parameter, of))
        self._present.append(here)
        is_part = known is None and missing is None  # of a block that is there
        if not (is_part or in_a_backward()):
            self._look_ahead(here)

    def _known(self, here: int) -> Copies | None:
        """What is on its way, and right: not of a weight that was written to since."""
        if self._coming is None or self._coming[0] != here:
            return None
        copies = self._coming[1]
        right = [c for c in copies.of if id(c.parameter) not in self._home]
        if len(right) < len(copies.of) or any(content(c.parameter) != c.of for c in right):
            self._drop_coming()
            return None
        return copies

    def _look_ahead(self, here: int) -> None:
        """Fetch what came after this module in the last pass, and nothing else any more."""
        if self._last is not None and self._last != here:
            self._next[self._last] = here
        self._last = here
        after = self._next.get(here)
        if self._coming is not None and self._coming[0] == after:
            return
        self._drop_coming()
        if after is not None and after not in self._present:
            copies = self._fetched(after)
            self._coming = None if copies is None else (after, copies)

    def _drop_coming(self) -> None:
        """Its memory is used again only when it has been written."""
        if self._coming is not None:
            self._copier.wait(self._coming[1])
            self._coming = None

    def _go(self, here: int) -> None:
        self._present.remove(here)
        stay = {id(p) for module in self._present for p in self._own[module]}
        for parameter in self._own[here]:
            if id(parameter) in self._home and id(parameter) not in stay:
                self._bring(self._home[id(parameter)])

    def _bring(self, home: _Home) -> None:
        """Home, with what something has written to the parameter."""
        parameter = home.parameter
        if parameter._version != home.version or parameter.data_ptr() != home.copy:
            home.data.copy_(parameter.data)
        parameter.data = home.data
        del self._home[id(parameter)]

    # ---- copies -----------------------------------------------------------------------------

    def _goes(self, parameter: Tensor) -> bool:
        """Whether it is offloaded, and visits nothing yet."""
        return memory_of(parameter) is not None and visits_of(parameter) is None

    def _is_on_host(self, parameter: Tensor) -> bool:
        return memory_of(parameter) is not None

    def _saved_copies(self) -> SavedCopies:
        return SavedCopies()

    def _fetched(self, here: int, known: Copies | None = None) -> Copies | None:
        """Copies of what is neither on the device nor known; None: there is nothing."""
        there = self._home.keys() | {id(c.parameter) for c in (() if known is None else known.of)}
        hosts = [p for p in self._own[here] if id(p) not in there and self._is_on_host(p)]
        return self._copier.copies(hosts) if hosts else None

    def _again(self, parameter: Tensor, of: tuple[int, int]) -> Tensor:
        """For a backward.

        Raises:
            RuntimeError: the weight is another one by now.
        """
        if id(parameter) not in self._home and content(parameter) != of:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: an offloaded weight of shape {tuple(parameter.shape)}. Take "
                "gradients before weights are updated"
            )
        return self.on_device(parameter)

    def _moved(self, inputs: Any) -> Any:
        leaves, structure = tree_flatten(inputs)
        if all(not isinstance(x, Tensor) or x.device == self.device for x in leaves):
            return None
        there = [x.to(self.device) if isinstance(x, Tensor) else x for x in leaves]
        return tree_unflatten(there, structure)


_every: WeakSet[DeviceVisits] = WeakSet()


def visits_of(parameter: Tensor) -> DeviceVisits | None:
    """Those that the parameter makes; None: it stays where it is."""
    if not _every:
        return None
    for one in _every:
        if one.has(parameter):
            return one
    return None


def settle() -> None:
    """See :meth:`DeviceVisits.settle`: before something else reads or writes the weights."""
    for one in list(_every) if _every else ():
        one.settle()


@contextmanager
def _plainly() -> Iterator[None]:
    """No mode that evaluations are in sees or changes what is done with weights here."""
    with (
        without_torch_functions(),
        without_functorch(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


class _Enter(Hook):
    """Before a module computes."""

    def __init__(self, visits: DeviceVisits) -> None:
        self._visits = visits

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._visits.enter(module, (args, kwargs))


class _Leave(Hook):
    """After it."""

    def __init__(self, visits: DeviceVisits) -> None:
        self._visits = visits

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._visits.leave(module)
