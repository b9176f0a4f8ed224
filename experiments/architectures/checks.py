"""One step of HybridZOFO on a model, in several ways that must agree."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from zofo_optim.perturbation.verification import Verification

from .batches import Batch
from .building import first_line, loss_of
from .step import LR, MU, Step, contents, same, seed_all

RTOL, ATOL = 2e-5, 2e-6
"""Of losses that are equal but for rounding; fp32."""
BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


class Disagreement(AssertionError):
    """Two ways of one step differ by more than rounding."""


class PeftAlone(RuntimeError):
    """A model with peft's LoRA does not train, before this library is used."""


@contextmanager
def unverified() -> Iterator[None]:
    """Without a streamed step's own verification, dozens of runs: one check makes it."""
    with mock.patch.object(Verification, "check", return_value=None):
        yield


def agree(what: str, a: Tensor, b: Tensor, rtol: float = RTOL, atol: float = ATOL) -> None:
    """Raises Disagreement, unless ``a`` is ``b`` within the tolerances."""
    if not torch.allclose(a, b, rtol=rtol, atol=atol):
        off = float((a - b).abs().max())
        raise Disagreement(
            f"{what} differ by {off:.3g}: {a.flatten()[:2].tolist()} and {b.flatten()[:2].tolist()}"
        )


def updates_agree(a: Step, b: Step) -> None:
    """Weights after the step: the slopes' rounding, and that of weights moved there and back."""
    slack = LR * (RTOL * float(a.losses.abs().max()) + ATOL) / MU
    for before, x, y in zip(a.before, contents(a.model), contents(b.model), strict=True):
        if not torch.allclose(
            x,
            y,
            rtol=1e-6,
            atol=slack + 4e-7 + 1e-7 * float(before.abs().max() if before.numel() else 0),
        ):
            raise Disagreement(f"updated weights differ by {float((x - y).abs().max()):.3g}")


def check_streamed(model: Any, batch: Batch) -> dict[str, Any]:
    """In place against streamed: losses, slope, updates; streamed weights rest until updated."""
    a = Step(model, batch, perturbation="in_place")
    b = Step(model, batch, perturbation="streamed")
    if not b.unmoved:
        raise Disagreement("streamed weights moved before the update")
    agree("losses", a.losses, b.losses)
    updates_agree(a, b)
    if b.slope and same(b.before, contents(b.model)):
        raise Disagreement(f"a slope of {b.slope:.3g} moved no weight")
    return {"to_the_bit": bool(torch.equal(a.losses[0], b.losses[0])), "slope": b.slope}


def check_low_rank(model: Any, batch: Batch) -> dict[str, Any]:
    """Closed forms against low-rank directions that are made, and weights that a step spares."""
    with unverified():
        a = Step(model, batch, perturbation="in_place", structure="low_rank", rank=2)
        b = Step(model, batch, perturbation="streamed", structure="low_rank", rank=2)
    agree("losses", a.losses, b.losses, rtol=1e-4, atol=1e-5)
    return {}


def check_restored(model: Any, batch: Batch) -> dict[str, Any]:
    """A streamed step with lr=0 leaves every bit."""
    with unverified():
        step = Step(model, batch, perturbation="streamed", lr=0.0)
    if not same(step.before, contents(step.model)):
        raise Disagreement("a step with lr=0 changed weights")
    return {}


def check_lora(model: Any, batch: Batch) -> dict[str, Any]:
    """Hybrid: LoRA by gradients, which are those of backward alone, in place and streamed."""
    try:
        adapted = with_lora(model)
        plain = plain_gradients(copy.deepcopy(adapted), batch)  # some keep states of a pass
    except Exception as error:
        raise PeftAlone(first_line(error)) from error
    with unverified():
        a = Step(adapted, batch, perturbation="in_place")
        b = Step(adapted, batch, perturbation="streamed")
    for step in (a, b):
        if len(step.gradients) != len(plain):
            raise Disagreement(f"{len(step.gradients)} gradients, and {len(plain)} of backward")
        for x, y in zip(step.gradients, plain, strict=True):
            scale = float(y.abs().max())
            agree("gradients", x, y, rtol=1e-4, atol=1e-5 * scale + 1e-8)
    agree("losses", a.losses, b.losses)
    return {}


def plain_gradients(adapted: Any, batch: Batch) -> list[Tensor]:
    """Of the adapter, by torch alone.

    Raises:
        ValueError: there are none, or nothing but zeros.
    """
    seed_all()
    torch.autograd.backward(loss_of(adapted, batch))
    found = [p.grad for p in adapted.parameters() if p.grad is not None]
    if not any(bool(gradient.any()) for gradient in found):
        raise ValueError("no adapter weight has a gradient")
    return found


def with_lora(model: Any) -> Any:
    """A copy with peft's LoRA of rank 2 on all linear layers, or on these and convolutions by name.

    The second, where peft cannot tell the linear layers, or there are none.
    """
    from peft import LoraConfig, get_peft_model

    others = [  # such as routers, whose outputs peft does not expect
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear
    ]
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, torch.nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and name.split(".")[-1] not in ("out_proj", "conv1d")  # peft refuses Mamba's
    ]
    said: Exception | None = None
    # a list takes what ends so, too; a pattern is rewritten for some mixtures of experts
    for target in ("all-linear", names, "|".join(map(re.escape, names)) or "all-linear"):
        config = LoraConfig(
            r=2, init_lora_weights=False, exclude_modules=others or None, target_modules=target
        )
        torch.manual_seed(0)
        try:
            return get_peft_model(copy.deepcopy(model), config)
        except (ValueError, NotImplementedError) as error:
            said = said or error
    assert said is not None  # one is tried
    raise said


CHECKS: dict[str, Callable[[Any, Batch], dict[str, Any]]] = {
    "streamed": check_streamed,
    "low_rank": check_low_rank,
    "restored": check_restored,
    "lora": check_lora,
}


def _settle(model: Any, batch: Batch) -> None:
    """A forward pass: some models rescale weights in the first one of a mode (RWKV)."""
    with torch.no_grad():
        loss_of(model, batch)


def run_checks(model: Any, batch: Batch) -> dict[str, Any]:
    """Every check of `CHECKS` on a model whose weights are all frozen.

    Returns:
        ``passed`` (names of checks), ``failed`` (reasons by name), and what they measured. The
        first check is made in training mode (dropout), unless only evaluation mode serves: batch
        norms are frozen, as the statistics of two examples jump where the two are alike.
    """
    result: dict[str, Any] = {"passed": [], "failed": {}}
    model.requires_grad_(False)
    norms = any(isinstance(module, BATCH_NORMS) for module in model.modules())
    model.train(not norms)
    result["mode"] = "eval" if norms else "train"
    try:
        seed_all()
        _settle(model, batch)
    except Exception:
        model.eval()
        result["mode"] = "eval"
        _settle(model, batch)
    for name, check in CHECKS.items():
        if name == "low_rank":
            model.eval()
            _settle(model, batch)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result |= check(model, batch)
            result["passed"].append(name)
        except Exception as error:
            result["failed"][name] = first_line(error)
    return result
