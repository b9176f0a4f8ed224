"""Parameter groups for a model with a carried adapter: all of it learns by forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..adapters import adapter_parameters
from ..groups import check_module, options_of, param_groups, split_of
from ..zeroth_order import ZerothOrder


def zo_param_groups(
    model: nn.Module,
    base: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Two zeroth-order groups for :class:`HybridZOFO`: the base model, and its frozen adapter.

    For a model that :func:`transfer_adapter` gave an adapter, of which nothing requires gradients.
    ``hybrid_param_groups`` leaves frozen adapters out: what peft has made inactive is frozen too.

    Args:
        model: with one adapter, frozen.
        base: options of the base model's group, such as ``dict(lr=1e-6, mu=1e-3)``; None: the base
            model stays as it is, and there is no such group.
        adapter: options of the adapter's group and the heads' that were carried with it, likewise.
        include, exclude: parameters of the base model, as in ``hybrid_param_groups``.

    Returns:
        Plain dictionaries with ``params``, ``param_names``, ``mode="zo"`` and the options, the base
        model's first.

    Raises:
        TypeError: ``model`` is no module, or options are no mapping.
        ValueError: both groups are left out, the model has no adapter, a parameter requires
            gradients, or what ``hybrid_param_groups`` raises.
    """
    check_module(model)
    trains = next((name for name, p in model.named_parameters() if p.requires_grad), None)
    if trains is not None:
        raise ValueError(
            "model must not require gradients where all of it learns by forward passes, got "
            f"{trains!r}: call model.requires_grad_(False), or take hybrid_param_groups"
        )
    if base is None and adapter is None:
        raise ValueError("base and adapter must not both be None: nothing would train")
    peft: Any = model
    active = peft.active_adapters if hasattr(peft, "get_base_model") else ()
    own = {id(p) for p in adapter_parameters(model, active)}
    if not own:
        raise ValueError(f"model must have an adapter, got a {type(model).__name__} without")

    def mode_of(names: Sequence[str], parameter: Any) -> str:
        if id(parameter) in own:
            return "the adapter's" if adapter is None else "fo"
        return "the base model's" if base is None else "zo"

    split = split_of(model, mode_of, ZerothOrder(model, include, exclude))
    options = {"zo": options_of("base", base), "fo": options_of("adapter", adapter)}
    groups = param_groups(model, split, options, None)
    for group in groups:
        group["mode"] = "zo"
    return groups
