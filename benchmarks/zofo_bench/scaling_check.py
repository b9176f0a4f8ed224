"""The model of scaling, held against steps that were measured on this machine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from .cluster import GPU, Latency, Network
from .ranks import FURTHER, STRATEGIES, SUMMED
from .scaling import (
    Model,
    Strategy,
    Work,
    fo_ddp,
    hybrid_lora,
    zo_data_parallel,
    zo_fsdp,
    zo_per_example,
    zo_samples,
)

_SCALE = 1e9
"""What counts as an instruction here takes a nanosecond: passes are measured whole."""
_KINDS = {"ZO, samples in parallel": "rademacher", "ZO, per example": "rank 1"}
"""Of strategies whose directions are not Gaussian: on a CPU their passes are faster."""


def modelled(sizes: dict[str, Any]) -> dict[str, Strategy]:
    """The model's part for each strategy that was measured."""
    found = (
        *(zo_data_parallel, zo_samples, zo_per_example(sizes["rows"])),
        *(hybrid_lora, zo_fsdp, fo_ddp),
    )
    return dict(zip(STRATEGIES, found, strict=True))


def fitted(found: dict[str, Any], ranks: int) -> tuple[Model, GPU, Network, Work]:
    """This machine with so many processes at once, by what was measured of the steps' parts alone.

    Args:
        found: what :func:`.ranks.measured` gave.
        ranks: how many processes did.
    """
    sizes, parts = found["sizes"], found["parts"]

    def seconds(name: str) -> float:
        return float(parts[name]["seconds"]["median"])

    parameters = float(sizes["parameters"])
    tokens = sizes["rows"] * sizes["tokens"]
    forward, latency = seconds("forward"), seconds("all-gather of 32 bytes")
    backward = max(seconds("forward and backward") - forward, 1e-9)
    wire = max(seconds("all-reduce of 16 MiB") - latency, 1e-9)
    gathering = max(seconds("all-gather of 16 MiB") - latency, 1e-9)
    once = Latency(latency, 0.0, 0.0)
    model = Model(
        sizes["model"],
        parameters,
        sizes["layers"],
        sizes["width"],
        sizes["vocabulary"],
        sizes["rows_and_columns"],
        itemsize=4,
    )
    machine = GPU(
        flops=2 * parameters * tokens / forward,
        backward=2 * forward / backward,
        bandwidth=12 * parameters / seconds("SGD"),
        issue=_SCALE,
        memory=math.inf,
    )
    bandwidth = 2 * (ranks - 1) / ranks * SUMMED / wire if ranks > 1 else math.inf
    network = Network(
        name="gloo",
        within=bandwidth,
        between=bandwidth,
        node=ranks,
        small=once,
        tree=once,
        large=once,
        hidden=0.0,  # the cores that compute also copy
        gathered=wire / 2 / gathering,  # sums send everything twice
        small_share=1.0,
    )
    further = {
        kind: max(
            0.0,
            seconds(f"update, {FURTHER} directions, {kind}")
            - seconds(f"update, 1 direction, {kind}"),
        )
        / (FURTHER - 1)
        for kind in ("gaussian", "rademacher", "rank 1")
    }
    per_element = _SCALE / parameters
    work = Work(
        tokens=tokens,
        perturb=seconds("recover and perturb") * per_element,
        update=seconds("restore and update") * per_element,
        direction={kind: value * per_element for kind, value in further.items()},
        adapter_rank=sizes["adapter"] / sizes["rows_and_columns"],
        trained=8.0,
        stepped=12.0,
        gradient=4.0,
    )
    return model, machine, network, work


def predicted(found: dict[str, Any], ranks: int) -> dict[str, dict[str, float]]:
    """Of each strategy: seconds, over those measured, and the bytes of a step."""
    model, machine, network, gaussian = fitted(found, ranks)
    result = {}
    for name, strategy in modelled(found["sizes"]).items():
        work = gaussian
        if name in _KINDS:
            one = found["parts"][f"update, 1 direction, {_KINDS[name]}"]["seconds"]["median"]
            each = one * _SCALE / model.parameters
            work = replace(gaussian, perturb=each, update=each)
        step = strategy(model, machine, network, ranks, work)
        measured = found["steps"][name]["seconds"]["median"]
        result[name] = {
            "seconds": step.seconds,
            "over_measured": step.seconds / measured,
            "bytes": step.sent,
        }
    return result
