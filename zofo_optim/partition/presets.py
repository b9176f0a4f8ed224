"""Settings of published methods, for what takes them here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .budgets import kind_of, parse_budget


class HiZFO(NamedTuple):
    """Options by the argument that takes them; see :func:`hi_zfo`."""

    zo: dict[str, Any]
    """``zo=`` of :func:`importance_partition` and of HybridTrainer."""
    fo: dict[str, Any]
    """``fo=`` of :func:`importance_partition`; a Trainer's arguments have ``learning_rate``."""
    partition: dict[str, Any]
    """All further options of :func:`importance_partition`, ``fo_optimizer`` among them."""
    trainer: dict[str, Any]
    """``partition=`` of HybridTrainer, which has the optimizer from its arguments."""
    hybrid: dict[str, Any]
    """Options of :class:`zofo_optim.HybridZOFO`, or ``hybrid=`` of HybridTrainer."""


def hi_zfo(
    budget: float | int | str = 0.6,
    *,
    lr: float = 2e-5,
    ratio: float = 0.1,
    mu: float = 1e-3,
    coupling: float = 0.1,
) -> HiZFO:
    """The settings of Hi-ZFO (Jin, Tan, ACL Findings 2026) for language models of 1 B to 7 B.

    AdamW for what the budget of FLOPs reaches, one-sided zeroth order for the rest, and the
    perturbed loss's gradient in the first-order update too.

    Args:
        budget: share of full back-propagation's FLOPs; or bytes of memory, such as "12GB".
        lr: of the first-order tensors.
        ratio: the zeroth-order learning rate over ``lr``. The paper finds 0.1 to 0.5 stable, and
            a collapse at 0.7.
        mu: perturbation step size.
        coupling: weight of the perturbed loss's gradient; without it, 0, the paper's ROUGE falls
            from 26.7 by 3.6.

    Raises:
        TypeError, ValueError: ``budget`` is no such share or number of bytes.

    Example:
        >>> preset = hi_zfo(budget=0.6)
        >>> groups, partition = importance_partition(
        ...     model,
        ...     lambda: model(**batch).loss,
        ...     zo=preset.zo,
        ...     fo=preset.fo,
        ...     **preset.partition,
        ... )
        >>> optimizer = HybridZOFO(groups, **preset.hybrid)
    """
    of = kind_of(budget)
    parse_budget(budget, of)
    chosen: dict[str, Any] = dict(budget=budget, of=of, policy="importance")
    first_order = dict(fo_optimizer=torch.optim.AdamW, coupling=coupling)
    return HiZFO(
        zo=dict(lr=ratio * lr, mu=mu),
        fo=dict(lr=lr),
        partition={**chosen, **first_order},
        trainer=chosen,
        hybrid=dict(estimator="one_sided", **first_order),
    )
