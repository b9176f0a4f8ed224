"""Finding the costs of a model's first-order training; :mod:`.costs` says how they are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..buffers import Buffers
from ..evaluation import GlobalRandomState
from .by_tensor import shared_inputs, split
from .candidates import candidates_of, requiring
from .costs import Costs, TensorCost
from .counting import Kept, count
from .recorded import Trace
from .sets import members, summed, union
from .step import Step
from .trace import trace
from .trial import Trials


@torch.inference_mode(False)  # its caller's would leave no graph
def costs_of(
    model: nn.Module,
    closure: Callable[[], Any],
    parameters: Mapping[str, Tensor] | None = None,
    *,
    fo_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
    fo: Mapping[str, Any] | None = None,
) -> Costs:
    """Costs of first-order training of any of a model's tensors.

    The closure runs forward once; it keeps no activations and runs no backward. A model on the
    meta device, and a closure that feeds it meta tensors, serve as well. Weights, ``.grad``,
    ``requires_grad``, buffers and random generators are afterwards as before.

    Args:
        model: the module whose tensors train.
        closure: returns the loss, a scalar or losses of shape (B,), which are averaged; it may
            call backward itself.
        parameters: candidates for first-order training, by name; default: parameters with
            ``requires_grad=True``, or all of floating point where none has. Tied ones count once.
        fo_optimizer: the first-order optimizer's class.
        fo: options for its constructor.

    Returns:
        The costs, by tensor and for any set.

    Raises:
        TypeError: ``model`` is no module, a candidate is no leaf of real numbers, or the closure
            gives no tensor.
        ValueError: there is no candidate, none reaches the loss, or the closure does what cannot
            be counted: gradient checkpointing, compiled modules, custom autograd functions.

    Example:
        >>> costs = costs_of(model, lambda: model(**batch).loss)
        >>> share = costs.flops([costs.tensors[0].name]) / costs.flops(
        ...     [tensor.name for tensor in costs.tensors]
        ... )
    """
    candidates = candidates_of(model, parameters)
    present = {id(t): t for t in (*model.parameters(), *model.buffers(), *candidates.values())}
    storages = {id(s): s for s in (t.untyped_storage() for t in present.values())}
    devices = {t.device for t in present.values()}
    options = dict(fo or {})
    trials = Trials(fo_optimizer, options)
    random = GlobalRandomState(devices)
    try:
        with requiring(model, candidates), Buffers(model).as_before():
            recorded = trace(closure, candidates)
            if not recorded.order:
                raise ValueError(
                    "closure must return a loss that depends on a candidate, got one that "
                    "depends on none; does it use this model?"
                )
        memory = {name: trials.of(candidates[name]) for name in recorded.order}
    finally:
        random.restore()
    together = any(d.type == "cuda" for d in devices) and not options.get("fused")
    step = Step(recorded, memory, together and options.get("foreach") is not False)
    names = recorded.order[::-1]
    counted = count(recorded)
    flops = summed((_by_depth(recorded, mask), amount) for mask, amount in counted.flops.items())
    kept = [
        Kept(item.nbytes, frozenset(_by_depth(recorded, mask) for mask in item.masks))
        for item in counted.kept
    ]
    inputs, rest = shared_inputs(kept, len(names))
    of_flops = split(flops, len(names))
    of_bytes = split(_whole(rest), len(names))
    tensors = tuple(
        TensorCost(
            name=name,
            numel=candidates[name].numel(),
            weight_flops=of_flops.own[k],
            path_flops=of_flops.path[k],
            gradient_bytes=candidates[name].numel() * candidates[name].element_size(),
            state_bytes=memory[name].state,
            path_bytes=of_bytes.path[k],
            own_bytes=of_bytes.own[k],
            input_bytes=inputs.nbytes[k],
            input=inputs.numbers[k],
        )
        for k, name in enumerate(names)
    )
    return Costs(
        tensors,
        forward_flops=recorded.forward_flops,
        weights_bytes=sum(s.nbytes() for s in storages.values()),
        forward_bytes=step.peaks([]).forward,
        unused=recorded.unused,
        flops_terms=flops,
        kept_terms=_whole(kept),
        step=step,
    )


def _by_depth(recorded: Trace, mask: int) -> int:
    """A set of the trace's, with the bits of depths; what is always due is past them."""
    names = recorded.order[::-1]
    places = {recorded.bits[name]: k for k, name in enumerate(names)}
    places[recorded.always] = len(names)
    return union(1 << places[1 << k] for k in members(mask))


def _whole(kept: Iterable[Kept]) -> dict[int, int]:
    return summed((union(item.masks), item.nbytes) for item in kept)
