"""Estimating the memory that a method of training takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zofo_kernels import NOISE_VERSION

from ..costs.trial import Trials
from ..settings import Settings
from .estimated import MemoryEstimate
from .evaluations import Answers, Closure
from .made import FORMATS, QUANTIZED, in_format, inputs_of, without_data
from .rehearsal import Rehearsal, checkpointed

METHODS = ("zo", "hybrid", "fo", "lora")
DEVICES = ("cuda", "cpu")
_OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@torch.inference_mode(False)
def estimate_memory(
    model: Any,
    method: str,
    batch: Any,
    *,
    weights: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = False,
    adapter: Any = "lora",
    fo_optimizer: str | Callable[..., Optimizer] = "sgd",
    fo: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    optimizer_in_backward: bool = False,
    perturbation: str = "in_place",
    estimator: str = "two_sided",
    structure: str = "full",
    rank: int = 1,
    directions: str = "shared",
    examples_per_direction: int = 1,
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
        weights: how the base is stored: "fp32", "bf16", "fp16", or by bitsandbytes as "int8" or
            "int4" (nf4), all linear layers but the head; zeroth order then moves their scales.
            None: as the model, or its configuration, says.
        dtype: what a quantised model computes in, and keeps the rest of its weights in.
        double_quant: of int4, scales are quantised too, unless zeroth order moves them: those it
            has in fp32.
        adapter: of "hybrid" and "lora": "lora" (peft's default ranks and layers, 8 and those of
            the architecture), a configuration of peft's, or None: what the model is trains, by
            ``requires_grad``.
        fo_optimizer: "sgd", "adamw", or a class, of first-order tensors.
        fo: options for its constructor.
        gradient_checkpointing: layers run again in the backward.
        optimizer_in_backward: gradients are applied and freed as they come.
        perturbation, estimator, structure, rank, directions, examples_per_direction: of
            :class:`zofo_optim.HybridZOFO`.
        device: "cuda" or "cpu", what it is for: attention with dropout, an optimizer's
            temporaries, and rows of embeddings differ.

    Returns:
        The estimate.

    Raises:
        TypeError, ValueError: an argument that cannot be used, or a setting that the method has
            no use for.
        ImportError: an adapter needs peft.

    Example:
        >>> from transformers import AutoConfig
        >>> config = AutoConfig.from_pretrained("facebook/opt-125m")
        >>> found = estimate_memory(config, "hybrid", (8, 64), weights="bf16")
        >>> found.fits("24GB")
        True
    """
    for name, value, allowed in (
        ("method", method, METHODS),
        ("weights", weights, (None, *FORMATS)),
        ("device", device, DEVICES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    zeroth, first = method in ("zo", "hybrid"), method != "zo"
    settings = _settings(
        estimator=estimator,
        perturbation=perturbation,
        structure=structure,
        rank=rank,
        directions=directions,
        examples_per_direction=examples_per_direction,
        optimizer_in_backward=optimizer_in_backward,
    )
    quantized = weights in QUANTIZED
    if quantized and method == "fo":
        raise ValueError(f"weights must be of floating point for method='fo', got {weights!r}")
    if quantized and zeroth and perturbation != "in_place":
        raise ValueError(
            "perturbation must be 'in_place' where zeroth order moves the scales of quantised "
            f"weights, got {perturbation!r}"
        )
    if not first and (gradient_checkpointing or optimizer_in_backward):
        raise ValueError("method must have a backward for gradient_checkpointing, got 'zo'")
    given = adapter if method in ("hybrid", "lora") else None
    made = in_format(
        without_data(model),
        weights,
        dtype,
        _lora() if given == "lora" else given,
        double_quant=double_quant and not zeroth,
        fused=device == "cuda",
    )
    if method in ("zo", "fo"):
        made.requires_grad_(method == "fo")
    if gradient_checkpointing:
        checkpointed(made)
    training = {n: p for n, p in made.named_parameters() if p.requires_grad}
    if first and not training:
        raise ValueError(
            f"model must have parameters that train for method={method!r}, got none: give adapter="
        )
    inputs = inputs_of(made, batch)
    closure = Closure(made, inputs, settings.directions == "per_example" and zeroth)
    rehearsal = Rehearsal(closure, device == "cuda")
    own = {id(p) for p in training.values()} if method != "fo" else set()
    factory = _OPTIMIZERS.get(fo_optimizer, fo_optimizer) if first else torch.optim.SGD  # type: ignore[arg-type]
    if not callable(factory):
        raise ValueError(f"fo_optimizer must be 'sgd', 'adamw' or a class, got {fo_optimizer!r}")
    options = {"lr": 1e-3, **(fo or {})}
    together = device == "cuda" and _all_at_once(factory, options)
    trials = Trials(factory, {**options, "foreach": True} if together else options)
    memory = {p: trials.of(p) for p in training.values()}
    sizes = {p: p.numel() * p.element_size() for p in training.values()}
    work = [m.workspace for m in memory.values()]

    evaluation, streamed = rehearsal.evaluation(), 0
    if zeroth:
        answers = Answers(made, settings, closure.examples, device)
        streamed = rehearsal.evaluation(answers.steady())
    held = 0 if optimizer_in_backward else sum(sizes.values())
    passed = None
    if first:
        applied: dict[Tensor, int] = {p: memory[p].workspace for p in training.values()}
        passed = rehearsal.backward(applied if optimizer_in_backward else None)
    return MemoryEstimate(
        method=_said(method, weights, settings, gradient_checkpointing, fo_optimizer),
        weights=_stored(made, lambda p: id(p) not in own),
        adapter=sum(sizes[p] for p in training.values() if id(p) in own),
        optimizer_state=sum(m.state for m in memory.values()),
        gradients=max(sizes.values(), default=0) if optimizer_in_backward else held,
        activations=passed.kept if passed else 0,
        logits=closure.logits,
        copies=max(0, streamed - evaluation) if zeroth else 0,
        forward_and_backward=passed.most if passed else 0,
        evaluation=held + streamed if zeroth else 0,
        update=0
        if optimizer_in_backward or not first
        else held + (sum(work) if together else max(work, default=0)),
        verification=held + answers.verifying(rehearsal) if zeroth else 0,
    )


def _settings(**options: Any) -> Settings:
    """
    Raises:
        TypeError, ValueError: as HybridZOFO does.
    """
    return Settings(
        num_samples=1,
        distribution="gaussian",
        rounding="stochastic",
        zo_rule="sgd",
        nonfinite="raise" if options["optimizer_in_backward"] else "skip",
        backend="auto",
        capturable=False,
        noise_version=NOISE_VERSION,
        **options,
    )


def _all_at_once(factory: Any, options: Mapping[str, Any]) -> bool:
    """Whether torch's default on a GPU, foreach, updates all tensors together."""
    asked = options.get("foreach") is not False and not options.get("fused")
    return asked and "foreach" in inspect.signature(factory).parameters


def _lora() -> Any:
    import peft

    return peft.LoraConfig()


def _stored(model: nn.Module, counted: Callable[[Tensor], bool]) -> int:
    tensors = [p for p in (*model.parameters(), *model.buffers()) if counted(p)]
    storages = {id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _said(
    method: str, weights: str | None, settings: Settings, checkpoints: bool, fo_optimizer: Any
) -> str:
    parts = [method] if weights is None else [method, weights]
    if method in ("zo", "hybrid"):
        low_rank = settings.structure == "low_rank"
        parts.append(f"low rank {settings.rank}" if low_rank else settings.perturbation)
        parts += ["one direction an example"] * (settings.directions == "per_example")
    if method != "zo":
        parts.append(fo_optimizer if isinstance(fo_optimizer, str) else fo_optimizer.__name__)
    parts += ["checkpointed"] * checkpoints
    parts += ["optimizer in backward"] * settings.optimizer_in_backward
    return ", ".join(parts)
