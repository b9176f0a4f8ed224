"""Splitting a model into zeroth-order (frozen base) and first-order (adapter) groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .buffers import ParamGroups
from .parallel import check_wrappers
from .plain import plain
from .quantized import Scales, note_beside, unit_of
from .zeroth_order import ZerothOrder, parameters_with_all_names


def hybrid_param_groups(
    model: nn.Module,
    zo: Mapping[str, Any] | None = None,
    fo: Mapping[str, Any] | None = None,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    directions: str = "shared",
    quantized: str | None = None,
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
    quantised ones, raise unless they are excluded, or ``quantized`` says what becomes of them.

    Args:
        model: any module; call this after peft has wrapped it, and after ``fully_shard`` or
            ``parallelize_module``: shards (DTensors) train as whole weights do.
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
        quantized: what becomes of quantised weights. None: they are refused. "scales": their
            scales, and zero points that are floats, learn by zeroth order, in groups by size, each
            with that size as its ``unit``: the root mean square of a tensor as a power of two. They
            are named as in the format's state dicts, such as ``"q_proj.weight.absmax"``, also for
            ``include`` and ``exclude``. Those that are quantised themselves, or have 16 bits where
            the format takes fp32, become fp32 first. "low_rank": updates of low rank beside them
            learn, those of :func:`add_side_updates`, which is called where the model has none; also
            where the format is unknown. "frozen": quantised weights stay as they are.
        verbose: print a one-line summary.

    Returns:
        Plain dictionaries with ``params``, ``param_names``, ``mode`` and the given options, ZO
        first; a group without parameters is left out. The list also holds the model, whose
        buffers :class:`HybridZOFO` restores.

    Raises:
        TypeError: ``model`` is no module, or options are no mapping.
        ValueError: an option may not be set here, a pattern matches no frozen parameter, no
            parameter is left, ``zo`` is given and there is no zeroth-order parameter, or base
            weights are quantised, partitioned, sparse, complex or offloaded (on the meta device)
            and not excluded, or trainable ones are offloaded; or ``quantized="scales"`` does not
            know their format, nor ``directions="per_example"``.
        RuntimeError: the model has zeroth-order parameters, and several processes share it by a
            wrapper other than DistributedDataParallel.
    """
    check_module(model)
    rules = ZerothOrder(model, include, exclude, directions, quantized=quantized)

    def mode_of(names: Sequence[str], parameter: Tensor) -> str:
        return "fo" if parameter.requires_grad else "zo"

    options = {"zo": options_of("zo", zo), "fo": options_of("fo", fo)}
    if quantized == "scales" and "unit" in options["zo"]:
        raise ValueError(
            "zo must not set 'unit' where quantized='scales', whose groups have their own, got "
            f"{options['zo']['unit']!r}"
        )
    split = split_of(model, mode_of, rules)
    if zo is not None and not split.zo:
        raise ValueError(
            f"zo must be left out where no parameter is zeroth-order, got {zo!r}; "
            + _to_do(split.left_out)
        )
    return param_groups(model, split, options, "hybrid_param_groups" if verbose else None)


class Split(NamedTuple):
    """The parameters of a model by what becomes of them, in the model's order."""

    zo: dict[str, Tensor]
    fo: dict[str, Tensor]
    left_out: dict[str, list[Tensor]]
    """By reason."""
    units: dict[str, float]
    """Of those zeroth-order tensors that are quantisation scales."""
    prepared: dict[str, int]
    """See :attr:`ZerothOrder.prepared`."""


def split_of(
    model: nn.Module, mode_of: Callable[[Sequence[str], Tensor], str], rules: ZerothOrder
) -> Split:
    """What ``mode_of`` says: "fo", "zo" unless the rules leave it out, or why it is neither.

    Args:
        model: whose parameters.
        mode_of: told all names of a parameter, and the parameter.
        rules: what may be zeroth-order.

    Raises:
        ValueError: no parameter is left, or the rules refuse one, or a pattern.
    """
    split = Split({}, {}, {}, {}, rules.prepared)
    parameters = [(*named, mode_of(*named)) for named in parameters_with_all_names(model)]
    first_order = {name for names, _, mode in parameters if mode == "fo" for name in names}
    of_scales = [
        (every[0], rules.reason_against_scale(every, first_order)) for every in rules.scales or ()
    ]
    for names, parameter, mode in parameters:
        if mode == "fo":
            rules.check_first_order(names[0], parameter)
            split.fo[names[0]] = parameter
            continue
        reason = rules.reason_against(names, parameter) if mode == "zo" else mode
        if reason:
            split.left_out.setdefault(reason, []).append(parameter)
        else:
            split.zo[names[0]] = parameter
    for scale, reason in of_scales:
        if reason:
            split.left_out.setdefault(reason, []).append(scale.tensor)
        else:
            split.zo[scale.name] = scale.tensor
            split.units[scale.name] = unit_of(scale.tensor)
    rules.check_patterns()
    if not split.zo and not split.fo:
        raise ValueError("model must have at least one parameter to train, got none")
    return split


def param_groups(
    model: nn.Module, split: Split, options: Mapping[str, Mapping[str, Any]], said: str | None
) -> ParamGroups:
    """Groups for the optimizer, ZO first; one without parameters is left out.

    Args:
        model: whose buffers are restored.
        split: what becomes of its parameters.
        options: of the groups, by mode.
        said: how the summary begins that is printed; None: none is.

    Raises:
        RuntimeError: the model has zeroth-order parameters, and a wrapper that they cannot train
            under.
    """
    if split.zo:
        check_wrappers(model)
    if said is not None:
        print(_summary(said, split))
    chosen_groups = [
        {
            "params": list(chosen.values()),
            "param_names": list(chosen),
            "mode": mode,
            **options[mode],
            **own,
        }
        for mode, chosen, own in (*_by_unit(split), ("fo", split.fo, {}))
        if chosen
    ]
    note_beside(model, {**split.zo, **split.fo})
    scales = Scales(model).among(split.zo.values()) if split.units else ()
    return ParamGroups(chosen_groups, model, scales)


def _by_unit(split: Split) -> list[tuple[str, dict[str, Tensor], dict[str, float]]]:
    """Zeroth-order tensors with the options of their groups: first those without a unit."""
    plain = {name: p for name, p in split.zo.items() if name not in split.units}
    found: list[tuple[str, dict[str, Tensor], dict[str, float]]] = [("zo", plain, {})]
    for unit in sorted(set(split.units.values()), reverse=True):
        alike = {name: split.zo[name] for name, one in split.units.items() if one == unit}
        found.append(("zo", alike, {"unit": unit}))
    return found


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def options_of(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
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


def _size(parameters: Sequence[Tensor]) -> str:
    count = sum(p.numel() for p in parameters)
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{len(parameters)} tensors, {count / scale:.1f} {unit}"
    return f"{len(parameters)} tensors, {count}"


def _summary(said: str, split: Split) -> str:
    scales = [split.zo[name] for name in split.units]
    of_scales = f", of them quantisation scales {_size(scales)}" if scales else ""
    parts = [
        f"zeroth-order: {_size(list(split.zo.values()))} parameters{of_scales}",
        f"first-order: {_size(list(split.fo.values()))}",
    ]
    for reason, parameters in split.left_out.items():
        parts.append(f"left out ({reason}): {_size(parameters)}")
    for done, count in split.prepared.items():
        parts.append(f"scales of {count} weights {done}")
    return f"{said}: " + "; ".join(parts)
