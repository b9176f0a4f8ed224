"""Making a partition: candidates, costs, importances, and a policy's choice within the budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..buffers import ParamGroups
from ..checks import caller_level, check_seed
from ..costs import Costs, TensorCost, costs_of
from ..evaluation import Closure
from ..groups import check_module, options_of
from ..names import patterns_in
from ..plain import plain
from ..settings import check_coupling
from ..zeroth_order import ZerothOrder
from .budgets import parse_budget
from .candidates import adapters, candidates_in, reasons_against
from .choosing import chosen_within, peak_of
from .importance import Profile, profile_of
from .partition import Partition, Row
from .policies import POLICIES, Problem
from .trial_step import TrialStep


def importance_partition(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    zo: Mapping[str, Any] | None = None,
    fo: Mapping[str, Any] | None = None,
    *,
    budget: float | int | str = 0.6,
    of: str = "flops",
    policy: str = "importance",
    fo_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
    optimizer_in_backward: bool = False,
    coupling: float | bool = 0.0,
    candidates: Collection[str] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    directions: str = "shared",
    seed: int = 0,
    verbose: bool = True,
) -> tuple[ParamGroups, Partition]:
    """Choose the tensors that train first-order within a budget; the rest is zeroth-order.

    Hi-ZFO's partition (Jin, Tan, ACL Findings 2026), by the tensor selection of GreenTrainer
    (Huang et al. 2024): the sum of importances is the largest that the budget allows. An
    importance is the decrease of the loss, to first order, that a tensor's first step brings.
    Candidates are the parameters with ``requires_grad=True``, or all where none has. Candidates
    that are not chosen, and all that is frozen, are zeroth-order by the rules of
    :func:`zofo_optim.hybrid_param_groups`; so are, with a warning, candidates that the first
    closure's loss does not depend on, such as an expert that its batch does not reach. Frozen are
    those that ``exclude`` matches or these rules leave out: they take no gradient.

    The closure runs once forward for the costs; then, where the policy asks for importances,
    forward and backward once a batch, in the memory of all activations, but of one gradient. Where
    this is too much, take ``policy="last_layers"``, which takes no gradients. Weights, gradients,
    buffers and random generators are then as before; first-order tensors require gradients, and
    frozen ones do not.

    Args:
        model: any module; call this after peft has wrapped it.
        closure: returns the loss of a batch, the same one each time, as it runs more than once; or
            several closures, one a batch, whose importances are averaged. Costs are those of the
            first.
        zo: options of the ZO group, such as ``dict(lr=2e-6, mu=1e-3)``.
        fo: options of the FO group, such as ``dict(lr=2e-5)``; the trial steps have them.
        budget: with ``of="flops"`` a share of the FLOPs of full back-propagation, forward not
            counted, as 0.6 or "60%". With ``of="memory"`` a share of what full first-order training
            takes beyond inference (gradients, optimizer state, activations), or bytes in all,
            weights included: "12GB", "800MiB", or an int.
        of: "flops" or "memory".
        policy: "importance" solves the dynamic programme. "gradient_norm" does so with gradients'
            norms for importances. "top_k" takes the most important tensors that fit, in turn.
            "last_layers" goes from the loss down while the budget lasts. "random" draws by
            ``seed``. "adapters" takes peft's tensors of whole layers, from the loss down.
        fo_optimizer: what HybridZOFO will be given: a torch optimizer class.
        optimizer_in_backward: HybridZOFO's option: gradients are applied and freed as they come, so
            that the memory of one counts.
        coupling: HybridZOFO's option: where it is not 0, the peak has the second backward in it.
        candidates: names of the parameters that may train first-order; others that require
            gradients are zeroth-order like frozen ones. Default: those of the model's last
            partition, where ``requires_grad`` was not set since; else see above. A copy of a model
            remembers none: give it ``[row.name for row in partition.rows if row.candidate]``.
        include, exclude: what may train by zeroth order, as in ``hybrid_param_groups``; what
            ``exclude`` matches is no candidate either.
        directions: those of the optimizer, likewise.
        seed: of "random".
        verbose: print the totals.

    Returns:
        Groups for :class:`zofo_optim.HybridZOFO`, and the :class:`Partition`.

    Raises:
        TypeError: ``model``, ``closure``, ``budget`` or options are of the wrong kind; or the
            closure gives no loss with a graph.
        ValueError: an argument has no such value, the budget is too small for any tensor (the
            least is said), costs cannot be counted (see :func:`costs_of`), or as
            ``hybrid_param_groups``.
        FloatingPointError: a gradient is not finite.

    Example:
        >>> groups, partition = importance_partition(
        ...     model,
        ...     lambda: model(**batch).loss,
        ...     zo=dict(lr=2e-6),
        ...     fo=dict(lr=2e-5),
        ...     budget=0.6,
        ...     fo_optimizer=torch.optim.AdamW,
        ... )
        >>> optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW, estimator="one_sided")
        >>> print(partition)
    """
    options_of("zo", zo)
    partition = make_partition(
        model,
        closure,
        fo,
        budget=budget,
        of=of,
        policy=policy,
        fo_optimizer=fo_optimizer,
        optimizer_in_backward=optimizer_in_backward,
        coupling=coupling,
        candidates=candidates,
        include=include,
        exclude=exclude,
        directions=directions,
        seed=seed,
        verbose=verbose,
    )
    return partition.groups(model, zo, fo, verbose=verbose), partition


def make_partition(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    fo: Mapping[str, Any] | None = None,
    *,
    budget: float | int | str = 0.6,
    of: str = "flops",
    policy: str = "importance",
    fo_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
    optimizer_in_backward: bool = False,
    coupling: float | bool = 0.0,
    candidates: Collection[str] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    directions: str = "shared",
    seed: int = 0,
    verbose: bool = True,
) -> Partition:
    """The partition of :func:`importance_partition` alone; the model stays as it is.

    It may be on the meta device, with a closure that feeds it meta tensors, and then needs no
    memory: what would train, and what that would cost. Such a plan needs a policy that takes no
    gradients ("last_layers", "random" or "adapters").

    Args:
        model, closure, fo, budget, of, policy, fo_optimizer, optimizer_in_backward, coupling:
            see :func:`importance_partition`.
        candidates, include, exclude, directions, seed, verbose: likewise.

    Raises:
        TypeError, ValueError, FloatingPointError: likewise.

    Example:
        >>> plan = make_partition(
        ...     model, lambda: model(**batch).loss, budget="60%", of="memory", policy="last_layers"
        ... )
        >>> groups = plan.groups(model, zo=dict(lr=1e-6), fo=dict(lr=1e-3))
    """
    check_module(model)
    closures = _closures(closure)
    options = options_of("fo", fo)
    parse_budget(budget, of)
    check_coupling(coupling)
    if coupling and optimizer_in_backward:
        raise ValueError(
            f"coupling must be 0 where optimizer_in_backward=True, got {coupling!r}: gradients are "
            "freed before others could be added to them"
        )
    check_seed(seed)
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {tuple(POLICIES)}, got {policy!r}")
    rules = ZerothOrder(model, include, exclude, directions, without_data=True)
    tensors, excluded, others = candidates_in(model, rules, candidates)
    why = reasons_against(model, rules, others)  # raises before anything is profiled
    step = TrialStep(fo_optimizer, options)
    costs = costs_of(model, closures[0], tensors, fo_optimizer=fo_optimizer, fo=step.options)
    used = {t.name: tensors[t.name] for t in costs.tensors}
    profile = Profile({}, {})
    if POLICIES[policy].needs_profile:
        if any(p.is_meta for p in model.parameters()):
            raise ValueError(
                f"policy must be one that takes no gradients for a model on the meta device, got "
                f"{policy!r}; load the weights, or take 'last_layers', 'random' or 'adapters'"
            )
        profile = profile_of(model, closures, used, step)
    problem = Problem(
        costs,
        of,
        limit=0,
        in_backward=optimizer_in_backward,
        importance=profile.importance,
        gradient_norm=profile.gradient_norm,
        adapters=adapters(model),
        seed=seed,
        coupling=coupling != 0,
    )
    chosen = chosen_within(problem, policy, budget)
    why |= reasons_against(model, rules, set(tensors).difference(chosen), used)
    why |= dict.fromkeys(excluded, "excluded")
    rows = [_row(t, tensors, profile, chosen, why, costs) for t in costs.tensors]
    rows += [_bare_row(name, tensors[name], why) for name in costs.unused]
    rows += [_bare_row(name, p, why) for name, p in excluded.items()]
    rows += [_bare_row(name, p, why, candidate=False) for name, p in others.items()]
    every = [t.name for t in costs.tensors]
    partition = Partition(
        rows=tuple(rows),
        policy=policy,
        of=of,
        budget=plain(budget),
        flops=costs.flops(chosen),
        full_flops=costs.flops(every),
        forward_flops=costs.forward_flops,
        bytes=costs.bytes(chosen, in_backward=optimizer_in_backward),
        full_bytes=costs.bytes(every, in_backward=optimizer_in_backward),
        peak=peak_of(problem, chosen) if of == "memory" else None,
        in_backward=optimizer_in_backward,
        include=tuple(patterns_in("include", include)),
        exclude=tuple(patterns_in("exclude", exclude)),
        directions=directions,
    )
    if costs.unused:
        some = ", ".join(map(repr, costs.unused[:3])) + ", ..." * (len(costs.unused) > 3)
        warnings.warn(
            f"{len(costs.unused)} tensors cannot be first-order, since the first closure's loss "
            f"does not depend on them: {some}; if other batches use them, let its batch do so too",
            stacklevel=caller_level(),
        )
    if verbose:
        print(partition.summary())
    return partition


def _closures(closure: Any) -> list[Closure]:
    found = [closure] if callable(closure) else closure
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(map(callable, found)):
        raise TypeError(
            f"closure must be a function that returns the loss, or a sequence of such, got "
            f"{type(closure).__name__}"
        )
    if not found:
        raise ValueError("closure must be a function or a sequence of at least one, got none")
    return list(found)


def _row(
    tensor: TensorCost,
    candidates: Mapping[str, Tensor],
    profile: Profile,
    chosen: Collection[str],
    frozen: Mapping[str, str],
    costs: Costs,
) -> Row:
    name = tensor.name
    mode = "fo" if name in chosen else "frozen" if name in frozen else "zo"
    first = next((t.name for t in costs.tensors if t.input == tensor.input), name)
    shared = tensor.input_bytes if tensor.input is not None and first == name else 0
    own = tensor.own_bytes + tensor.gradient_bytes + tensor.state_bytes
    return Row(
        name=name,
        shape=tuple(candidates[name].shape),
        mode=mode,
        importance=profile.importance.get(name),
        gradient_norm=profile.gradient_norm.get(name),
        flops=tensor.weight_flops + tensor.path_flops,
        bytes=own + shared + tensor.path_bytes,
        why=frozen.get(name, ""),
    )


def _bare_row(name: str, tensor: Tensor, why: Mapping[str, str], *, candidate: bool = True) -> Row:
    """Of a tensor without costs, which is not first-order."""
    mode, reason = ("frozen", why[name]) if name in why else ("zo", "")
    return Row(name, tuple(tensor.shape), mode, None, None, 0, 0, reason, candidate)
