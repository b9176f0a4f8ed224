"""HybridZOFO: one torch optimizer for a zeroth-order base model and a first-order adapter."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo_kernels import Weights, uninterrupted

from .capture import StepCounters, capturing
from .checks import (
    caller_level,
    check_mode,
    check_mu,
    check_same_modes,
    check_seed,
    check_step_options,
    check_zo_options,
    check_zo_parameters,
)
from .estimators import ESTIMATORS
from .evaluation import Closure, Evaluation, GlobalRandomState, evaluate, gradients_aside
from .first_order import FirstOrder, first_order_options
from .monitor import Monitor
from .pending import Pending
from .perturbation import InPlacePerturbation, Move, Perturbation, StepListener, ZOGroup
from .settings import Settings
from .streamed import StreamedPerturbation


class HybridZOFO(Optimizer):
    r"""Hybrid zeroth- and first-order optimisation (Ma, Yu, Huang, ICLR 2026, Algorithm 1).

    Groups with ``mode="fo"`` are stepped by ``fo_optimizer``, ``torch.optim.SGD`` by default.
    Groups with ``mode="zo"`` follow

    .. math:: x \leftarrow x - \eta \Big(\frac1q \sum_s \hat c_s v_s + \lambda x\Big)

    with random directions :math:`v_s` regenerated from a seed and projected gradients
    :math:`\hat c_s` from evaluations of the closure under ``no_grad``: no backward, no
    gradients and no optimizer state for x. Both estimates are taken at the same (x, y).

    With FO groups only this is ``fo_optimizer`` itself, bit for bit (a closure is required);
    with ZO groups only it is MeZO (Malladi et al. 2023).

    A closure is evaluated 1 (FO) + ``num_samples`` x 1 (one-sided) or 2 (two-sided) times a
    step, on the same batch and with the same random draws (dropout); the global random state
    is then as after one evaluation. It may call ``zero_grad()`` and ``loss.backward()`` itself,
    or only return the loss. Buffers that it changes, such as batch-norm statistics, change with
    every evaluation.

    Args:
        params: tensors, named tensors or groups; see :func:`hybrid_param_groups`.
        lr: learning rate of groups that set none; number or one-element tensor.
        mode: "fo" or "zo", for groups that set none.
        momentum, dampening, nesterov: for FO groups, where ``fo_optimizer`` has them; left alone,
            its own defaults hold.
        weight_decay: L2 coefficient, both modes; 0 for any ``fo_optimizer``, whatever its own
            default.
        maximize: ascend instead, both modes.
        mu: perturbation step size, the paper's :math:`\mu`; ZO groups.
        estimator: "one_sided" (shares the FO evaluation, error O(mu)) or "two_sided" (central,
            error O(mu^2)).
        num_samples: number q of directions averaged in a step.
        distribution: "gaussian" or "rademacher".
        perturbation: "in_place" moves the weights and back, which rounds; "streamed" hands torch
            functions perturbed copies and writes weights in updates only. See the README on
            which to take.
        rounding: "stochastic" or "nearest", for updates of bf16 and fp16 ZO weights.
        nonfinite: "skip" turns a non-finite projected gradient into 0, without waiting for the
            device, and counts it in :attr:`skipped_steps`; where the first evaluation's loss is
            not finite the FO step is skipped too (off the CPU, where skipping would wait for
            the device, its gradients become 0: momentum and decay still act). "raise" restores
            the weights and raises ``FloatingPointError``.
        seed: of the directions, in [0, 2**64).
        backend: "auto", "triton", "cpu" or "reference"; see ``zofo_kernels``.
        capturable: keep the step counter on the device, so that a step captured in a CUDA graph
            takes new directions in every replay; also given to ``fo_optimizer`` where it has this
            option. Run a few steps before capturing, pass ``lr`` as a tensor if it is to change,
            and use no dropout.
        fo_optimizer: a torch optimizer class (or a callable like one) for the FO groups.
        **fo_options: further options of ``fo_optimizer``, such as ``betas``.

    Raises:
        TypeError, ValueError: an argument, option or parameter that cannot be used.

    Example:
        >>> optimizer = HybridZOFO(hybrid_param_groups(
        ...     model, zo=dict(lr=1e-6, mu=1e-3), fo=dict(lr=1e-3, momentum=0.9)))
        >>> for batch in loader:
        ...     optimizer.zero_grad()
        ...     loss = optimizer.step(lambda: model(**batch).loss)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        mode: str = "fo",
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        maximize: bool = False,
        mu: float = 1e-3,
        estimator: str = "two_sided",
        num_samples: int = 1,
        distribution: str = "gaussian",
        perturbation: str = "in_place",
        rounding: str = "stochastic",
        nonfinite: str = "skip",
        seed: int = 0,
        backend: str = "auto",
        capturable: bool = False,
        fo_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        **fo_options: Any,
    ) -> None:
        self._settings = Settings(
            estimator, num_samples, distribution, perturbation, rounding, nonfinite, backend
        )
        shared = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "capturable": capturable,
        }
        options, fo_defaults = first_order_options(fo_optimizer, shared, fo_options)
        if capturable and nonfinite == "raise":
            raise ValueError(
                "nonfinite must be 'skip' where capturable=True, as a captured step cannot raise"
            )
        self._capturable = capturable
        self._fo = FirstOrder(fo_optimizer, options)
        self._pending: Pending | None = None
        self._path: list[Move] = []  # since the last update
        self._monitor = Monitor()
        self._warned: set[str] = set()
        self._reset()
        check_mode(mode)
        check_seed(seed)
        check_mu(mu)
        self._zo_defaults = {name: shared[name] for name in ("lr", "weight_decay", "maximize")}
        zo_defaults = {"mode": mode, "mu": mu, "seed": seed, "zo_step": 0}
        super().__init__(params, {**self._zo_defaults, **fo_defaults, **zo_defaults})

    def _reset(self) -> None:
        """What a fresh or unpickled optimizer starts with; nothing here affects the path."""
        self._evaluating: str | None = None
        self._prepared: dict[int, Weights] = {}
        self._verified: list[Tensor] | None = None
        self._listeners: list[StepListener] = []
        self._counters = StepCounters()
        self._last_loss: Tensor | None = None
        self._projected_grads: Tensor | None = None

    # ---- groups and state -------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; as in torch, with ``mode``, ``mu`` and ``seed`` among its options.

        A new ZO group joins at the current step. Later ZO parameters get later noise indices.

        Raises:
            TypeError, ValueError: as in the constructor; nothing is added.
            RuntimeError: a journal is attached, and the group is zeroth-order.
        """
        given = dict(param_group) if isinstance(param_group, dict) else {}
        if isinstance(param_group, dict):
            if param_group.get("mode", self.defaults["mode"]) == "zo":
                if self.__dict__.get("_listeners"):
                    raise RuntimeError(
                        "a zeroth-order group cannot be added while a journal is attached; close "
                        "it, and begin a new one after"
                    )
                for name, value in self._zo_defaults.items():  # not what fo_optimizer made of them
                    param_group.setdefault(name, value)
        super().add_param_group(param_group)
        try:
            check_mode(param_group["mode"])
            for field in dataclasses.fields(Settings):
                if field.name in given:
                    raise ValueError(
                        f"{field.name} must be given to HybridZOFO, for all groups, "
                        f"got {given[field.name]!r} in a parameter group"
                    )
            if param_group["mode"] == "zo":
                check_zo_options(param_group, given, self.defaults)
                check_zo_parameters(self.zo_groups())
            else:
                self._fo.add(param_group, self.state)
        except BaseException:
            self.param_groups.pop()
            raise
        earlier = [g for g in self.param_groups[:-1] if g["mode"] == "zo"]
        if earlier and "zo_step" not in given:
            param_group["zo_step"] = int(earlier[0]["zo_step"])

    def zo_groups(self) -> list[ZOGroup]:
        """The zeroth-order groups with their noise indices, duplicates counted once."""
        result: list[ZOGroup] = []
        index = 0
        for group in self.param_groups:
            if group.get("mode") != "zo":
                continue
            params = list(dict.fromkeys(group["params"]))
            result.append(ZOGroup(self._weights(len(result), params, index), group))
            index += len(params)
        return result

    def _weights(self, position: int, params: list[Tensor], index: int) -> Weights:
        """Weights of the ZO group at ``position``, kept from step to step with their tables."""
        indices = list(range(index, index + len(params)))
        kept = self._prepared.get(position)
        if (
            kept is None
            or kept.indices != indices
            or any(a is not b for a, b in zip(kept.tensors, params, strict=True))
        ):
            kept = self._prepared[position] = Weights(params, indices)
        return kept

    def _fo_parameters(self) -> list[Tensor]:
        return [p for g in self.param_groups if g["mode"] == "fo" for p in g["params"]]

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the state of accumulation is in the first ZO group, or the first of all.

        Holds no gradients: save ``.grad`` too where first-order groups are in the midst of
        accumulating. Waits for the device where it accumulates or ``capturable=True``.
        """
        state = super().state_dict()
        zo = [group for group in state["param_groups"] if group.get("mode") == "zo"]
        for group in state["param_groups"]:
            if isinstance(group.get("zo_step"), Tensor):
                group["zo_step"] = int(group["zo_step"])
        for group in zo:
            group["zo_settings"] = self._settings.of_the_path()
        if self._pending is not None:
            (zo or state["param_groups"])[0]["zo_pending"] = self._pending.saved()
        if zo and self._path:
            zo[0]["zo_path"] = [[move.sample, list(move.scales)] for move in self._path]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the directions' seed and step, and accumulated coefficients, are restored.

        Warns where the state was saved by an optimizer with other settings: it then goes on along
        other directions.

        Raises:
            ValueError: the groups' number, sizes or modes differ.
        """
        super().load_state_dict(state_dict)
        self._pending = None  # belongs to the directions of the step that was left
        self._path.clear()
        settings: dict[str, Any] = {}
        for group in self.param_groups:
            saved = group.pop("zo_pending", None)
            if saved is not None:
                self._pending = Pending.loaded(saved, group["params"][0].device)
            settings = group.pop("zo_settings", settings)
            for sample, scales in group.pop("zo_path", ()):
                self._path.append(Move(sample, tuple(scales)))
        self._warn_about_settings(settings)
        for listener in self._listeners:
            listener.state_loaded()

    def __getstate__(self) -> dict[str, Any]:
        own = ["_settings", "_capturable", "_zo_defaults", "_fo"]
        own += ["_pending", "_path", "_monitor", "_warned"]
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        current = self.__dict__.get("param_groups")
        if current is not None:
            check_same_modes(current, state["param_groups"])
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("mode", "fo")  # a torch.optim state dict, see check_same_modes
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        if "_evaluating" not in self.__dict__:
            self._reset()
        self._fo.rebuild(self.param_groups, self.state)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}{self._settings}\nfo_optimizer: {self._fo.name}\n)"

    # ---- what a person logs -----------------------------------------------------------------

    @property
    def last_loss(self) -> Tensor | None:
        """Loss of the last evaluation of the unperturbed model, a detached 0-dim tensor.

        With ZO groups only and the two-sided estimator there is none; then the mean of the
        perturbed losses, which is the clean loss up to O(mu^2).
        """
        return self._last_loss

    @property
    def projected_grads(self) -> Tensor | None:
        """Projected gradients of the last estimate, shape (ZO groups, num_samples).

        Entry (g, s) is the slope along direction s as group g sees it; non-finite ones are 0.
        """
        return self._projected_grads

    @property
    def skipped_steps(self) -> int:
        """Estimates so far with a non-finite projected gradient. Waits for the device."""
        return self._monitor.skipped

    # ---- stepping ---------------------------------------------------------------------------

    def train(self) -> None:
        """Switch ``fo_optimizer`` to training, if it has modes, as schedule-free optimizers do."""
        self._fo.switch("train")

    def eval(self) -> None:
        """Switch ``fo_optimizer`` to evaluation, if it has modes."""
        self._fo.switch("eval")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear FO gradients and ZO coefficients; ignored in repeated evaluations of a step."""
        if self._evaluating == "repeat":
            return
        self._pending = None
        super().zero_grad(set_to_none)

    def backward(self, closure: Closure) -> Any:
        """Evaluate the closure, leave gradients in ``.grad`` and coefficients in the optimizer.

        Repeated calls accumulate, along the same directions; ``step()`` then applies the sum
        and ``zero_grad()`` clears it. Weights are as before when this returns or raises.

        Returns:
            What the closure returned in its first, unperturbed evaluation (``last_loss`` where
            there was none).

        Raises:
            TypeError, ValueError: the closure's result is no real scalar.
            FloatingPointError: ``nonfinite="raise"`` and a loss is not finite.
            RuntimeError: called from inside a closure.
        """
        with self._perturber() as perturber:
            return self._estimate(closure, perturber)

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """``backward(closure)``, then update all groups; without closure, only the update.

        Returns:
            As :meth:`backward`; None without closure.

        Raises:
            RuntimeError: no closure, and no ``backward(closure)`` since the last step.
            As :meth:`backward`; then no weight has changed.
        """
        returned = None
        before = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(False)
            with self._perturber() as perturber:
                if closure is not None:
                    returned = self._estimate(closure, perturber)
                elif self._pending is None:
                    raise RuntimeError(
                        "step() needs a closure that returns the loss: call step(closure), or "
                        "backward(closure) before step()"
                    )
                self._apply(perturber)
        finally:
            with uninterrupted():  # torch.no_grad() may leave gradients off after a Ctrl-C
                torch.set_grad_enabled(before)
        return returned

    def _perturber(self) -> Perturbation:
        if self._evaluating is not None:
            raise RuntimeError("a closure must not step the optimizer that is evaluating it")
        settings, groups = self._settings, self.zo_groups()
        for group in groups:  # now, as in the midst of a step some groups would have moved
            check_step_options(group.options)
        if self._capturable:
            self._counters.attach(groups)
        elif groups and capturing():
            raise RuntimeError(
                "every replay of a CUDA graph would perturb along the same direction; construct "
                "HybridZOFO with capturable=True to capture its steps"
            )
        streamed = settings.perturbation == "streamed"
        kind = StreamedPerturbation if streamed else InPlacePerturbation
        return kind(groups, settings.distribution, settings.backend, self._path)

    def _estimate(self, closure: Closure, perturber: Perturbation) -> Any:
        """Evaluate at all points and add to what is pending; leaves the weights displaced."""
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        groups = perturber.groups
        estimator = ESTIMATORS[self._settings.estimator]
        first_order = self._fo_parameters()
        self._warn_unused_gradients(groups, first_order)
        devices = {p.device for g in self.param_groups for p in g["params"]}
        once = not groups  # then there are no draws to repeat
        before, after = None if once else GlobalRandomState(devices), None

        def run(gradients: bool) -> Evaluation:
            nonlocal after
            try:
                self._evaluating = "first" if after is None else "repeat"
                if before is not None and after is not None:
                    before.restore()
                with perturber.evaluating():
                    result = evaluate(closure, gradients=gradients)
            finally:
                self._evaluating = None
            if not once:
                after = after or GlobalRandomState(devices)
            return result

        clean: Evaluation | None = None
        slopes: list[Tensor] = []
        points: list[Evaluation] = []
        try:
            if first_order or estimator.needs_clean or not groups:
                clean = run(gradients=bool(first_order))
            with gradients_aside(first_order):
                for sample in range(self._settings.num_samples if groups else 0):
                    for sign in estimator.signs:
                        perturber.move(sample, sign)
                        points.append(run(gradients=False))
                        if isinstance(perturber, StreamedPerturbation):
                            self._verify(perturber, run, points[-1].loss)
                    losses = [point.loss for point in points[-len(estimator.signs) :]]
                    slopes.append(estimator.slope(losses, clean.loss if clean else None))
        finally:
            if after is not None:
                after.restore()
        self._warn_about_losses([clean, *points], groups, first_order)
        if groups:
            every = torch.stack([e.loss for e in (clean, *points) if e is not None])
            flat = (every == every[0]).all()
            self._collect(groups, torch.stack(slopes), clean.loss if clean else None, flat)
        else:
            self._pending = self._pending or Pending()
        if clean is not None:
            self._last_loss = clean.loss
            return clean.returned
        self._last_loss = torch.stack([point.loss for point in points]).mean()
        number = not isinstance(points[0].returned, Tensor)
        return self._last_loss.item() if number else self._last_loss

    def _verify(
        self, perturber: StreamedPerturbation, run: Callable[..., Evaluation], loss: Tensor
    ) -> None:
        """Once for every set of ZO parameters: streaming reaches all that the loss depends on."""
        parameters = [p for group in perturber.groups for p in group.params]
        if self._verified is not None and len(self._verified) == len(parameters):
            if all(a is b for a, b in zip(self._verified, parameters, strict=True)):
                return
        if not loss.isfinite():  # that tells nothing
            return
        if not perturber.verify(lambda: run(gradients=False).loss, loss):
            self._warn_once(
                "not verified",
                "closure gave two losses at the same point, so it cannot be verified that "
                "perturbation='streamed' reaches every use of the zeroth-order parameters; it "
                "must use the same batch whenever it is called",
            )
        self._verified = parameters

    def _collect(
        self, groups: list[ZOGroup], slope: Tensor, clean: Tensor | None, flat: Tensor
    ) -> None:
        """Turn slopes into coefficients per group, drop non-finite ones, accumulate.

        A clean loss that is not finite voids the whole estimate.
        """
        estimates = torch.stack([slope / group.mu for group in groups])
        finite = estimates.isfinite()
        clean_finite = None if clean is None else clean.isfinite()
        if clean_finite is not None:
            finite = finite & clean_finite
        if self._settings.nonfinite == "raise" and not finite.all():
            raise FloatingPointError(
                "closure must return finite losses (nonfinite='raise'), got clean loss "
                f"{None if clean is None else clean.item()} and differences {slope.tolist()}"
            )
        self._projected_grads = torch.where(finite, estimates, 0.0)
        self._monitor.record(finite.all(), flat)
        self._monitor.warn_if_flat(lambda: [name for group in groups for name in group.names])
        self._pending = self._pending or Pending()
        self._pending.add(
            self._projected_grads / self._settings.num_samples, finite.any(), clean_finite
        )

    def _apply(self, perturber: Perturbation) -> None:
        """FO step first: if it raises, the perturber still restores the ZO weights."""
        pending = self._pending
        assert pending is not None
        coefficients = [] if pending.coefficients is None else list(pending.coefficients)
        # all that can fail for want of memory comes before any weight changes; a ZO group that was
        # added after backward() has no coefficients
        prepared = [
            perturber.prepare(position, values, pending.gate(group.options["lr"]))
            for position, (group, values) in enumerate(
                zip(perturber.groups, coefficients, strict=False)
            )
        ]
        with uninterrupted():
            if pending.first_order_is_healthy(self._fo_parameters()):
                self._fo.step()
            for position, update in enumerate(prepared):
                perturber.update(position, update, self._settings.rounding)
            for group in perturber.groups:
                group.options["zo_step"] += 1
            self._pending = None
            self._path.clear()
            for listener in self._listeners:
                listener.stepped(prepared)

    # ---- warnings ---------------------------------------------------------------------------

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=caller_level())

    def _warn_about_settings(self, saved: dict[str, Any]) -> None:
        ours = self._settings.of_the_path()
        others = [
            f"{name}={value!r} (here {ours[name]!r})"
            for name, value in saved.items()
            if name in ours and value != ours[name]
        ]
        if others:
            warnings.warn(
                "state_dict was saved by an optimizer constructed with "
                + ", ".join(others)
                + "; the same path is followed only with the same settings",
                stacklevel=caller_level(),
            )

    def _warn_about_losses(
        self,
        evaluations: list[Evaluation | None],
        groups: list[ZOGroup],
        first_order: list[Tensor],
    ) -> None:
        first = evaluations[0]
        if first is not None and not first.backpropagated:
            if any(p.requires_grad for p in first_order):
                self._warn_once(
                    "no backward",
                    "closure returned a loss without a graph and did not call backward, so the "
                    "first-order groups got no gradients; return the loss tensor itself",
                )
        for evaluation in evaluations:
            dtype = getattr(evaluation and evaluation.returned, "dtype", None)
            if groups and dtype in (torch.float16, torch.bfloat16):
                self._warn_once(
                    "16-bit loss",
                    f"closure returned a loss of dtype {dtype}: differences of 16-bit losses "
                    "cancel, and the zeroth-order estimate is mostly noise; compute the loss in "
                    "float32, for example loss_fn(logits.float(), labels)",
                )

    def _warn_unused_gradients(self, groups: list[ZOGroup], first_order: list[Tensor]) -> None:
        if first_order and any(p.requires_grad for group in groups for p in group.params):
            names = [
                name
                for group in groups
                for p, name in zip(group.params, group.names, strict=True)
                if p.requires_grad
            ]
            self._warn_once(
                "requires_grad",
                f"{len(names)} zeroth-order parameters have requires_grad=True, so the "
                "first-order backward computes gradients for them that nothing uses; freeze "
                "them with requires_grad_(False): " + ", ".join(names),
            )
