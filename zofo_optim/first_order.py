"""The first-order side: a real torch optimizer that shares our groups and state."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo_kernels._torch_compat import unhooked_step

from .defaults import given, value_of

NEEDLESS = ("lr", "maximize", "weight_decay", "capturable")
"""Options that a class may lack."""
CLASS_DECIDES = ("momentum", "dampening", "nesterov")
"""Options that keep the class's own default (Muon's momentum, say) until the user sets them."""


def first_order_options(
    factory: Callable[..., Optimizer], shared: dict[str, Any], further: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for ``factory`` and the group defaults that it makes of them.

    Args:
        factory: the optimizer class.
        shared: our own arguments (lr, momentum, ...), or what they are by default; passed on
            where the class has them.
        further: options of the class only.

    Raises:
        TypeError: an option that the class does not have, or a class that needs a closure.
        ValueError: whatever the class itself rejects.
    """
    if not callable(factory):
        raise TypeError(f"fo_optimizer must be a torch optimizer class, got {factory!r}")
    name = getattr(factory, "__name__", repr(factory))
    accepted = inspect.signature(factory).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    options = dict(further)
    for option in further:
        if option not in accepted and not anything:
            raise TypeError(f"{option!r} is no option of HybridZOFO or of fo_optimizer={name}")
    bound = getattr(factory, "keywords", {})  # of a functools.partial
    for option, value in shared.items():
        if not given(value) and (option in bound or option in CLASS_DECIDES):
            continue
        if option in accepted or (anything and (option == "lr" or given(value))):
            options[option] = value_of(value)
        elif option not in NEEDLESS and value_of(value):
            raise TypeError(f"{option}={value!r} is no option of fo_optimizer={name}")
    trial = _trial(factory, options)
    if not isinstance(trial, Optimizer):
        raise TypeError(f"fo_optimizer must make a torch Optimizer, got {type(trial).__name__}")
    closure = inspect.signature(type(trial).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(f"fo_optimizer must step without a closure, got {name}, which needs one")
    return options, trial.defaults


def _trial(factory: Callable[..., Optimizer], options: Mapping[str, Any]) -> Optimizer:
    """An instance that checks the values, with the class's own messages, and fills defaults.

    Raises:
        TypeError: it cannot compare None or a string with a number; names the options.
    """
    try:
        return factory([torch.zeros(1, 1, device="cpu")], **options)
    except TypeError as error:
        if not (wrong := _no_numbers(options)):
            raise
        name = getattr(factory, "__name__", repr(factory))
        said = ", ".join(f"{option}={value!r}" for option, value in wrong.items())
        raise TypeError(
            f"{' and '.join(wrong)} must be what fo_optimizer={name} takes, which compares "
            f"with numbers, got {said}"
        ) from error


def _no_numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in options.items() if v is None or isinstance(v, (str, bytes))}


class FirstOrder:
    """Steps the groups with ``mode="fo"``; holds nothing that a state dict would miss.

    Args:
        factory: the optimizer class.
        options: for its constructor.
        defaults: what it makes of them: the options that its groups have.
    """

    def __init__(
        self,
        factory: Callable[..., Optimizer],
        options: dict[str, Any],
        defaults: dict[str, Any],
    ) -> None:
        self.defaults = defaults
        self._factory = factory
        self.options = options
        self._inner: Optimizer | None = None

    @property
    def name(self) -> str:
        return getattr(self._factory, "__name__", repr(self._factory))

    def makes(self, cls: type[Optimizer]) -> bool:
        """Whether the optimizer is of this class itself, and of no subclass of it."""
        return type(_trial(self._factory, self.options)) is cls

    def check(self, given: Mapping[str, Any]) -> None:
        """None and strings among the options of a group; of numbers torch checks the defaults.

        Raises:
            TypeError: the class does not take them.
        """
        usual = self.defaults.keys() - _no_numbers(self.defaults).keys()
        wrong = {k: v for k, v in _no_numbers(given).items() if k in usual}
        if wrong:
            _trial(self._factory, {**self.options, **wrong})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inner": None}

    def fresh(self) -> FirstOrder:
        """One of the same class and options, without groups."""
        return FirstOrder(self._factory, self.options, self.defaults)

    def rebuild(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Make the optimizer anew over our own group dictionaries and state."""
        self._inner = None
        for group in groups:
            if group["mode"] == "fo":
                self.add(group, state)
        if self._inner is not None:  # the class's own migration of older state
            shared = {"state": state, "param_groups": self._inner.param_groups}
            self._inner.__setstate__(shared)  # type: ignore[attr-defined]

    def follow(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Share what the optimizer has now: its user may have replaced either, or a group."""
        if self._inner is None:
            self.rebuild(groups, state)
        else:
            self._inner.param_groups = [group for group in groups if group["mode"] == "fo"]
            self._inner.state = state  # type: ignore[assignment]

    def add(self, group: dict[str, Any], state: dict[Tensor, Any]) -> None:
        """Add one group; the dictionary itself is shared."""
        with warnings.catch_warnings():  # ours has warned already
            warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate")
            if self._inner is None:
                self._inner = self._factory([group], **self.options)
                made: Mapping[Tensor, Any] = self._inner.state
            else:
                self._inner.add_param_group(group)
                made = self._made_at_once([dict(group)])
        for parameter, first in made.items():
            state.setdefault(parameter, first)
        self._inner.state = state  # type: ignore[assignment]

    def _made_at_once(self, groups: list[dict[str, Any]]) -> dict[Tensor, Any]:
        """State that the class makes when it is constructed: Adagrad's, in older torch."""
        fills = bool(_trial(self._factory, self.options).state)
        return dict(self._factory(groups, **self.options).state) if fills else {}

    def parameters(self) -> list[Tensor]:
        """Of all its groups."""
        groups = self._inner.param_groups if self._inner is not None else ()
        return [p for group in groups for p in group["params"]]

    def step(self) -> None:
        """One step, without the hooks that torch wraps around ``step``: ours have fired."""
        if self._inner is not None:
            unhooked_step(self._inner)(self._inner)

    def steps_of_one(self) -> dict[int, Callable[[Tensor], None]]:
        """By ``id`` of each parameter, what steps it alone; autograd may call from any thread."""
        inner, lock = self._inner, threading.Lock()
        if inner is None:
            return {}

        def step_in(group: dict[str, Any]) -> Callable[[Tensor], None]:
            def step(parameter: Tensor) -> None:
                with lock:
                    groups = inner.param_groups
                    inner.param_groups = [{**group, "params": [parameter]}]
                    try:
                        self.step()
                    finally:
                        inner.param_groups = groups

            return step

        return {
            id(p): step for g in inner.param_groups for step in [step_in(g)] for p in g["params"]
        }

    def check_steps_one(self) -> None:
        """
        Raises:
            TypeError: the class steps parameters otherwise together than one by one.
        """
        results = []
        for apart in (False, True):
            generator = torch.Generator().manual_seed(0)
            parameters = [
                torch.randn(shape, generator=generator, requires_grad=True)
                for shape in ((2, 3), (3, 2))
            ]
            trial = self.fresh()
            groups = [{"params": parameters, "mode": "fo", **self.defaults}]
            trial.rebuild(groups, defaultdict(dict))
            steps = trial.steps_of_one()
            for _ in range(2):
                gradients = [10 * torch.randn(p.shape, generator=generator) for p in parameters]
                _step(trial, steps if apart else {}, parameters, gradients)
            notes = {name: value for name, value in groups[0].items() if name != "params"}
            results.append(([p.detach() for p in parameters], notes))
        (together, as_said), (alone, noted) = results
        same = all(torch.allclose(a, b) for a, b in zip(together, alone, strict=True))
        if not same or as_said != noted:
            raise TypeError(
                "fo_optimizer must step each parameter by itself where optimizer_in_backward=True, "
                f"got {self.name}, whose steps depend on all gradients or count its calls"
            )

    def switch(self, mode: str) -> None:
        """Call the optimizer's own ``train`` or ``eval``, which schedule-free ones have."""
        method = getattr(self._inner, mode, None)
        if callable(method):
            method()


def _step(
    first_order: FirstOrder,
    steps: Mapping[int, Callable[[Tensor], None]],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """One step of a trial, one by one where ``steps`` says how; by sparse gradients if need be."""
    for sparse in (False, True):
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.to_sparse(1) if sparse else gradient.clone()
        try:
            if not steps:
                return first_order.step()
            for p in parameters:
                steps[id(p)](p)
            return None
        except RuntimeError:
            if sparse:
                raise
    return None
