"""Displacements of low rank as LoRA adapters, which any multi-LoRA server evaluates.

Along a direction of rank r a matrix W, (m, n), is displaced by scale / sqrt(r) U V^T (U is (m, r),
V is (n, r)). That is the adapter with A = V^T, B = scale / sqrt(r) U and a scaling of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from zofo_kernels import Shift, factors

from ..journal.match import some
from ..names import unwrapped
from ..zo_groups import ZOGroup


class Target(NamedTuple):
    """A zeroth-order matrix that an adapter displaces."""

    name: str
    """The parameter's, as adapters know it: as in the checkpoint that is served."""
    parameter: Tensor
    noise_index: int
    embedding: bool = False
    """Whether it is the table of an embedding, whose adapter is laid out otherwise."""

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def targets_of(groups: Sequence[ZOGroup], model: nn.Module) -> list[list[Target]]:
    """Of each zeroth-order group, by the names that ``model`` has for them.

    Raises:
        ValueError: the model does not hold a parameter, or an adapter cannot displace it.
    """
    layers: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in unwrapped(model).named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            layers.setdefault(id(parameter), []).append((f"{prefix}.{attribute}", module))
    missing = [
        n for g in groups for n, p in zip(g.names, g.params, strict=True) if id(p) not in layers
    ]
    if missing:
        raise ValueError(
            f"model must hold all zeroth-order parameters, not so {len(missing)}: {some(missing)}"
        )
    wrong: list[str] = []
    found: list[list[Target]] = []
    for group in groups:
        of_group = []
        for parameter, index in zip(group.params, group.indices, strict=True):
            name, module = layers[id(parameter)][0]
            one = len(layers[id(parameter)]) == 1 and name.endswith(".weight")
            if not (one and isinstance(module, nn.Linear | nn.Embedding)):
                wrong.append(name)
            of_group.append(Target(name, parameter, index, isinstance(module, nn.Embedding)))
        found.append(of_group)
    if wrong:
        raise ValueError(
            "zeroth-order parameters must be weights of linear layers and embeddings, each of one "
            f"layer, as adapters displace no others; {len(wrong)} are not: {some(wrong)}. Leave "
            "biases, norms and tied weights out, by hybrid_param_groups(..., exclude=[...]) or "
            r"include=r'proj\.weight$'"
        )
    elsewhere = [t.name for of_group in found for t in of_group if t.parameter.device.type != "cpu"]
    if elsewhere:
        raise ValueError(
            "zeroth-order parameters must be on the CPU, where an engine makes the same updates, "
            f"bit for bit; {len(elsewhere)} are not: {some(elsewhere)}"
        )
    return found


def lora_tensors(
    targets: Sequence[Sequence[Target]], shifts: Sequence[Shift], *, backend: str = "auto"
) -> dict[str, Tensor]:
    """The tensors of the adapter that displaces all targets, by peft's names; float32.

    Args:
        targets: of each zeroth-order group.
        shifts: of each, as :meth:`zofo_optim.HybridZOFO.ask` gives them.
        backend: makes the factors, as in the optimizer.
    """
    found: dict[str, Tensor] = {}
    for of_group, shift in zip(targets, shifts, strict=True):
        made = factors(
            [target.parameter.shape for target in of_group],
            [shift.direction],
            indices=[target.noise_index for target in of_group],
            backend=backend,
        )
        weight = shift.scale / math.sqrt(shift.direction.rank)
        for target, (left, right) in zip(of_group, made, strict=True):
            u, v = weight * left[0], right[0]  # (r, m) and (r, n)
            start = f"base_model.model.{target.module}"
            if target.embedding:  # the product is transposed
                found[f"{start}.lora_embedding_A"] = u
                found[f"{start}.lora_embedding_B"] = v.t().contiguous()
            else:
                found[f"{start}.lora_A.weight"] = v.clone()  # factors share memory
                found[f"{start}.lora_B.weight"] = u.t().contiguous()
    return found


def lora_config(targets: Sequence[Sequence[Target]], rank: int) -> dict[str, Any]:
    """What ``adapter_config.json`` says of such an adapter."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # a scaling of 1
        "target_modules": sorted({target.module for of_group in targets for target in of_group}),
        "bias": "none",
        "inference_mode": True,
    }
