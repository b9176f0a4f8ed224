"""Which parameters of a model zeroth order may move, and why it leaves the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from zofo_kernels import check_weight
from zofo_kernels._torch_compat import is_wrapper_subclass

from .names import matching, patterns_in
from .ownership import without_examples
from .quantized import Scale, Scales, prepare, scaled_weights
from .quantized.bnb_4bit import settle_layer
from .quantized.refusals import (
    by_choice,
    check_known,
    is_of_bitsandbytes,
    is_quantised,
    packed_modules,
    said_of_nothing,
)
from .quantized.side_module import NAME as SIDE
from .quantized.side_updates import add_side_updates, side_updates
from .settings import DIRECTIONS
from .sharding import fsdp_modules, pieces_of, reshard

_STANDS_IN = {
    "modules_to_save": "original_module",
    "ln_tuning_layers": "base_layer",
    "frod_lambda_l": "base_layer.weight",
}
"""Where peft replaces rather than adds: its attribute, by adapter, and what that stands in for."""
QUANTIZED = (None, "scales", "low_rank", "frozen")
_WHY_UNUSED = (
    " (no forward pass uses them, or they are an adapter's: inactive or frozen adapters, and "
    "originals that an adapter replaces)"
)


class ZerothOrder:
    """What of a model may be zeroth-order, by the arguments of :func:`hybrid_param_groups`.

    Args:
        model: whose parameters.
        include, exclude, directions, quantized: see there.
        without_data: let parameters on the meta device pass, for a plan.

    Raises:
        TypeError: ``include`` or ``exclude`` is no string or sequence of strings.
        ValueError: ``directions`` or ``quantized`` has no such value, or the two do not fit, or the
            model has weights as other libraries pack them, of which nothing is said, or none that
            is quantised for "scales".
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        directions: str = "shared",
        *,
        quantized: str | None = None,
        without_data: bool = False,
    ) -> None:
        if quantized not in QUANTIZED:
            raise ValueError(f"quantized must be one of {QUANTIZED}, got {quantized!r}")
        if quantized == "scales" and directions == "per_example":
            raise ValueError(
                "directions must be 'shared' where quantized='scales', got 'per_example': scales "
                "move in place, all examples with them"
            )
        self._without_data = without_data
        self._wanted = patterns_in("include", include)
        self._unwanted = patterns_in("exclude", exclude)
        self._used: set[str] = set()
        self._taken: dict[str, dict[str, str]] = {pattern: {} for pattern in self._wanted}
        if directions not in DIRECTIONS:
            raise ValueError(f"directions must be one of {DIRECTIONS}, got {directions!r}")
        done: Counter[str] = Counter()
        if quantized is not None:
            done.update(filter(None, map(settle_layer, model.modules())))
        self._frozen = quantized in ("frozen", "low_rank")
        self._beside: set[str] = set()
        """Names of quantised weights beside which updates of low rank learn."""
        if quantized == "low_rank":
            sides = side_updates(model) or add_side_updates(model)
            self._beside = {f"{layer}.weight" for layer in sides}
        self._shared = without_examples(model) if directions == "per_example" else set()
        self._unreached = _unreached(model)
        self.scales: Scales | None = None
        """Of quantised weights, of which :meth:`reason_against_scale` tells whether they learn."""
        self._scaled: set[str] = set()
        """Names of the weights that have such scales."""
        self._learning: set[str] = set()
        """Of those, the ones of which some learn, as far as was told."""
        if quantized is None:
            self._check_said(model)
        if quantized == "scales":
            check_known(model)
            by_gradients = _by_gradients(model)
            done.update(
                prepare(
                    model,
                    lambda names, of: not self._reason_against_scale(names, of, by_gradients),
                )
            )
            self.scales = Scales(model)
            self._scaled = scaled_weights(model)
        self.prepared = dict(done)
        """How many tensors of scales were changed first, by what was done."""

    def is_unreached(self, names: Sequence[str]) -> bool:
        """Whether no forward pass uses a parameter, or it is an adapter's that does not train."""
        return all(name in self._unreached for name in names)

    def reach(self, names: Sequence[str]) -> None:
        """A parameter of these names is known to be used, also if it is an adapter's."""
        self._unreached.difference_update(names)

    def excludes(self, names: Sequence[str]) -> bool:
        """Whether ``exclude`` matches a parameter."""
        return bool(matching(self._unwanted, names))

    def know(self, names: Sequence[str]) -> None:
        """Count a parameter that is not zeroth-order among those that patterns may match."""
        self._used.update(matching(self._unwanted, names))
        for pattern in matching(self._wanted, names):
            self._used.add(pattern)
            self._taken[pattern].setdefault("", names[0])

    def reason_against(self, names: Sequence[str], parameter: Tensor) -> str:
        """Why a parameter of these names is left out of a zeroth-order group; "" where it is not.

        Raises:
            ValueError: it could learn, is not excluded, and cannot be moved here.
        """
        included, unwanted = self._asked(_with_weights(names))
        reason = ""
        if self.is_unreached(names):
            reason = "unused"
        elif any(name in self._scaled for name in names):
            learn = not self._learning.isdisjoint(names)
            reason = "quantised, their scales learn" if learn else "quantised, frozen"
        elif self._beside.intersection(names) and is_quantised(parameter):
            reason = "quantised, low-rank updates beside them learn"
        elif self._frozen and is_quantised(parameter):
            reason = "quantised, frozen"
        elif not unwanted and (packed := self._packed(parameter, names[0])):
            raise ValueError(f"model must not have {packed}; {names[0]!r} is one")
        elif unwanted:
            reason = "excluded"
        elif any(name in self._shared for name in names):
            reason = "no direction for each example"
        elif not could_learn(parameter):
            reason = str(parameter.dtype).removeprefix("torch.")
        for pattern in included:
            self._taken[pattern].setdefault(reason, names[0])
        return reason

    def reason_against_scale(self, scales: Sequence[Scale], first_order: Collection[str]) -> str:
        """As :meth:`reason_against`, of one tensor of quantisation scales by all of its names.

        Asked first: what becomes of a weight depends on its scales. Patterns also match the names
        of the weights that it scales.

        Args:
            scales: the tensor by each of its names.
            first_order: names of parameters that learn by gradients.
        """
        weights = [scale.weight for scale in scales]
        reason = self._reason_against_scale([s.name for s in scales], weights, first_order)
        if not reason:
            self._learning.update(weights)
        return reason

    def _reason_against_scale(
        self, names: Sequence[str], weights: Sequence[str], first_order: Collection[str]
    ) -> str:
        """By all names of the scale, and of its weight; patterns that match them have been used."""
        included, unwanted = self._asked([*names, *weights])
        reason = "excluded" if unwanted else ""
        if self.is_unreached(weights):
            reason = "unused"
        elif any(name in first_order for name in weights):
            reason = "of weights that learn by gradients"
        for pattern in included:
            self._taken[pattern].setdefault(reason, names[0])
        return reason

    def _asked(self, names: Sequence[str]) -> tuple[list[str], bool]:
        """Patterns of ``include`` that match, and whether what has these names is left out."""
        included, excluded = matching(self._wanted, names), matching(self._unwanted, names)
        self._used.update(included, excluded)
        return list(included), bool(excluded) or bool(self._wanted and not included)

    def _check_said(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: modules hold quantised weights in buffers, which are not excluded.
        """
        for name, module, part in packed_modules(model):
            start = f"{name}." if name else ""
            included, unwanted = self._asked([f"{start}{part}", f"{start}weight"])
            if not unwanted:
                raise ValueError(said_of_nothing(name, module, part))
            for pattern in included:
                self._taken[pattern].setdefault("excluded", f"{start}{part}")

    def check_first_order(self, name: str, parameter: Tensor) -> None:
        """
        Raises:
            ValueError: the parameter is without data, so that no gradient reaches it.
        """
        if parameter.is_meta and not self._without_data:
            raise ValueError(
                f"trainable parameter {name!r} must hold data, got a tensor on the meta device: "
                "where accelerate offloads weights, gradients reach copies only; call "
                "zofo_optim.offload.offload_weights(model) first, which loads what is trainable, "
                "or freeze them (requires_grad=False)"
            )

    def _packed(self, parameter: Tensor, name: str) -> str | None:
        return None if self._without_data and parameter.is_meta else _packed(parameter, name)

    def check_patterns(self, of: str = "frozen parameters") -> None:
        """Each pattern has matched something; each of ``include`` something that can train.

        Raises:
            ValueError: one has not.
        """
        for argument, patterns in (("include", self._wanted), ("exclude", self._unwanted)):
            for pattern in patterns:
                if pattern not in self._used:
                    raise ValueError(
                        f"{argument} must match names of {of}, got {pattern!r}, which matches none"
                    )
        for pattern, reasons in self._taken.items():
            if not reasons.keys() & {"", "excluded"}:
                said = " and ".join(f"{why} ones such as {name!r}" for why, name in reasons.items())
                raise ValueError(
                    f"include must match names of {of} that can train, got {pattern!r}, "
                    f"which matches only {said}" + _WHY_UNUSED * ("unused" in reasons)
                )


def _by_gradients(model: nn.Module) -> set[str]:
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in every if parameter.requires_grad}


def _with_weights(names: Sequence[str]) -> list[str]:
    """With those of the weights that side updates stand beside, by which users know them."""
    mark = f".{SIDE}."
    return [*names, *(f"{name.split(mark)[0]}.weight" for name in names if mark in name)]


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
    if is_of_bitsandbytes(parameter):
        return (
            "weights quantised by bitsandbytes in a zeroth-order group: train their scales by "
            "quantized='scales', updates of low rank beside them by quantized='low_rank', or leave "
            "them as they are by quantized='frozen'; or load the base model in bfloat16, in which "
            "all of it trains at inference memory, or leave these weights out by exclude="
        )
    if not could_learn(parameter):
        return None
    advice = "leave these weights out by exclude="
    try:
        for piece in pieces_of(parameter, f"parameter {name!r}"):
            check_weight(piece.tensor, f"parameter {name!r}")
    except TypeError as error:
        return (
            f"weights that cannot be perturbed in a zeroth-order group ({error}): load the base "
            f"model unquantised, in bfloat16 for example, {by_choice(parameter)}or {advice}"
        )
    return None


def could_learn(parameter: Tensor) -> bool:
    """False for integers and booleans, which hold no weight unless a quantised tensor does."""
    wrapped = is_wrapper_subclass(parameter)
    return wrapped or parameter.is_floating_point() or parameter.is_complex()


def parameters_with_all_names(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each parameter once, with every name under which the model knows it."""
    reshard(fsdp_modules(model))  # a forward pass may have left others in their places
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
