"""Warnings about loops that run, and do not do what their author expects; each given once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import STATEFUL, caller_level
from .evaluation import Evaluation
from .settings import BEFORE, Settings
from .zo_groups import ZOGroup, has_16_bits

NO_ESTIMATE = (
    "step() needs a closure that returns the loss: call step(closure), or backward(closure) before "
    "step(). Where a trainer calls step() for you, let it pass its training step as the closure: "
    "for transformers' Trainer use zofo_optim.trainer.HybridTrainer, or HybridTrainerMixin for its "
    "subclasses; in Lightning's manual optimization call self.optimizers().step(closure)"
)


class Advice:
    """Remembers what it has said."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, topic: str, message: str | Callable[[], str]) -> None:
        """Warn with ``message``, unless something was said about the topic before."""
        if topic not in self._said:
            self._said.add(topic)
            found = message if isinstance(message, str) else message()
            warnings.warn(found, stacklevel=caller_level())

    def about_groups(
        self,
        groups: Sequence[ZOGroup],
        first_order: Sequence[Tensor],
        options: Mapping[str, Any],
        coupling: float = 0.0,
    ) -> None:
        """Momentum and coupling that no group has, parameters that get no gradients."""
        idle = [f"{name}={options[name]!r}" for name in STATEFUL if options.get(name)]
        if idle and not first_order:
            self.once(
                "momentum",
                f"{', '.join(idle)} does nothing, as zeroth-order groups keep no state and there "
                "is no group with mode='fo'; leave it out",
            )
        frozen = sum(not p.requires_grad for p in first_order)
        if frozen and not groups:
            self.once(
                "frozen",
                f"{frozen} of {len(first_order)} first-order parameters have requires_grad=False "
                "and do not train, and no group has mode='zo'; pass hybrid_param_groups(model, "
                "zo=dict(lr=...)) to train what is frozen by zeroth order, or leave it out",
            )
        if coupling and not (groups and first_order):
            missing = "zo" if first_order else "fo"
            self.once(
                "coupling",
                f"coupling={coupling!r} does nothing, as there is no group with mode={missing!r}; "
                "leave it out",
            )

    def about_losses(
        self,
        evaluations: Sequence[Evaluation],
        groups: Sequence[ZOGroup],
        first_order: Sequence[Tensor],
    ) -> None:
        """A loss without a graph where gradients were wanted, and 16-bit ones."""
        if any(p.requires_grad for p in first_order) and not evaluations[0].backpropagated:
            self.once(
                "no backward",
                "closure returned a loss without a graph and did not call backward, so the "
                "first-order groups got no gradients; return the loss tensor itself",
            )
        if evaluations[0].left:
            self.once(
                "left",
                "closure called backward for something that the loss which it returned does not "
                "come from, and left gradients in first-order parameters, to which those of the "
                "returned loss were added. If both are one loss, return the tensor that backward "
                "was called on, or its detached value; else clear the gradients after the first "
                "backward",
            )
        if groups and evaluations[0].scaled:
            self.once(
                "scaled loss",
                "closure returned a loss that it computed from what a GradScaler had scaled, so "
                "the zeroth-order step is multiplied by that scale; compute with the loss itself, "
                "and return it: scaler.scale(loss / n).backward(), then return loss / n",
            )
        for evaluation in evaluations if groups else ():
            dtype = getattr(evaluation.returned, "dtype", None)
            if dtype in (torch.float16, torch.bfloat16):
                self.once(
                    "16-bit loss",
                    f"closure returned a loss of dtype {dtype}: differences of 16-bit losses "
                    "cancel, and the zeroth-order estimate is mostly noise; compute the loss in "
                    "float32, for example loss_fn(logits.float(), labels)",
                )


def about_settings(
    settings: Settings,
    saved: dict[str, Any],
    rule: str | None,
    groups: Sequence[ZOGroup],
    anew: bool,
) -> None:
    """A state dict of an optimizer with other settings, under which the path is another.

    Args:
        settings: ours.
        saved: theirs; earlier versions of the library said less, and nothing is left of them where
            a checkpoint of torch's was flattened.
        rule: that of their groups, if they say so.
        groups: ours.
        anew: whether our rule found nothing there that it remembers.
    """
    ours = settings.of_the_path()
    if saved:  # earlier versions did not say what they had no choice in
        saved = {**BEFORE, **saved}
    if groups:
        saved = {**saved, "zo_rule": rule or saved.get("zo_rule", "sgd")}
    if not any(has_16_bits(p.dtype) for group in groups for p in group.params):
        del ours["noise_version"]  # versions differ in how those weights round
    others = [
        f"{name}={_given(value)} (here {_given(ours[name])})"
        for name, value in saved.items()
        if name in ours and value != ours[name]
    ]
    begins = "zo_rule found no running state there, and begins its own anew" if anew else ""
    if others:
        warnings.warn(
            "state_dict was saved by an optimizer constructed with "
            + ", ".join(others)
            + "; the same path is followed only with these, as arguments of HybridZOFO"
            + (begins and f"; {begins}"),
            stacklevel=caller_level(),
        )
    elif begins:
        warnings.warn(f"state_dict is not complete: {begins}", stacklevel=caller_level())


def _given(value: Any) -> str:
    """As one would write an argument; rules with options are saved as they are written."""
    return value if isinstance(value, str) and value.endswith(")") else repr(value)
