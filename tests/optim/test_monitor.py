"""What a person reads: the report's line, and the size of an update."""

import copy
import re

import pytest
import torch
from torch.nn import Parameter

from zofo_optim import HybridZOFO, Listener
from zofo_optim.monitor import relative_size


def problem(*modes, **options):
    groups, params = [], []
    for i, mode in enumerate(modes):
        generator = torch.Generator().manual_seed(i)
        w = Parameter(torch.randn(3000, generator=generator), mode == "fo")
        groups.append(dict(params=[w], mode=mode, lr=1e-3 * (i + 1)))
        params.append(w)
    optimizer = HybridZOFO(groups, **options)
    return optimizer, params, lambda: sum((w**2).mean() for w in params)


class Told(Listener):
    def updated(self, updates):
        self.updates = updates


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
    optimizer.add_listener(told := Told())
    optimizer.step(closure)
    after = torch.cat([p.detach() for p in params])
    step, loss, slope, size, skipped = LINE.fullmatch(optimizer.report()).groups()
    assert (int(step), int(skipped)) == (2, 0)
    assert float(loss) == pytest.approx(float(optimizer.last_loss), abs=1e-4)
    wanted = float(optimizer.projected_grads.abs().mean())
    assert float(slope) == pytest.approx(wanted, rel=1e-2)
    measured = float((after - before).norm() / before.norm())
    exact = relative_size(told.updates, optimizer.zo_groups())
    assert exact == pytest.approx(measured, rel=0.05)
    assert size == f"{exact:.1e}"


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


def test_what_is_skipped_is_counted_once_an_estimate():
    optimizer, _, closure = problem("zo", num_samples=2)
    for factor in (float("nan"), 1.0, float("inf")):
        optimizer.backward(lambda factor=factor: closure() * factor)
    assert optimizer.report().endswith("skipped 2")
    optimizer.step()
    optimizer.step(closure)
    assert optimizer.report().endswith("skipped 2")


def test_nothing_is_left_of_the_update_in_a_copy():
    """A copy reports its own; the count of what was skipped goes with it."""
    optimizer, _, closure = problem("zo")
    optimizer.step(lambda: closure() * float("nan"))
    assert copy.deepcopy(optimizer).report() == "step 1: skipped 1"


@pytest.mark.parametrize("modes", [("zo",), ("fo",), ("zo", "fo")], ids="+".join)
def test_losses_of_micro_batches_are_summed(modes):
    """A step descends their sum; here as in most loops each is divided by their number."""
    optimizer, _, closure = problem(*modes)
    for scales in ((1.0, 2.0, 6.0), (4.0, 2.0)):  # the second step starts from nothing
        losses, slopes = [], []
        for scale in scales:
            share = scale / len(scales)
            optimizer.backward(lambda share=share: closure() * share)
            losses.append(float(optimizer.last_loss))
            slopes.append(0 if "zo" not in modes else float(optimizer.projected_grads[0]))
            said = re.search(r"loss (\S+?)(,|$)", optimizer.report()).group(1)
            assert float(said) == pytest.approx(sum(losses), abs=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        report = optimizer.report()
        assert float(re.search(r"loss (\d+\.\d{4})", report).group(1)) == pytest.approx(
            sum(losses), abs=1e-4
        )
        if "zo" in modes:
            slope = float(re.search(r"slope (\S+),", report).group(1))
            assert slope == pytest.approx(abs(sum(slopes)), rel=1e-2)


def test_what_zero_grad_dropped_is_not_in_the_sum():
    optimizer, _, closure = problem("zo")
    optimizer.backward(closure)
    optimizer.zero_grad()
    optimizer.step(closure)
    assert f"loss {float(optimizer.last_loss):.4f}," in optimizer.report()


def test_a_group_that_joins_while_first_order_accumulates():
    optimizer, _, closure = problem("fo")
    optimizer.backward(closure)
    first = float(optimizer.last_loss)
    w = Parameter(torch.ones(3), False)
    optimizer.add_param_group(dict(params=[w], mode="zo", lr=1e-3))
    optimizer.backward(lambda: closure() + w.sum())
    assert f"loss {first + float(optimizer.last_loss):.4f}, slope" in optimizer.report()
