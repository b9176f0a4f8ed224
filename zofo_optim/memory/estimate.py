"""Estimating the memory that a method of training takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..buffers import _ROOM
from ..costs.trial import Trials
from ..offload import in_turn
from .asked import Asked
from .estimated import MemoryEstimate
from .evaluations import Answers, Closure
from .made import inputs_of, made_for
from .offloaded import Offloaded, VisitingPages
from .rehearsal import Backward, Rehearsal, checkpointed
from .rehearsed_visits import VisitingDevice
from .streamed import RehearsedCopies
from .torchao_weights import plain_tensors


@torch.inference_mode(False)
def estimate_memory(
    model: Any,
    method: str,
    batch: Any,
    *,
    weights: Any = None,
    dtype: torch.dtype | None = None,
    double_quant: bool = False,
    quantized: str | None = None,
    side_rank: int | None = None,
    adapter: Any = "default",
    fo_optimizer: str | Callable[..., Optimizer] | None = None,
    fo: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    optimizer_in_backward: bool = False,
    coupling: float = 0.0,
    perturbation: str = "in_place",
    estimator: str = "two_sided",
    structure: str = "full",
    rank: int = 1,
    directions: str = "shared",
    examples_per_direction: int = 1,
    offloaded: bool = False,
    device: str = "cuda",
) -> MemoryEstimate:
    """How many bytes in tensors a method takes, at most.

    The method is rehearsed on the meta device: the model's own forward, autograd's own backward,
    transformers' own checkpointing and streaming's own copies, of tensors without elements. No
    weight is made or touched; a model of 7 B takes seconds.

    Directions are visited one after the other, so that ``num_samples`` of HybridZOFO takes
    nothing. Not counted: the device's context, libraries' and kernels' own memory, and
    fragmentation.

    Args:
        model: a configuration of transformers, or a module, on meta or not, which is left alone.
        method: "zo": zeroth order alone (MeZO); "hybrid": zeroth order for the base, first order
            for the adapter; "lora": first order for the adapter, the base frozen; "fo": first
            order for all.
        batch: (rows, tokens), or the mapping of tensors that the model takes, with labels.
        weights: how the base is stored: "fp32", "bf16", "fp16"; by bitsandbytes as "int8" or
            "int4" (nf4); or by torchao, whose Int8WeightOnlyConfig or IntxWeightOnlyConfig is
            given. Integers are of all linear layers but the head. None: as the model, or its
            configuration, says.
        dtype: what a quantised model computes in, and keeps the rest of its weights in; None:
            bfloat16.
        double_quant: of "int4", scales are quantised too, unless zeroth order moves them: those
            it has in fp32.
        quantized: what zeroth order moves beside the plain weights of a quantised model, see
            :func:`zofo_optim.hybrid_param_groups`: "scales", as None, "low_rank" or "frozen".
        side_rank: of quantized="low_rank"; None: 16.
        adapter: of "hybrid" and "lora": "lora" (peft's default ranks and layers, 8 and those of
            the architecture), a configuration of peft's, or None: what the model is trains, by
            ``requires_grad``. Default: the adapter that the model has, or else "lora".
        fo_optimizer: "sgd", as None, "adamw", or a class, of first-order tensors.
        fo: options for its constructor.
        gradient_checkpointing: layers run again in the backward.
        optimizer_in_backward: gradients are applied and freed as they come.
        coupling, perturbation, estimator, structure, rank, directions, examples_per_direction: of
            :class:`zofo_optim.HybridZOFO`.
        offloaded: frozen weights are away, see :func:`zofo_optim.offload.offload_weights`: with
            ``device="cpu"`` in a file, and their pages count while they are resident; with "cuda"
            on the host, and their copies count while they visit the GPU.
        device: "cuda" or "cpu", what it is for: attention with dropout, an optimizer's
            temporaries, and rows of embeddings differ.

    Returns:
        The estimate.

    Raises:
        TypeError, ValueError: an argument that cannot be used, or a setting that the method has
            no use for.
        ImportError: an adapter needs peft.
        RuntimeError: HybridZOFO would refuse the model too, such as one with weights that can have
            no direction for each example.

    Example:
        >>> from transformers import AutoConfig
        >>> config = AutoConfig.from_pretrained("facebook/opt-125m")
        >>> found = estimate_memory(config, "hybrid", (8, 64), weights="bf16")
        >>> found.fits("24GB")
        True
    """
    asked = Asked(
        method=method,
        weights=weights,
        dtype=dtype,
        double_quant=double_quant,
        quantized=quantized,
        side_rank=side_rank,
        adapter=adapter,
        fo_optimizer=fo_optimizer,
        fo=fo,
        gradient_checkpointing=gradient_checkpointing,
        optimizer_in_backward=optimizer_in_backward,
        coupling=coupling,
        perturbation=perturbation,
        estimator=estimator,
        structure=structure,
        rank=rank,
        directions=directions,
        examples_per_direction=examples_per_direction,
        offloaded=offloaded,
        device=device,
    )
    made = made_for(model, asked)
    if gradient_checkpointing:
        checkpointed(made)
    inputs = inputs_of(made, batch)
    away = _offloaded(made, asked)
    try:
        return _rehearsed(made, inputs, away, asked)
    finally:
        if away is not None:
            away.remove()


def _rehearsed(
    made: nn.Module, inputs: dict[str, Any], offloaded: Offloaded | None, asked: Asked
) -> MemoryEstimate:
    """
    Args:
        made: on meta.
        inputs: of its forward.
        offloaded: its weights that are; None: all are in memory.
        asked: the settings.
    """
    training = {n: p for n, p in made.named_parameters() if p.requires_grad}
    own = {id(p) for p in training.values()} if asked.method != "fo" else set()
    closure = Closure(made, inputs, asked)
    rehearsal = Rehearsal(closure, training.values(), asked.device == "cuda", offloaded)
    options = {"lr": 1e-3, **(asked.fo or {})}
    together = asked.device == "cuda" and _all_at_once(asked.factory, options)
    trials = Trials(asked.factory, {**options, "foreach": True} if together else options)
    memory = {p: trials.of(p) for p in training.values()}
    sizes = {p: p.nbytes for p in training.values()}
    work = [m.workspace for m in memory.values()]

    where = "memory" if offloaded is None else offloaded.where
    if where == "host":
        rehearsal.evaluation()  # which shows the order of modules: the next ones come ahead
    passed = Backward(0, 0, 0)
    if asked.first:
        applied: dict[Tensor, int] = {p: memory[p].workspace for p in training.values()}
        passed = rehearsal.backward(applied if asked.optimizer_in_backward else None)
    # gradients that are applied as they come are so after the evaluations
    held, most = 0 if asked.optimizer_in_backward else passed.left, passed.most
    evaluation = streamed = verification = 0
    if asked.zeroth:
        answers = Answers(made, asked, closure.examples)
        evaluation = rehearsal.evaluation()
        streamed = rehearsal.evaluation(answers.steady())
        if asked.coupling:  # once more at displaced weights, beside the gradients that there are
            saved = RehearsedCopies()
            most = max(most, held + rehearsal.backward(None, answers.steady(saved), saved).most)
        verifying = held + answers.verifying(rehearsal, where)
        # the first evaluation ever shows which buffers change: all are copied before
        first = min(_bytes(made.buffers()), _ROOM) + (passed.most if asked.first else streamed)
        verification = max(first, most, verifying)
    update = 0
    if asked.first and not asked.optimizer_in_backward:
        update = held + (sum(work) if together else max(work, default=0))
    if offloaded is not None and where == "map" and asked.zeroth:
        update = max(update, held + min(in_turn._PIECE, offloaded.largest))
    return MemoryEstimate(
        method=str(asked),
        weights=_bytes(
            t
            for t in (*made.parameters(), *made.buffers())
            if id(t) not in own and not (offloaded and offloaded.holds(t))
        ),
        adapter=sum(sizes[p] for p in training.values() if id(p) in own),
        optimizer_state=sum(m.state for m in memory.values()),
        gradients=(max if asked.optimizer_in_backward else sum)([0, *sizes.values()]),
        activations=passed.kept,
        logits=closure.logits,
        copies=max(0, streamed - evaluation),
        forward_and_backward=most,
        evaluation=held + streamed if asked.zeroth else 0,
        update=update,
        verification=verification,
        visiting=offloaded.most if offloaded else 0,
        on_disk=offloaded.nbytes if offloaded and where == "map" else 0,
        on_host=offloaded.nbytes if offloaded and where == "host" else 0,
    )


def _offloaded(made: nn.Module, asked: Asked) -> Offloaded | None:
    """None: all weights are in memory."""
    if not asked.offloaded:
        return None
    return VisitingPages(made) if asked.device == "cpu" else VisitingDevice(made)


def _all_at_once(factory: Any, options: Mapping[str, Any]) -> bool:
    """Whether torch's default on a GPU, foreach, updates all tensors together."""
    asked = options.get("foreach") is not False and not options.get("fused")
    return asked and "foreach" in inspect.signature(factory).parameters


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    plain = [inner for tensor in tensors for inner in plain_tensors(tensor)]
    storages = {id(s): s.nbytes() for s in (t.untyped_storage() for t in plain)}
    return sum(storages.values())
