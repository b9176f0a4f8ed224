"""HybridZOFO: one torch optimizer for a zeroth-order base model and a first-order adapter.

A step flows one way: points -> evaluations -> losses -> estimate -> updates -> weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zofo_kernels import NOISE_VERSION
from zofo_kernels._torch_compat import making_optimizer_state, uncompiled

from .advice import NO_ESTIMATE
from .buffers import Modules, model_of, module_of, scales_among
from .checks import check_kinds, check_zo_defaults
from .defaults import default, value_of
from .estimate import Estimate
from .evaluating import Evaluating
from .evaluation import Closure
from .first_order import FirstOrder, first_order_options
from .frameworks import unless_empty
from .in_backward import REFUSED
from .modes import undisturbed
from .perturbation import Perturbation
from .plain import plain
from .rule_states import keep
from .rules import Rule
from .settings import SETTINGS, Settings


class HybridZOFO(Evaluating):
    """Hybrid zeroth- and first-order optimisation (Ma, Yu, Huang, ICLR 2026, Algorithm 1).

    Groups with ``mode="fo"`` are stepped by ``fo_optimizer``, ``torch.optim.SGD`` by default.
    Groups with ``mode="zo"`` follow

        x <- x - lr ((1/q) sum_s c_s v_s + weight_decay x)

    with random directions v_s regenerated from a seed and slopes c_s (projected gradients) from
    evaluations of the closure under ``no_grad``: no backward, no gradients and no optimizer state
    for x. Both estimates are taken at the same (x, y).

    With FO groups only this is ``fo_optimizer`` itself, bit for bit (a closure is required);
    with ZO groups only it is MeZO (Malladi et al. 2023).

    A closure is evaluated 1 (FO) + ``num_samples`` x 1 (one-sided) or 2 (two-sided) times a
    step, on the same batch and with the same random draws (dropout); the global random state
    is then as after one evaluation. It may call ``zero_grad()`` and ``loss.backward()`` itself,
    or only return the loss.

    Args:
        params: tensors, named tensors or groups; see :func:`hybrid_param_groups`.
        lr: learning rate of groups that set none; number or one-element tensor. No default serves
            ZO groups: theirs is given here or in the group.
        mode: "fo" or "zo", for groups that set none.
        momentum, dampening, nesterov: for FO groups; left alone, ``fo_optimizer``'s own hold.
        weight_decay: L2 coefficient, both modes; 0 also where ``fo_optimizer`` has another default.
        maximize: ascend instead, both modes.
        mu: perturbation step size, the paper's μ; ZO groups. A ZO group may set ``unit``, the size
            of its weights that its ``mu`` and ``lr`` count in: default 1.
        estimator: "one_sided" (shares the FO evaluation, error O(mu)), "two_sided" (central, error
            O(mu^2)), or "antithetic": two-sided in one evaluation, by pairs of examples.
        num_samples: number q of directions averaged in a step.
        distribution: "gaussian" or "rademacher".
        structure, rank: directions are "full", or "low_rank": U V^T / sqrt(rank) for each matrix.
        directions, examples_per_direction: "shared", or "per_example": one for each example, or so
            many in a row; the closure returns losses, shape (B,). Needs low rank, streamed.
        active: what a step moves: all (None), a fraction of the tensors, drawn anew in each step,
            patterns of names, a :class:`Draw` or a :class:`Cycle`. The rest is left as it is.
        coupling: weight of the mean perturbed loss beside the clean one, in what FO groups
            descend (Jin and Tan 2026): each perturbed evaluation is back-propagated too.
        perturbation: "in_place" moves the weights and back, which rounds; "streamed" hands torch
            functions perturbed copies and writes weights in updates only.
        zo_rule: what an update makes of the slopes: "sgd", "normalized", "clip", "sign", "zscore",
            "centered_rank", or a :class:`Rule` with options of its own.
        rounding: "stochastic" or "nearest", for updates of bf16 and fp16 ZO weights.
        nonfinite: "skip" turns a non-finite projected gradient into 0, without waiting for the
            device, and counts it in :attr:`skipped_steps`; where the first evaluation's loss is
            not finite the FO step is skipped too (off the CPU, where skipping would wait for
            the device, its gradients become 0: momentum and decay still act). "raise" restores
            the weights and raises ``FloatingPointError``.
        seed: of the directions, in [0, 2**64).
        noise_version: of the noise's definition. 2 perturbs 16-bit weights that are spaced widely
            for ``mu``, such as layer norms around 1, without bias; 1 loses most of their
            displacements, and goes on where an earlier version of the library began.
        backend: "auto", "triton", "cpu" or "reference"; see ``zofo_kernels``.
        restore_buffers: buffers that a closure changes, such as batch-norm statistics, change
            once a step: those of the model that :func:`hybrid_param_groups` was given (True), of
            the module given here, or none (False). ``copy.deepcopy((model, optimizer))`` restores
            those of the copied model; optimizers that are copied without it, or before it, and
            unpickled ones restore none.
            A module given here is also taken for the model whose layers gather FSDP2's shards,
            where ``params`` are not of :func:`hybrid_param_groups`.
        capturable: keep the step counter on the device, so that replays of a CUDA graph take new
            directions; also given to ``fo_optimizer`` where it has this option. Run a few steps
            before capturing, pass ``lr`` as a tensor if it is to change, and use no dropout.
        optimizer_in_backward: apply each FO gradient as it comes in the backward, and free it;
            such a step has no FO gradients to accumulate, clip, couple or skip: call
            ``step(closure)``, with ``nonfinite="raise"``. The first step takes an evaluation with
            gradients more; a backward that raises leaves what it has updated by then.
        process_group: the processes that train the model together: all of ``torch.distributed``
            where it is initialised at the first step (None), or those of a group.
        parallel: "data": they evaluate the same directions, each on its own batch, and losses are
            averaged; "samples": each evaluates its part of ``num_samples`` (streamed only). Those
            of examples (``directions="per_example"``) are each process's own.
        example_order: of those, in the step: "interleaved", example j of process r of k is number
            j k + r, as ``DistributedSampler`` deals; "contiguous", one process's after another's.
        check_ranks_every: steps between comparisons of the processes' weights; 0: never.
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
        lr: float | Tensor = default(1e-3),
        *,
        mode: str = "fo",
        momentum: float = default(0),
        dampening: float = default(0),
        weight_decay: float = default(0),
        nesterov: bool = default(False),
        maximize: bool = default(False),
        mu: float = 1e-3,
        estimator: str = "two_sided",
        num_samples: int = 1,
        distribution: str = "gaussian",
        structure: str = "full",
        rank: int = 1,
        directions: str = "shared",
        examples_per_direction: int = 1,
        active: Any = None,
        coupling: float = 0.0,
        perturbation: str = "in_place",
        zo_rule: str | Rule = "sgd",
        rounding: str = "stochastic",
        nonfinite: str = "skip",
        seed: int = 0,
        noise_version: int = NOISE_VERSION,
        backend: str = "auto",
        restore_buffers: bool | torch.nn.Module = True,
        capturable: bool = default(False),
        optimizer_in_backward: bool = False,
        process_group: Any = None,
        parallel: str = "data",
        example_order: str = "interleaved",
        check_ranks_every: int = 100,
        fo_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        **fo_options: Any,
    ) -> None:
        chosen = {name: value for name, value in locals().items() if name in SETTINGS}
        shared = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        shared.update(nesterov=nesterov, maximize=maximize, capturable=capturable)
        check_kinds(shared := plain(shared))
        settings = Settings(**{**plain(chosen), "capturable": value_of(shared["capturable"])})
        options = first_order_options(fo_optimizer, shared, plain(fo_options))
        first_order = FirstOrder(fo_optimizer, *options)
        if settings.optimizer_in_backward:
            first_order.check_steps_one()
        zo_defaults = plain({"mode": mode, "mu": mu, "seed": seed, "zo_step": 0})
        check_zo_defaults(zo_defaults)
        zo_shared = {name: shared[name] for name in ("lr", "weight_decay", "maximize")}
        super().__init__(params, settings, first_order, zo_shared, zo_defaults)
        self._process_group = process_group
        model = model_of(params, plain(restore_buffers))
        self._know(Modules(model, module_of(params, plain(restore_buffers))))
        self._perturbation.scales = scales_among(
            params, model, self.param_groups, settings.perturbation
        )

    # ---- a step: read from here down ----------------------------------------------------------

    @uncompiled
    def step(self, closure: Closure | None = None, weight: float | None = None) -> Any:  # type: ignore[override]
        """``backward(closure, weight)``, then update all; without closure, only the update.

        Returns:
            As :meth:`backward`; None without closure, or where Lightning skips the batch.

        Raises:
            RuntimeError: no closure, and no ``backward(closure)`` since the last step.
            TypeError, ValueError, FloatingPointError: as :meth:`backward`; then no weight has
                changed, but with ``optimizer_in_backward`` first-order ones whose gradients came.
        """
        returned = None
        closure = unless_empty(closure)
        with undisturbed(), self._at_rest() as perturbation:
            if closure is not None:
                returned = self._add_estimate(closure, perturbation, weight)
            if self._estimate is not None or closure is None:
                self._apply(perturbation)
        return returned

    @uncompiled
    def backward(self, closure: Closure, weight: float | None = None) -> Any:
        """Evaluate the closure, leave gradients in ``.grad`` and coefficients in the optimizer.

        Repeated calls accumulate, along the same directions; ``step()`` then applies the sum
        and ``zero_grad()`` clears it. Weights are as before when this returns or raises.

        Args:
            closure: returns the loss; see the class.
            weight: of this process's mean loss among those of all, such as its number of examples
                or tokens; None: all count alike. Given, it is given in every process.

        Returns:
            What the closure returned in its first, unperturbed evaluation (``last_loss`` where
            there was none).

        Raises:
            TypeError, ValueError: the closure's result is no real scalar.
            FloatingPointError: ``nonfinite="raise"`` and a loss is not finite.
            RuntimeError: called from inside a closure, or ``optimizer_in_backward=True``.
        """
        if self._settings.optimizer_in_backward:
            raise RuntimeError(REFUSED)
        with undisturbed(), self._at_rest() as perturbation:
            return self._add_estimate(closure, perturbation, weight)

    def _add_estimate(
        self, closure: Closure, perturbation: Perturbation, weight: float | None
    ) -> Any:
        """Evaluate at all points and add to the estimate; leaves the weights displaced."""
        groups = perturbation.groups
        first_order = [p for g in self.param_groups if g["mode"] == "fo" for p in g["params"]]
        self._advice.about_groups(groups, first_order, self._fo.options, self._settings.coupling)
        share = self._share(weight, groups)
        points, evaluations = self._evaluated(closure, perturbation, first_order, share)
        if not evaluations:  # the closure skips the batch
            return None
        self._advice.about_losses(evaluations, groups, first_order)
        if not groups:
            self._monitor.add(evaluations[0].loss.mean(), None, self._estimate is not None)
            self._estimate = self._estimate or Estimate()
            return evaluations[0].returned
        losses = torch.stack([e.loss for e in evaluations])
        estimated = self._take(points, losses, groups, share)
        if points[0].sign == 0:
            return evaluations[0].returned
        number = not isinstance(evaluations[0].returned, Tensor)
        return estimated.loss.item() if number else estimated.loss

    def _apply(self, perturbation: Perturbation) -> None:
        """The FO step first: if it raises, the perturbation still restores the ZO weights."""
        estimate, groups = self._estimate, perturbation.groups
        self._fo.follow(self.param_groups, self.state)
        if making_optimizer_state():
            self._fo.step()  # by zero gradients; the estimate waits
            return
        if estimate is None:
            raise RuntimeError(NO_ESTIMATE)
        # what can fail for lack of memory comes before any weight changes
        settings = self._settings
        updates, states = estimate.updates(groups, settings.rule)
        if estimate.first_order_is_healthy(self._fo.parameters()):
            self._fo.step()
        perturbation.update(updates)
        keep(groups, states)
        if self._settings.capturable:
            updates = [update.frozen() for update in updates]
        for group in groups:
            group.options["zo_step"] += 1
        self._estimate = None
        self._listeners.updated(updates)
