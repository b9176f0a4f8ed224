"""Splitting a model into zeroth-order (frozen base) and first-order (adapter) groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zofo_kernels import check_weight
from zofo_kernels._torch_compat import is_wrapper_subclass

from .buffers import ParamGroups
from .names import matching, patterns_in
from .ownership import without_examples
from .parallel import check_unshared
from .plain import plain
from .settings import DIRECTIONS

_STANDS_IN = {
    "modules_to_save": "original_module",
    "ln_tuning_layers": "base_layer",
    "frod_lambda_l": "base_layer.weight",
}
"""Where peft replaces rather than adds: its attribute, by adapter, and what that stands in for."""
_WHY_UNUSED = (
    " (no forward pass uses them, or they are an adapter's: inactive or frozen adapters, and "
    "originals that an adapter replaces)"
)


def hybrid_param_groups(
    model: nn.Module,
    zo: Mapping[str, Any] | None = None,
    fo: Mapping[str, Any] | None = None,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    directions: str = "shared",
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`HybridZOFO`: what trains goes to FO, what is frozen to ZO.

    ``requires_grad`` decides, so any peft model works as it is: the adapter and
    ``modules_to_save`` are first-order, the frozen base model is zeroth-order. A model without
    trainable parameters gives one ZO group (plain MeZO), one without frozen ones one FO group, or
    an error where ``zo`` is given.
    Tied weights count once. Left out of the ZO group, since they do not reach the loss, are not
    the base model's or cannot be perturbed: frozen originals that an adapter replaces
    (``modules_to_save``, LayerNorm tuning, FRoD), an adapter's own frozen weights, and tensors
    of integers and booleans. Frozen weights that could learn but cannot be moved here, such as
    quantised and sharded ones, raise unless they are excluded.

    Args:
        model: any module; call this after peft has wrapped it.
        zo: options of the ZO group, such as ``dict(lr=1e-6, mu=1e-3)``.
        fo: options of the FO group, such as ``dict(lr=1e-3, momentum=0.9)``.
        include: the only frozen parameters that may move, such as ``"bias"``; default: all.
            Regular expressions searched in the parameter's name, upper or lower case (``"embed"``,
            ``r"norm\\.weight$"``); shell patterns such as ``"*norm*"`` are understood too.
        exclude: frozen parameters to keep as they are, likewise. First-order parameters are
            never left out.
        directions: those of the optimizer; with "per_example" what cannot have a direction for each
            example is left out: embeddings of positions, convolutions, batch and group norms,
            recurrent layers, and packed attention, as far as it can be told from the modules.
        verbose: print a one-line summary.

    Returns:
        Plain dictionaries with ``params``, ``param_names``, ``mode`` and the given options, ZO
        first; a group without parameters is left out. The list also holds the model, whose
        buffers :class:`HybridZOFO` restores.

    Raises:
        TypeError: ``model`` is no module, or options are no mapping.
        ValueError: an option may not be set here, a pattern matches no frozen parameter, no
            parameter is left, ``zo`` is given and there is no zeroth-order parameter, or base
            weights are quantised, sharded, partitioned, sparse or complex and not excluded.
        RuntimeError: the model has zeroth-order parameters, and several processes share it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options = {"zo": _options("zo", zo), "fo": _options("fo", fo)}
    wanted, unwanted = patterns_in("include", include), patterns_in("exclude", exclude)

    if directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {DIRECTIONS}, got {directions!r}")
    shared = without_examples(model) if directions == "per_example" else set()
    unreached = _unreached(model)
    groups: dict[str, dict[str, Tensor]] = {"zo": {}, "fo": {}}
    left_out: dict[str, list[Tensor]] = {}
    used: set[str] = set()
    taken: dict[str, dict[str, str]] = {pattern: {} for pattern in wanted}
    for names, parameter in _parameters_with_all_names(model):
        if parameter.requires_grad:
            groups["fo"][names[0]] = parameter
            continue
        included, excluded = matching(wanted, names), matching(unwanted, names)
        used.update(included, excluded)
        reason = ""
        if all(name in unreached for name in names):
            reason = "unused"
        elif not excluded and (not wanted or included) and (packed := _packed(parameter, names[0])):
            raise ValueError(f"model must not have {packed}; {names[0]!r} is one")
        elif excluded or (wanted and not included):
            reason = "excluded"
        elif any(name in shared for name in names):
            reason = "no direction for each example"
        elif not _could_learn(parameter):
            reason = str(parameter.dtype).removeprefix("torch.")
        for pattern in included:
            taken[pattern].setdefault(reason, names[0])
        if reason:
            left_out.setdefault(reason, []).append(parameter)
        else:
            groups["zo"][names[0]] = parameter

    for argument, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if pattern not in used:
                raise ValueError(
                    f"{argument} must match names of frozen parameters, got {pattern!r}, which "
                    "matches none"
                )
    for pattern, reasons in taken.items():
        if not reasons.keys() & {"", "excluded"}:
            said = " and ".join(f"{why} ones such as {name!r}" for why, name in reasons.items())
            raise ValueError(
                f"include must match names of frozen parameters that can train, got {pattern!r}, "
                f"which matches only {said}" + _WHY_UNUSED * ("unused" in reasons)
            )
    if not groups["zo"] and not groups["fo"]:
        raise ValueError("model must have at least one parameter to train, got none")
    if zo is not None and not groups["zo"]:
        raise ValueError(
            f"zo must be left out where no parameter is zeroth-order, got {zo!r}; "
            + _to_do(left_out)
        )
    if groups["zo"]:
        check_unshared(model)
    if verbose:
        print(_summary(groups, left_out))
    chosen_groups = [
        {
            "params": list(chosen.values()),
            "param_names": list(chosen),
            "mode": mode,
            **options[mode],
        }
        for mode, chosen in groups.items()
        if chosen
    ]
    return ParamGroups(chosen_groups, model)


def _options(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a mapping of group options, got {options!r}")
    for reserved in ("params", "param_names", "mode"):
        if reserved in options:
            raise ValueError(f"{name} must not set {reserved!r}: hybrid_param_groups does")
    return {key: plain(value) for key, value in options.items()}


def _to_do(left_out: Mapping[str, Sequence[Tensor]]) -> str:
    """How a model gets zeroth-order parameters, which has none yet."""
    if left_out:
        parts = [f"{_size(parameters)} ({reason})" for reason, parameters in left_out.items()]
        return f"all that is frozen is left out: {', '.join(parts)}"
    return (
        "zeroth-order are those with requires_grad=False, and all of this model's require "
        "gradients: call model.requires_grad_(False) to train all of it by zeroth order (MeZO), "
        "or freeze the base model beneath a trainable adapter, as peft.get_peft_model does"
    )


def _packed(parameter: Tensor, name: str) -> str | None:
    """What is wrong with a weight that could learn, in a form that cannot be moved.

    Raises:
        ValueError: it has no memory that can be written.
    """
    if hasattr(parameter, "ds_id"):
        return (
            "weights that DeepSpeed ZeRO-3 has partitioned: train without DeepSpeed, as zeroth "
            "order keeps neither gradients nor optimizer state of the base model"
        )
    if type(parameter).__name__ in ("Params4bit", "Int8Params"):
        return (
            "weights quantised by bitsandbytes in a zeroth-order group: load the base model in "
            "bfloat16, in which it trains at inference memory, or leave these weights out by "
            "exclude="
        )
    if not _could_learn(parameter):
        return None
    advice = "leave these weights out by exclude="
    if type(parameter).__name__ == "DTensor":
        return (
            "sharded weights (DTensor, of FSDP2 or tensor parallelism) in a zeroth-order group: "
            f"train in one process on one device, without sharding, or {advice}"
        )
    try:
        check_weight(parameter, f"parameter {name!r}")
    except TypeError as error:
        return (
            f"weights that cannot be perturbed in a zeroth-order group ({error}): load the base "
            f"model unquantised, in bfloat16 for example, or {advice}"
        )
    return None


def _could_learn(parameter: Tensor) -> bool:
    """False for integers and booleans, which hold no weight unless a quantised tensor does."""
    wrapped = is_wrapper_subclass(parameter)
    return wrapped or parameter.is_floating_point() or parameter.is_complex()


def _parameters_with_all_names(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each parameter once, with every name under which the model knows it."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def _unreached(model: nn.Module) -> set[str]:
    """Names of peft parameters that no forward pass uses, or that are not the base model's.

    Recognised by peft's own attributes, so that peft need not be installed.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = [
            *getattr(module, "adapter_layer_names", ()),
            *getattr(module, "other_param_names", ()),
            # these are not listed by peft before 0.18
            *(name for name, _ in module.named_children() if name in _STANDS_IN),
        ]
        for child in (*own, *_replaced(module)):
            start = f"{prefix}.{child}" if prefix else child
            part: Any = module
            for attribute in child.split("."):
                part = getattr(part, attribute, None)
            if isinstance(part, nn.Parameter):
                names.add(start)
            elif isinstance(part, nn.Module | nn.ParameterDict):
                inside = part.named_parameters(remove_duplicate=False)
                names.update(f"{start}.{name}" for name, _ in inside)
    return names


def _replaced(module: nn.Module) -> list[str]:
    """What of the base model a peft module does not use, or not as the tensor that it is now."""
    found = []
    for attribute, base in _STANDS_IN.items():
        adapters = getattr(module, attribute, None)
        if not isinstance(adapters, nn.ModuleDict | nn.ParameterDict):
            continue
        if getattr(module, "disable_adapters", False) or getattr(module, "merged_adapters", ()):
            continue  # the forward pass is the base layer's
        active = set(getattr(module, "active_adapters", adapters.keys()))
        if active & set(adapters.keys()):
            found.append(base)
    attention = getattr(module, "base_layer", None)
    if isinstance(attention, nn.MultiheadAttention) and hasattr(module, "lora_A"):
        # merged and taken out again in every forward pass, into new tensors
        found += ["base_layer.in_proj_weight", "base_layer.out_proj.base_layer.weight"]
    return found


def _size(parameters: Sequence[Tensor]) -> str:
    count = sum(p.numel() for p in parameters)
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{len(parameters)} tensors, {count / scale:.1f} {unit}"
    return f"{len(parameters)} tensors, {count}"


def _summary(groups: dict[str, dict[str, Tensor]], left_out: dict[str, list[Tensor]]) -> str:
    parts = [
        f"zeroth-order: {_size(list(groups['zo'].values()))} parameters",
        f"first-order: {_size(list(groups['fo'].values()))}",
    ]
    for reason, parameters in left_out.items():
        parts.append(f"left out ({reason}): {_size(parameters)}")
    return "hybrid_param_groups: " + "; ".join(parts)
