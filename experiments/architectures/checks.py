"""One step of HybridZOFO on a model, in several ways that must agree."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from zofo_optim import HybridZOFO, hybrid_param_groups

from .batches import Batch
from .building import first_line, loss_of

MU, LR, SEED = 2.0**-9, 2.0**-12, 5
RTOL, ATOL = 2e-5, 2e-6
"""Of losses that are equal but for rounding; fp32."""
BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


class Disagreement(AssertionError):
    """Two ways of one step differ by more than rounding."""


class Step:
    """A step of a copy of the model, and what it saw.

    Args:
        model: is copied.
        batch: of the loss.
        options: of the optimizer.
    """

    def __init__(self, model: Any, batch: Batch, **options: Any) -> None:
        self.model, self.batch = copy.deepcopy(model), batch
        self.before = contents(self.model)
        self.seen: list[Tensor] = []
        lr = options.pop("lr", LR)
        fo = [p for p in self.model.parameters() if p.requires_grad]
        groups = hybrid_param_groups(
            self.model,
            zo=dict(lr=lr, mu=MU),
            fo=dict(lr=LR) if fo else None,
            verbose=False,
        )
        options = {"distribution": "rademacher", "seed": SEED, **options}
        self.optimizer = HybridZOFO(groups, **options)
        self.clean = bool(fo)
        seed_all()
        self.optimizer.backward(self._closure)
        self.unmoved = same(self.before, contents(self.model))
        self.gradients = [p.grad.clone() for p in fo if p.grad is not None]
        self.optimizer.step()

    def _closure(self) -> Tensor:
        loss = loss_of(self.model, self.batch)
        self.seen.append(loss.detach().clone())
        return loss

    @property
    def losses(self) -> Tensor:
        """At the perturbed points: plus, minus."""
        plus = self.seen[1 if self.clean else 0]
        return torch.stack([plus, self.seen[-1]]).double()

    @property
    def slope(self) -> float:
        slopes = self.optimizer.projected_grads
        assert slopes is not None  # since a step was made
        return float(slopes.reshape(-1)[0])


def contents(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """To the bit, also where a weight is no number."""
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        if x.numel() and x.dim()
        else torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def seed_all() -> None:
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002  # what models mask by
    torch.manual_seed(0)


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
    a = Step(model, batch, perturbation="in_place", structure="low_rank", rank=2)
    b = Step(model, batch, perturbation="streamed", structure="low_rank", rank=2)
    agree("losses", a.losses, b.losses, rtol=1e-4, atol=1e-5)
    return {}


def check_restored(model: Any, batch: Batch) -> dict[str, Any]:
    """A streamed step with lr=0 leaves every bit."""
    step = Step(model, batch, perturbation="streamed", lr=0.0)
    if not same(step.before, contents(step.model)):
        raise Disagreement("a step with lr=0 changed weights")
    return {}


def check_lora(model: Any, batch: Batch) -> dict[str, Any]:
    """Hybrid: LoRA by gradients, which are those of backward alone, in place and streamed."""
    adapted = with_lora(copy.deepcopy(model))
    a = Step(adapted, batch, perturbation="in_place")
    b = Step(adapted, batch, perturbation="streamed")
    seed_all()
    torch.autograd.backward(loss_of(adapted, batch))
    plain = [p.grad for p in adapted.parameters() if p.grad is not None]
    if not plain or not any(bool(g.any()) for g in plain):
        raise Disagreement("no adapter weight has a gradient")
    for step in (a, b):
        if len(step.gradients) != len(plain):
            raise Disagreement(f"{len(step.gradients)} gradients, and {len(plain)} of backward")
        for x, y in zip(step.gradients, plain, strict=True):
            scale = float(y.abs().max())
            agree("gradients", x, y, rtol=1e-4, atol=1e-5 * scale + 1e-8)
    agree("losses", a.losses, b.losses)
    return {}


def with_lora(model: Any) -> Any:
    """peft's LoRA of rank 2 on all linear layers, or on convolutions where there are none."""
    from peft import LoraConfig, get_peft_model

    others = [  # such as routers, whose outputs peft does not expect
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear
    ]
    options: dict[str, Any] = dict(r=2, init_lora_weights=False, exclude_modules=others or None)
    try:
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(target_modules="all-linear", **options))
    except (ValueError, NotImplementedError):
        names = [
            name
            for name, module in model.named_modules()
            if type(module) in (torch.nn.Linear, torch.nn.Conv2d)
            and getattr(module, "groups", 1) == 1
            and name.split(".")[-1] not in ("out_proj", "conv1d")  # peft refuses Mamba's
        ]
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(target_modules=names, **options))


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
