"""Offloaded weights visit a GPU block by block.

The parameter that a block computes with is the one that the optimizer has: while the block
computes, its data are a copy on the GPU, and otherwise those on the host. The next block's copies
are made meanwhile on a stream of their own, in the order of the last forward pass. Graphs keep no
copy: what a backward needs comes again (:mod:`zofo_optim.saved_copies`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zofo_kernels._torch_compat import (
    in_a_backward,
    tree_flatten,
    tree_unflatten,
    uncompiled,
    without_functorch,
    without_torch_functions,
)

from ..saved_copies import SavedCopies, keeping_out
from .hooks import Hook
from .maps import memory_of, pages_of

WHOLE = ("MultiheadAttention", "TransformerDecoderLayer", "TransformerEncoderLayer")
"""Classes of torch's modules that compute with their parts' weights themselves."""


class _Copies(NamedTuple):
    """Of a block's weights, on the GPU, as soon as ``made``."""

    of: list[tuple[Tensor, Tensor]]
    made: Any


class _Home(NamedTuple):
    """What a visiting parameter has on the host."""

    parameter: Tensor
    data: Tensor
    version: int


class DeviceVisits:
    """The hooks of a model's modules, and what is on its way.

    Args:
        model: some of whose parameters are offloaded.
        device: that they visit.
        blocks: names of classes of modules whose weights come and go together; a module with
            offloaded weights of its own takes those of its parts along.
    """

    def __init__(self, model: nn.Module, device: torch.device, blocks: Collection[str]) -> None:
        self.device = device
        self._streams = _streams_of(device)
        self._stream: Any = None if self._streams is None else self._streams.Stream(device)
        self._own: dict[int, list[Tensor]] = {}  # by id of the module
        self._ids: set[int] = set()  # of the parameters
        self._home: dict[int, _Home] = {}  # by id of a parameter that visits
        self._present: list[int] = []  # modules
        self._coming: dict[int, _Copies] = {}
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
        own = list(_offloaded(module, recurse=False))
        if own or type(module).__name__ in blocks:
            own = list(_offloaded(module, recurse=True))
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
        here = id(module)
        if self._inside[:1] == [here] and not in_a_backward():  # the pass before was interrupted
            self.settle()
        recording = torch.is_grad_enabled()
        with _plainly():
            if recording and not (self._inside or keeping_out() or in_a_backward()):
                self._pass.enter_context(SavedCopies().unkept())
            self._inside.append(here)
            if here in self._own:
                self._come(here, keeping_out() if recording else None)
        return self._moved(inputs)

    def leave(self, module: nn.Module) -> None:
        """Its weights go."""
        here = id(module)
        with _plainly():
            if here in self._present:
                self._go(here)
            if self._inside[-1:] == [here]:
                self._inside.pop()
            if not self._inside:
                self.settle()

    def settle(self) -> None:
        """All weights are on the host, and no copy of them is being made."""
        self._inside.clear()
        try:
            with _plainly():
                while self._present:
                    self._go(self._present[-1])
                for copies in self._coming.values():
                    self._wait(copies)
                self._coming.clear()
                if self._stream is not None:
                    self._stream.synchronize()
        finally:
            self._last = None
            self._pass.close()

    def _come(self, here: int, saved: SavedCopies | None) -> None:
        copies = self._coming.pop(here, None)
        missing = self._fetched(here, copies)
        for some in (copies, missing):
            self._wait(some)
            for parameter, copy in () if some is None else some.of:
                if id(parameter) in self._home:  # it came with another module
                    continue
                self._home[id(parameter)] = _Home(parameter, parameter.data, parameter._version)
                parameter.data = copy
                if saved is not None:
                    saved.remember(parameter, partial(self.on_device, parameter))
        self._present.append(here)
        is_part = copies is None and missing is None  # of a block that is there
        if not (is_part or in_a_backward()):
            self._look_ahead(here)

    def _look_ahead(self, here: int) -> None:
        """Fetch what came after this module in the last pass."""
        if self._last is not None and self._last != here:
            self._next[self._last] = here
        self._last = here
        after = self._next.get(here)
        if after is not None and after not in self._present and after not in self._coming:
            if (copies := self._fetched(after)) is not None:
                self._coming[after] = copies

    def _go(self, here: int) -> None:
        self._present.remove(here)
        stay = {id(p) for module in self._present for p in self._own[module]}
        for parameter in self._own[here]:
            if id(parameter) in self._home and id(parameter) not in stay:
                home = self._home.pop(id(parameter))
                if parameter._version != home.version:  # something has written to it
                    home.data.copy_(parameter.data)
                parameter.data = home.data

    # ---- copies -----------------------------------------------------------------------------

    def _fetched(self, here: int, known: _Copies | None = None) -> _Copies | None:
        """Copies of what is neither on the device nor known; made in the stream's own time.

        Their memory is the present stream's, in whose order it is used again.
        """
        there = self._home.keys() | {id(p) for p, _ in (() if known is None else known.of)}
        hosts = [p for p in self._own[here] if id(p) not in there and memory_of(p) is not None]
        if not hosts:
            return None
        made = [torch.empty_like(p, device=self.device, requires_grad=False) for p in hosts]
        event = None
        if self._streams is None:
            _copy(hosts, made)
        else:
            self._stream.wait_stream(self._streams.current_stream(self.device))
            with self._streams.stream(self._stream):
                _copy(hosts, made)
                event = self._stream.record_event()
        return _Copies(list(zip(hosts, made, strict=True)), event)

    def _wait(self, copies: _Copies | None) -> None:
        """What is computed from now on finds them made."""
        if copies is not None and self._streams is not None:
            self._streams.current_stream(self.device).wait_event(copies.made)

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
    for one in list(_every):
        one.settle()


def _streams_of(device: torch.device) -> Any:
    """The module that has the device's streams; None: it has none."""
    return None if device.type == "cpu" else torch.get_device_module(device)


def _copy(hosts: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    for host, copy in zip(hosts, made, strict=True):
        copy.copy_(host.detach(), non_blocking=True)
        if (pages := pages_of(host)) is not None:
            pages.drop()


def _offloaded(module: nn.Module, *, recurse: bool) -> Iterator[Tensor]:
    return (p for p in module.parameters(recurse) if memory_of(p) is not None)


@contextmanager
def _plainly() -> Iterator[None]:
    """No mode that evaluations are in sees or changes what is done with weights here."""
    contexts: Sequence[AbstractContextManager[Any]] = (
        without_torch_functions(),
        without_functorch(),
        torch.inference_mode(False),
        torch.no_grad(),
    )
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
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
