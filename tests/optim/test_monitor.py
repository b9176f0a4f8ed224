"""What a person reads: the report's line, and the size of an update."""

import re

import pytest
import torch
from torch.nn import Parameter

from zofo_optim import HybridZOFO


def problem(*modes, **options):
    groups, params = [], []
    for i, mode in enumerate(modes):
        generator = torch.Generator().manual_seed(i)
        w = Parameter(torch.randn(3000, generator=generator), mode == "fo")
        groups.append(dict(params=[w], mode=mode, lr=1e-3 * (i + 1)))
        params.append(w)
    optimizer = HybridZOFO(groups, **options)
    return optimizer, params, lambda: sum((w**2).mean() for w in params)


LINE = re.compile(
    r"step (\d+): loss (\d+\.\d{4}), slope (\d\.\d{2}e[+-]\d\d), "
    r"update (\d\.\de[+-]\d\d) of the weights' norm, skipped (\d+)"
)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("samples", [1, 4])
def test_the_report(distribution, samples):
    optimizer, params, closure = problem(
        "zo", "zo", distribution=distribution, num_samples=samples, mu=1e-2
    )
    optimizer.step(closure)
    before = torch.cat([p.detach().clone() for p in params])
    optimizer.step(closure)
    after = torch.cat([p.detach() for p in params])
    step, loss, slope, size, skipped = LINE.fullmatch(optimizer.report()).groups()
    assert (int(step), int(skipped)) == (2, 0)
    assert float(loss) == pytest.approx(float(optimizer.last_loss), abs=1e-4)
    wanted = float(optimizer.projected_grads.abs().mean())
    assert float(slope) == pytest.approx(wanted, rel=1e-2)
    measured = float((after - before).norm() / before.norm())
    assert float(size) == pytest.approx(measured, rel=0.1)  # two digits, and d = 6,000


def test_before_and_without():
    optimizer, _, closure = problem("zo")
    assert optimizer.report() == "step 0: skipped 0"
    optimizer.backward(closure)
    assert re.fullmatch(r"step 0: loss \S+, slope \S+, skipped 0", optimizer.report())
    optimizer, _, closure = problem("fo")
    assert optimizer.report() == "nothing estimated yet"
    optimizer.step(closure)
    assert re.fullmatch(r"loss \d\.\d{4}", optimizer.report())


def test_skipped_estimates():
    optimizer, _, closure = problem("zo", "fo")
    optimizer.step(closure)
    optimizer.step(lambda: closure() * float("nan"))
    report = optimizer.report()
    assert report.startswith("step 2: loss nan, slope 0.00e+00, update 0.0e+00 of")
    assert report.endswith("skipped 1")
    assert optimizer.skipped_steps == 1


def test_sixteen_bit_weights_are_summed_in_fp32():
    w = Parameter(torch.full((20_000,), 0.1, dtype=torch.float16), False)
    optimizer = HybridZOFO([dict(params=[w], mode="zo", lr=1.0)], distribution="rademacher")
    optimizer.step(lambda: w.float().mean())
    coefficient = abs(float(optimizer.projected_grads))
    size = float(LINE.fullmatch(optimizer.report()).group(4))
    assert size == pytest.approx(coefficient / 0.1, rel=0.1)
