"""What 16-bit rounding does: drift and bias under perturbation, and survival of updates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.zofo_bench.mezo import MeZO
from zofo_kernels import DISTRIBUTIONS, NOISE_VERSIONS, Direction, noise, perturbed, update_
from zofo_optim import HybridZOFO

from .options import Bias, Drift, Survival

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DRIFTS = ("MeZO's recipe", "in place, two-sided", "in place, one-sided", "streamed")
PRIME = 1_000_003  # keeps the seeds that MeZO counts up apart between runs

Progress = Callable[[Iterable[int], str], Iterable[int]]


def weights(count: int, sigma: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Gaussian weights, the same numbers for every dtype, rounded to it."""
    generator = torch.Generator().manual_seed(seed)
    return (sigma * torch.randn(count, generator=generator)).to(dtype)


def log_spaced(last: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... and the last one."""
    steps = {m * 10**k for k in range(len(str(last))) for m in (1, 2, 5) if m * 10**k <= last}
    return sorted(steps | {last})


def idle_step(method: str, w: Tensor, mu: float, seed: int) -> Callable[[], Any]:
    """A step of training in which every loss is 0: it should leave the weights alone."""

    def loss() -> Tensor:
        return w[:1].float().sum() * 0  # reads w, so that streaming has something to perturb

    if method == "MeZO's recipe":
        mezo = MeZO([w], loss, lr=0.0, eps=mu)
        mezo.seed = seed * PRIME
        return mezo.step
    optimizer = HybridZOFO(
        [{"params": [w], "mode": "zo", "lr": 1e-3, "mu": mu}],
        estimator="one_sided" if method.endswith("one-sided") else "two_sided",
        perturbation="streamed" if method == "streamed" else "in_place",
        seed=seed,
    )
    return lambda: optimizer.step(loss)


def drift(options: Drift, progress: Progress) -> dict[str, Any]:
    """RMS distance from the start after some numbers of steps, by dtype and method."""
    marks = log_spaced(options.steps)
    result: dict[str, Any] = {"steps": marks, "rms": {}}
    for name, dtype in DTYPES.items():
        for method in DRIFTS:
            start = weights(options.count, options.sigma, dtype, options.seed)
            w = start.clone()
            step = idle_step(method, w, options.mu, options.seed)
            distances = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "the loss does not depend on the weights"
                for i in progress(range(1, options.steps + 1), f"drift, {name}, {method}"):
                    step()
                    if i in marks:
                        distances.append(
                            float((w.double() - start.double()).square().mean().sqrt())
                        )
            result["rms"].setdefault(name, {})[method] = distances
    return result


def survival(options: Survival, progress: Progress) -> dict[str, Any]:
    """What is left of one update lr c z of RMS size lr c, on weights of a dtype, by its rounding.

    `kept` is the part of the asked change that was made, <made, asked> / <asked, asked>: 1 is all.
    `error` is |made - asked| / |asked|: 1 is as much as losing it all, and where `kept` is 1 it is
    noise of mean 0. Means over `repeats` directions; `spread` is the sample deviation of `kept`.
    """
    count, seed, repeats, sizes = options.count, options.seed, options.repeats, options.sizes
    kinds = [(name, r) for name in DTYPES for r in ("stochastic", "nearest") if name != "fp32"]
    kinds.insert(0, ("fp32", "nearest"))
    result: dict[str, Any] = {"sizes": list(sizes)}
    for name, rounding in kinds:
        start = weights(count, options.sigma, DTYPES[name], seed)
        rows: dict[str, list[float]] = {"kept": [], "error": [], "spread": []}
        for i in progress(range(len(sizes)), f"survival, {name}, {rounding}"):
            kept, errors = [], []
            for repeat in range(repeats):
                w, direction = start.clone(), Direction(seed, repeat, 0, "gaussian")
                update_([w], [direction], torch.ones(1), sizes[i], rounding=rounding)
                asked = -sizes[i] * noise([count], direction, dtype=torch.float64)
                made = w.double() - start.double()
                square = asked.square().sum()
                kept.append(float((made * asked).sum() / square))
                errors.append(float(((made - asked).square().sum() / square).sqrt()))
            mean = sum(kept) / repeats
            spread = math.sqrt(sum((k - mean) ** 2 for k in kept) / max(repeats - 1, 1))
            for key, value in zip(rows, (mean, sum(errors) / repeats, spread), strict=True):
                rows[key].append(value)
        result[name if name == "fp32" else f"{name}, {rounding}"] = rows
    return result


def bias(options: Bias, progress: Progress) -> dict[str, Any]:
    """The share of a gradient g that two-sided estimates of the loss <g, w> hold on average.

    For weights of one size, uniform on [1, 2) times it, in each dtype, by distribution and noise
    version. With displacements d of the two sides the estimate is (<g, d+> - <g, d->) / (2 mu) v;
    its mean over v, element by element, is E[(d+ - d-) v] / (2 mu E[v v]) times g: 1 where
    nothing is lost. `error` is the standard error of the mean over weights and directions.
    """
    count, mu, repeats = options.count, options.mu, options.repeats
    kinds = [
        (dtype, distribution, version)
        for dtype in DTYPES
        for distribution in DISTRIBUTIONS
        for version in NOISE_VERSIONS
        if dtype != "fp32" or version == NOISE_VERSIONS[-1]
    ]
    result: dict[str, Any] = {"around": list(options.around)}
    for name, distribution, version in kinds:
        label = name if name == "fp32" else f"{name}, version {version}"
        rows: dict[str, list[float]] = {"share": [], "error": []}
        for i in progress(range(len(options.around)), f"bias, {label}, {distribution}"):
            generator = torch.Generator().manual_seed(options.seed)
            w = options.around[i] * (1 + torch.rand(count, generator=generator))
            w = w.to(DTYPES[name])
            shares, squares = [], []
            for repeat in range(repeats):
                direction = Direction(options.seed, repeat, 0, distribution, version)
                v = noise([count], direction, dtype=torch.float64)
                up, down = (perturbed(w, direction, s * mu).double() for s in (1, -1))
                shares.append((up - down) * v / (2 * mu))
                squares.append(v.square())
            every = torch.cat(shares) / torch.cat(squares).mean()
            rows["share"].append(float(every.mean()))
            rows["error"].append(float(every.std() / math.sqrt(every.numel())))
        result[f"{label}, {distribution}"] = rows
    return result
