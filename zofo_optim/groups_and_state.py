"""What an optimizer is between steps: groups, state dicts, pickling, and what can be read of it."""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo_kernels._torch_compat import making_optimizer_state, uncompiled

from . import advice, rule_states, state
from .agreement import Agreement
from .buffers import Buffers, Modules, scales_among
from .capture import StepCounters
from .checks import check_active, check_group, check_offloaded, check_zo_parameters
from .defaults import given as is_given
from .defaults import value_of
from .estimate import Accumulation, Estimate
from .evaluation import Evaluator
from .first_order import FirstOrder
from .in_backward import OF_SEVERAL, InBackward
from .listeners import Listener, Listeners, Move
from .monitor import Monitor
from .perturbation import PERTURBATIONS
from .plain import make_plain
from .quantized import LearningScales, as_saved
from .replicas import LOST, Replicas, group_now, replicas_of
from .settings import Settings
from .zo_groups import ZOGroup

AnyListener = TypeVar("AnyListener", bound=Listener)


class GroupsAndState(Optimizer):
    """The part of :class:`zofo_optim.HybridZOFO` that evaluates nothing and moves no weight.

    Args:
        params: as for a torch optimizer.
        settings: of the optimizer as a whole.
        first_order: steps the FO groups.
        zo_shared: options that both modes have, as ZO groups take them, given or default.
        zo_defaults: options of ZO groups only.
    """

    def __init__(
        self,
        params: Any,
        settings: Settings,
        first_order: FirstOrder,
        zo_shared: dict[str, Any],
        zo_defaults: dict[str, Any],
    ) -> None:
        self._settings = settings
        self._fo = first_order
        self._zo_shared = zo_shared
        self._accumulation = Accumulation()
        self._advice = advice.Advice()
        self._monitor = Monitor(self._advice)
        self._start()
        shared = {name: value_of(value) for name, value in zo_shared.items()}
        self._constructing = True
        super().__init__(params, {**shared, **first_order.defaults, **zo_defaults})
        self._constructing = False
        self._check_parameters()

    def _start(self) -> None:
        """What a fresh or unpickled optimizer makes anew; none of it is state."""
        self._replicas: Replicas | None = None  # known in the first step
        self._agreement = Agreement(self._settings)
        self._evaluator = Evaluator(self._settings.directions == "per_example")
        self._counters = StepCounters()
        in_backward = self._settings.optimizer_in_backward
        self._in_backward = InBackward(self._fo) if in_backward else None
        self._listeners = Listeners(self._monitor, self._agreement)
        self._perturbation = PERTURBATIONS[self._settings.perturbation](
            self._settings, self._listeners, self._advice
        )

    def _know(self, modules: Modules) -> None:
        self._modules = modules
        self._perturbation.model = modules.model
        self._evaluator.buffers = Buffers(modules.buffered)

    _constructing = False  # also in optimizers that were unpickled
    _process_group: Any = None

    @property
    def process_group(self) -> Any:
        """As it was given; copies and unpickled optimizers have none until one is set.

        Raises:
            RuntimeError: the optimizer was copied or unpickled, and one had been given.
        """
        if isinstance(self._process_group, str) and self._process_group == LOST:
            raise RuntimeError(
                "process_group must be set again where an optimizer that was given one is copied "
                "or unpickled, as groups of processes cannot be: optimizer.process_group = group"
            )
        return self._process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._process_group = group

    @property
    def replicas(self) -> Replicas:
        """The processes that train the model together, as ``process_group`` says."""
        group = group_now(self.process_group)
        if self._replicas is None or self._replicas.group is not group:
            found = replicas_of(self._settings, group)
            if found.size > 1 and self._in_backward is not None:
                raise RuntimeError(OF_SEVERAL)
            self._replicas = found
        return self._replicas

    @property
    def _estimate(self) -> Estimate | None:
        return self._accumulation.estimate

    @_estimate.setter
    def _estimate(self, estimate: Estimate | None) -> None:
        self._accumulation.estimate = estimate

    @property
    def _directions(self) -> int:
        """Of the step's micro-batches so far, where their examples have directions of their own."""
        estimate = self._estimate
        if estimate is None or not estimate.per_example or estimate.coefficients is None:
            return 0
        return int(estimate.coefficients.shape[1])

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear FO gradients and ZO coefficients; ignored in repeated evaluations of a step."""
        if self._evaluator.running == "repeat":
            return
        if not making_optimizer_state():
            self._estimate = None
        super().zero_grad(set_to_none)

    # ---- groups ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; as in torch, with ``mode``, ``mu`` and ``seed`` among its options.

        Options that its mode does not have are refused, as is a ZO group without a learning rate.
        A new ZO group joins at the current step. Later ZO parameters get later noise indices.

        Raises:
            TypeError, ValueError: as in the constructor; nothing is added.
            RuntimeError: a journal is attached, and the group is zeroth-order.
        """
        given: dict[str, Any] = {}
        if isinstance(param_group, dict):
            make_plain(param_group)
            given = dict(param_group)
            if param_group.get("mode", self.defaults["mode"]) == "zo":
                self._listeners.group_adding(param_group)
                for name, value in self._zo_shared.items():  # not what fo_optimizer made of them
                    param_group.setdefault(name, value_of(value))
        super().add_param_group(param_group)
        try:
            has_rate = is_given(self._zo_shared["lr"])
            check_group(param_group, given, self._fo, has_rate=has_rate)
            scales = LearningScales()
            if not self._constructing:
                self._check_parameters()
                scales = scales_among(
                    param_group,
                    self._modules.model,
                    [param_group],
                    self._settings.perturbation,
                )
            if param_group["mode"] == "fo":
                self._fo.add(param_group, self.state)
        except BaseException:
            self.param_groups.pop()
            raise
        if "zo_step" not in given:
            first = next((g for g in self.param_groups if g["mode"] == "zo"), param_group)
            param_group["zo_step"] = int(first["zo_step"])
        if param_group["mode"] == "zo":
            rule_states.begin(self._settings.rule, param_group)
        self._perturbation.scales += scales

    def _check_parameters(self) -> None:
        """Of all groups at once, since any two parameters may share memory."""
        groups = (g["params"] for g in self.param_groups if g["mode"] == "fo")
        zeroth_order = self.zo_groups()
        check_zo_parameters(zeroth_order, chain.from_iterable(groups))
        check_offloaded(zeroth_order, self._settings)
        check_active(self._settings.activity, zeroth_order)

    # ---- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the state of accumulation is in the first ZO group, or the first of all.

        Holds no gradients: save ``.grad`` too where first-order groups are accumulating. Waits
        for the device where it accumulates, ``capturable=True`` or ``zo_rule`` has a state.
        """
        moves = self._perturbation.moves
        return state.add(super().state_dict(), self._settings, self._estimate, moves)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the directions' seed and step, and accumulated coefficients, are restored.

        Groups of ``state_dict`` without parameters that are lacking here are made: repartitioning
        empties some. Quantisation scales go to the groups that they were in when it was saved.

        Warns where the state was saved by an optimizer with other settings: it then goes on along
        another path, and what another ``zo_rule`` remembers is left.

        Raises:
            ValueError: the groups' number, sizes or modes differ; or both have names of parameters,
                and these are in another order.
        """
        groups, arranged = list(self.param_groups), None
        try:
            arranged = as_saved(groups, state_dict.get("param_groups", ()))
            if arranged is not None:
                self._listeners.places_changing()
                for group in arranged:
                    if group["mode"] == "zo":
                        self._listeners.group_adding(group)
                self.param_groups[:] = arranged
            for position, group in state.emptied(groups, state_dict.get("param_groups", ())):
                if group.get("mode") == "zo":
                    self._listeners.group_adding(group)
                self.param_groups.insert(position, {**group, "params": []})
            before = rule_states.of(self.param_groups)
            super().load_state_dict(state_dict)
        except BaseException:
            if arranged is not None or len(self.param_groups) != len(groups):
                self.param_groups[:] = groups
            raise
        # what was accumulated belongs to the directions of the step that is left
        self._estimate, self._perturbation.moves, saved = state.take(self.param_groups)
        rule, anew = rule_states.load(self._settings.rule, self.param_groups, before)
        advice.about_settings(self._settings, saved, rule, self.zo_groups(), anew)
        self._listeners.state_loaded()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_settings", "_zo_shared", "_fo", "_accumulation", "_monitor", "_advice", "_modules")
        kept = {name: self.__dict__[name] for name in own}
        kept["_process_group"] = None if self._process_group is None else LOST
        kept["_moves"] = self._perturbation.moves
        # first, as a copy's groups are to have the scales that its modules use
        return {"_scales": self._perturbation.scales, **super().__getstate__(), **kept}

    def __setstate__(self, state_: dict[str, Any]) -> None:
        state_ = dict(state_)
        moves, scales = state_.pop("_moves", None), state_.pop("_scales", None)
        loaded = state_.get("param_groups", ())  # torch's need no groups either
        state.check_same_modes(self.__dict__.get("param_groups"), loaded)
        state.check_same_names(self.__dict__.get("param_groups"), loaded)
        super().__setstate__(state_)
        state.fill_defaults(self.param_groups, self.defaults)
        if moves is not None:  # unpickled, not loaded
            self._start()
            self._know(state_.get("_modules") or Modules())
            self._perturbation.moves = moves
            self._perturbation.scales = LearningScales(scales or ())
            self._accumulation = Accumulation(self._estimate)  # a shallow copy has its own
        self._fo.rebuild(self.param_groups, self.state)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}{self._settings}\nfo_optimizer: {self._fo.name}\n)"

    def train(self) -> None:
        """Switch ``fo_optimizer`` to training, if it has modes, as schedule-free optimizers do."""
        self._fo.follow(self.param_groups, self.state)
        self._fo.switch("train")

    def eval(self) -> None:
        """Switch ``fo_optimizer`` to evaluation, if it has modes."""
        self._fo.follow(self.param_groups, self.state)
        self._fo.switch("eval")

    # ---- what can be read -----------------------------------------------------------------------

    @property
    def last_loss(self) -> Tensor | None:
        """Loss of the last evaluation of the unperturbed model, a detached 0-dim tensor.

        With ZO groups only there is none but with the one-sided estimator; then the mean of the
        perturbed losses, which is the clean loss up to O(mu^2).
        """
        return self._monitor.loss

    @property
    def projected_grads(self) -> Tensor | None:
        """Projected gradients (slopes) of the last estimate, shape (ZO groups, num_samples).

        With directions per example, (ZO groups, directions).

        Entry (g, s) is the slope along direction s as group g sees it; non-finite ones are 0.
        """
        return self._monitor.slopes

    @property
    def skipped_steps(self) -> int:
        """Estimates so far with a non-finite projected gradient. Waits for the device."""
        return self._monitor.skipped

    def report(self) -> str:
        """One line to print: step, loss, mean size of the slopes, size of the last update, skips.

        Loss and slopes are those that a step descends: sums over the micro-batches of the last
        step, or of the one that is accumulating since; a mean where the closure divides by their
        number. Micro-batches from before a state was loaded are not in them.

        The update's size is its norm over that of all ZO weights, which are read once for it; of
        sharded ones, those that this process holds. The call waits for the device. Fine-tunes that
        learn have sizes of about 1e-6 to 1e-3 a step, and small models up to 1e-2.

        Example:
            >>> print(optimizer.report())
            step 120: loss 0.6931, slope 1.20e+01, update 3.1e-05 of the weights' norm, skipped 0
        """
        return self._monitor.report(self.zo_groups())

    @property
    def buffers(self) -> Buffers:
        """What ``restore_buffers`` speaks of."""
        return self._evaluator.buffers

    @property
    def settings(self) -> Settings:
        """What was given for the optimizer as a whole, frozen."""
        return self._settings

    @property
    def evaluating(self) -> bool:
        """Whether a closure of this optimizer is running now."""
        return self._evaluator.running is not None

    @property
    def moves(self) -> tuple[Move, ...]:
        """In-place moves since the last update, by which weights may have been rounded."""
        return tuple(self._perturbation.moves)

    @property
    def accumulated(self) -> Tensor | None:
        """The coefficients that ``step()`` will apply, before ``zo_rule`` sees them.

        Shape (ZO groups, num_samples).

        With directions per example, (ZO groups, directions so far). None where there is no estimate
        to apply. Groups that were added since have no row.
        """
        if self._estimate is None:
            return None
        if self._estimate.coefficients is None:
            return torch.empty(0, self._settings.num_samples, device="cpu")
        return self._estimate.coefficients

    def zo_groups(self) -> list[ZOGroup]:
        """The zeroth-order groups with their noise indices, duplicates counted once."""
        return self._perturbation.groups_of(self.param_groups)

    def active_groups(self) -> list[ZOGroup]:
        """The zeroth-order groups as the present step moves them: see ``active``."""
        return self._perturbation.active(self.zo_groups())

    # ---- listeners ------------------------------------------------------------------------------

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """Those that were added, in order. They are neither pickled nor copied."""
        own = {id(self._monitor), id(self._agreement)}
        return tuple(m for m in self._listeners.members if id(m) not in own)

    def add_listener(self, listener: AnyListener) -> AnyListener:
        """Tell ``listener`` of moves, estimates, updates and loaded states from now on.

        Args:
            listener: see :class:`zofo_optim.Listener`.

        Returns:
            The listener.

        Raises:
            TypeError: it is no Listener.
            ValueError: it was added already.
            RuntimeError: the listener refuses; a journal is attached by its own ``attach``.
        """
        if not isinstance(listener, Listener):
            raise TypeError(
                f"listener must be a zofo_optim.Listener, got {type(listener).__name__}"
            )
        if any(known is listener for known in self.listeners):
            raise ValueError("listener must not be added twice, got one that is here already")
        listener.adding(self)  # type: ignore[arg-type]
        self._listeners.members.append(listener)
        return listener

    def remove_listener(self, listener: Listener) -> None:
        """Tell it no more.

        Raises:
            ValueError: it is not here.
            RuntimeError: the listener refuses; a journal is ended by its own ``close``.
        """
        if not any(known is listener for known in self.listeners):
            raise ValueError(f"listener must have been added before, got {listener!r}")
        listener.removing(self)  # type: ignore[arg-type]
        members = self._listeners.members
        members[:] = [known for known in members if known is not listener]
