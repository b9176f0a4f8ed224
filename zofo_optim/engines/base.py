"""What an engine is: it evaluates displacements on prompts, and its weights follow the updates."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from zofo_kernels import Direction, Weights, update_

from ..ask_tell import Displaced
from ..listeners import Listener
from ..optimizer import HybridZOFO
from ..update import Update
from .lora import Target, targets_of

AnyEngine = TypeVar("AnyEngine", bound="Engine")
_OTHER_GROUPS = "an engine follows the groups it was attached with; detach() it first"


class Recipe(NamedTuple):
    """An :class:`Update` of one group in plain numbers: what goes to where the weights are."""

    directions: list[tuple[int, int, int, str, int, int]]
    """The fields of each :class:`zofo_kernels.Direction`."""
    coefficients: list[float]
    lr: float
    dtypes: tuple[str, str]
    """Of the coefficients and of lr, on which rounding depends."""
    weight_decay: float
    active: list[int] | None

    @classmethod
    def of(cls, update: Update) -> Recipe:
        return cls(
            [(d.seed, int(d.step), *d[2:]) for d in update.directions],
            update.coefficients.tolist(),
            float(update.lr),
            (_name(update.coefficients), _name(update.lr)),
            update.weight_decay,
            None if update.active is None else list(update.active),
        )

    def apply(self, weights: Sequence[tuple[Tensor, int]], rounding: str, backend: str) -> None:
        """Make the update of a group's tensors, given with their noise indices."""
        if self.active is not None:
            weights = [weights[position] for position in self.active]
        if not weights or not self.directions:
            return
        tensors, indices = zip(*weights, strict=True)
        coefficients, lr = (
            torch.tensor(value, dtype=getattr(torch, dtype), device="cpu")
            for value, dtype in zip((self.coefficients, self.lr), self.dtypes, strict=True)
        )
        update_(
            Weights(tensors, indices),
            [Direction(*fields) for fields in self.directions],
            coefficients,
            lr,
            weight_decay=self.weight_decay,
            rounding=rounding,
            backend=backend,
        )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Engine(Listener, ABC):
    """Serves the model that an optimizer trains, displaced for each row as the optimizer asks.

    The optimizer's own weights stay where they are, on the CPU, and go through the same updates.
    Between the two go displacements, seeds and coefficients; no weights.

    ```python
    engine.attach(optimizer, model)
    displaced = optimizer.ask(len(prompts))
    optimizer.tell(scores_of(engine.generate(prompts, displaced)))
    optimizer.step()
    ```
    """

    _optimizer: HybridZOFO | None = None
    _targets: list[list[Target]]
    _kinds: list[tuple[object, ...]]

    def attach(self: AnyEngine, optimizer: HybridZOFO, model: nn.Module) -> AnyEngine:
        """Serve for ``optimizer``, and follow its updates from now on.

        Compares the served weights with the model's, which takes a pass over both.

        Args:
            optimizer: with ``structure="low_rank"``, ``directions="per_example"`` and zeroth-order
                groups only, of weights of linear layers and embeddings, on the CPU.
            model: the one that it trains; names its parameters.

        Returns:
            The engine.

        Raises:
            TypeError, ValueError: an optimizer or a model that the engine cannot serve for; the
                message names the parameters and how to leave them out. Or the engine serves other
                weights than the model's.
            RuntimeError: it is attached already.
        """
        if not isinstance(optimizer, HybridZOFO):
            raise TypeError(f"optimizer must be a HybridZOFO, got {type(optimizer).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if self._optimizer is not None:
            raise RuntimeError("the engine is attached already; detach() it first")
        settings = optimizer.settings
        for name, wanted in (("structure", "low_rank"), ("directions", "per_example")):
            if getattr(settings, name) != wanted:
                raise ValueError(
                    f"optimizer must have {name}={wanted!r}, as engines displace rows by adapters, "
                    f"got {getattr(settings, name)!r}"
                )
        _check_groups(optimizer)
        self._targets = targets_of(optimizer.zo_groups(), model)
        self._kinds = self._kinds_now()
        self._optimizer = optimizer
        try:
            self._begin(optimizer, model)
            return optimizer.add_listener(self)
        except BaseException:
            self._optimizer = None
            raise

    def detach(self) -> None:
        """Follow the optimizer no more; does nothing where it is not attached."""
        if self._optimizer is not None:
            self._optimizer.remove_listener(self)

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        displaced: Sequence[Displaced] | None = None,
        sampling: Any = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Completions of prompts.

        Args:
            prompts: token ids of each row.
            displaced: where each row is evaluated, from :meth:`HybridZOFO.ask` in the present
                step; None: all at the weights as they are. Both sides of a direction draw the same
                noise.
            sampling: how to sample, as the engine has it, or a transformers ``GenerationConfig``;
                None: the engine's default.
            seeds: of each row's noise, where rows are not displaced; None: the engine's own.

        Returns:
            Token ids of each row's completion, without the prompt, with the one that ends it.

        Raises:
            ValueError: ``displaced`` or ``seeds`` have another length, ``displaced`` is not of the
                present step, or both are given.
            RuntimeError: not attached.
        """

    @abstractmethod
    def _begin(self, optimizer: HybridZOFO, model: nn.Module) -> None:
        """Serve the model for the optimizer, or raise."""

    @abstractmethod
    def _follow(self, recipes: Sequence[Recipe]) -> None:
        """Make a step's updates, one a group, at the latest before the next evaluation."""

    @abstractmethod
    def synchronise(self, compare: bool = False) -> None:
        """Serve the weights that the optimizer has, now and not at the next call of generate.

        Args:
            compare: whether to look for weights that other means than the optimizer's steps have
                changed, such as ``model.load_state_dict``.

        Raises:
            RuntimeError: not attached.
        """

    # ---- for engines ----------------------------------------------------------------------------

    def _attached(self) -> HybridZOFO:
        if self._optimizer is None:
            raise RuntimeError("the engine must be attached first, by attach(optimizer, model)")
        return self._optimizer

    def _active_targets(self) -> list[list[Target]]:
        """Those that the optimizer's present step moves; ``active`` may leave some at rest."""
        moving = [set(group.indices) for group in self._attached().active_groups()]
        return [
            [target for target in of_group if target.noise_index in indices]
            for of_group, indices in zip(self._targets, moving, strict=True)
        ]

    def _kinds_now(self) -> list[tuple[object, ...]]:
        parameters = [target.parameter for of_group in self._targets for target in of_group]
        return [(p.dtype, p.shape, p.device) for p in parameters]

    def _check_rows(
        self,
        prompts: Sequence[Sequence[int]],
        displaced: Sequence[Displaced] | None,
        seeds: Sequence[int] | None,
    ) -> None:
        optimizer = self._attached()
        _check_groups(optimizer)  # one may have been added since
        if self._kinds_now() != self._kinds:
            raise ValueError(
                "zeroth-order parameters must keep the dtype, shape and device with which the "
                "engine was attached; detach() and attach(optimizer, model) anew"
            )
        for name, given in (("displaced", displaced), ("seeds", seeds)):
            if given is not None and len(given) != len(prompts):
                raise ValueError(
                    f"{name} must have an entry for each of the {len(prompts)} prompts, got "
                    f"{len(given)}"
                )
        if displaced is None:
            return
        if seeds is not None:
            raise ValueError(
                "seeds must be left out where rows are displaced, as both sides of a direction "
                "get one of their own"
            )
        groups = optimizer.zo_groups()
        for row, one in enumerate(displaced):
            now = tuple(group.direction(one.direction) for group in groups)
            if tuple(shift.direction for shift in one.shifts) != now:
                raise ValueError(
                    f"displaced must be what ask() gives in the optimizer's present step, got "
                    f"{one.shifts[0].direction} in row {row}, where that step has {now[0]}"
                )

    # ---- told by the optimizer ------------------------------------------------------------------

    def updated(self, updates: Sequence[Update]) -> None:
        self._follow([Recipe.of(update) for update in updates])

    def group_adding(self, group: dict[str, Any]) -> None:
        raise RuntimeError(_OTHER_GROUPS)

    def places_changing(self) -> None:
        raise RuntimeError(_OTHER_GROUPS)

    def adding(self, optimizer: HybridZOFO) -> None:
        if self._optimizer is not optimizer:
            raise RuntimeError("an engine is added by its own attach(optimizer, model)")

    def removing(self, optimizer: HybridZOFO) -> None:
        self._optimizer = None


def _check_groups(optimizer: HybridZOFO) -> None:
    if any(group["mode"] == "fo" for group in optimizer.param_groups):
        raise ValueError(
            "optimizer must have zeroth-order groups only, as an engine gives no gradients and "
            "does not follow first-order steps, got a group with mode='fo'"
        )


def noise_seeds(displaced: Sequence[Displaced]) -> list[int]:
    """A seed a row: the same for both sides of a direction, else different; in [0, 2^63)."""
    counts: Counter[tuple[int, int]] = Counter()
    found = []
    for one in displaced:
        at = one.direction, one.side
        first = one.shifts[0].direction
        said = f"{first.seed} {int(first.step)} {one.direction} {counts[at]}"
        digest = hashlib.sha256(said.encode()).digest()
        found.append(int.from_bytes(digest[:8], "little") >> 1)
        counts[at] += 1
    return found
