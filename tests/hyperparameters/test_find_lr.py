"""Range tests: they bracket what is known to be stable, and put all back."""

import math

import numpy as np
import pytest
import torch
from hybrid_nets import FO_CURVATURES, ZO_CURVATURES, Quadratic, check_same, everything, hybrid_net

from zofo_optim import HybridZOFO, Journal, find_lr
from zofo_optim.hyperparameters.outcomes import lines, outcome


def test_it_brackets_the_stability_limits():
    """SGD diverges above 2 / L, a zeroth-order step of quadratics above 2 / (tr H + 2 L)."""
    problem = Quadratic()
    found = find_lr(problem.optimizer, problem, steps=80)
    limits = 2 / ZO_CURVATURES.sum().item(), 2 / FO_CURVATURES.max().item()
    for test, limit in zip((found.zo, found.fo), limits, strict=True):
        assert limit / 50 < test.lr < limit < test.diverged < 100 * limit
        assert test.lr <= test.lowest < test.diverged
        assert test.losses[0] == problem().item()
        assert min(test.losses) < 0.99 * test.losses[0]
    assert found.lr_zo == found.zo.lr
    assert found.lr_fo == found.fo.lr
    assert found.steps == len(found.zo.losses) + len(found.fo.losses) - 2  # the last ones
    assert found.evaluations == 2 + found.steps + 2


def test_one_kind_of_groups_moves_at_a_time():
    """So the losses of its sweep are those without the other's weights."""
    both, alone = Quadratic(), Quadratic(("fo",))
    assert find_lr(both.optimizer, both).fo == find_lr(alone.optimizer, alone).fo
    only = find_lr(both.optimizer, both, modes=["fo"])
    assert only.zo is only.lr_zo is None
    assert find_lr(alone.optimizer, alone).zo is None


def test_batches_differ_in_nothing_but_what_is_learnt():
    """Offsets of the batches' losses are taken out."""
    problem = Quadratic(("fo",))
    closures = [lambda offset=offset: problem() + offset for offset in (0.0, 7.0, -3.0)]
    plain, found = find_lr(problem.optimizer, problem).fo, find_lr(problem.optimizer, closures).fo
    start = problem().item() + 4 / 3
    assert found.losses[0] == pytest.approx(start)
    wanted = [loss - plain.losses[0] + start for loss in plain.losses]
    reached = min(len(wanted), len(found.losses)) - 1
    assert found.losses[:reached] == pytest.approx(wanted[:reached])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(perturbation="streamed", zo_rule="normalized"),
        dict(fo_optimizer=torch.optim.SGD, momentum=0.9, num_samples=2, estimator="one_sided"),
    ],
)
def test_it_changes_nothing(options):
    net, optimizer, closures = hybrid_net(**options)
    optimizer.backward(closures[0])
    kept = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    optimizer.zero_grad()
    for p, gradient in zip(net.parameters(), kept, strict=True):  # left by something else
        p.grad = gradient
    before = everything(net, optimizer)
    first = find_lr(optimizer, closures, steps=20)
    check_same(before, net, optimizer)
    assert find_lr(optimizer, closures, steps=20) == first
    assert min(first.zo.losses) != first.zo.losses[0]  # it does move the weights


def test_losses_of_examples_are_averaged():
    """Also in the first-order sweep, where no example has a direction."""
    w = torch.nn.Parameter(torch.ones(3, 2), False)
    y = torch.nn.Parameter(torch.ones(2))
    groups = [dict(params=[w], mode="zo", lr=1.0), dict(params=[y], mode="fo", lr=1.0)]
    options = dict(directions="per_example", structure="low_rank", perturbation="streamed")
    optimizer = HybridZOFO(groups, **options)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = find_lr(optimizer, lambda: (torch.nn.functional.linear(x, w.T) + y).square().sum(1))
    for test in (found.zo, found.fo):
        assert min(test.losses) < 0.97 * test.losses[0]
        assert test.diverged is not None


@pytest.mark.parametrize("fails_at", [1, 5, 40, 90])
def test_nor_where_the_closure_raises(fails_at):
    net, optimizer, closures = hybrid_net()
    before = everything(net, optimizer)
    runs = 0

    def failing():
        nonlocal runs
        runs += 1
        if runs == fails_at:
            raise KeyboardInterrupt
        return closures[0]()

    with pytest.raises(KeyboardInterrupt):
        find_lr(optimizer, failing, steps=40)
    check_same(before, net, optimizer)


def test_training_goes_on_as_without_it():
    tried, plain = hybrid_net(), hybrid_net()
    find_lr(tried[1], tried[2], steps=15)
    for net, optimizer, closures in (tried, plain):
        torch.manual_seed(1)
        optimizer.step(closures[2])
        assert net.training
    for a, b in zip(tried[0].parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_journal_hears_nothing(tmp_path):
    net, optimizer, closures = hybrid_net()
    with Journal(tmp_path / "run.zofo").attach(optimizer, net) as journal:
        optimizer.step(closures[0])
        journal.flush()
        size = journal.path.stat().st_size
        find_lr(optimizer, closures, steps=10)
        journal.flush()
        assert journal.path.stat().st_size == size
        optimizer.step(closures[1])


def test_losses_that_do_not_fall_give_no_rate():
    y = torch.nn.Parameter(torch.zeros(3))
    optimizer = HybridZOFO([y], lr=1.0)
    found = find_lr(optimizer, lambda: 1 + y.square().sum())
    assert found.lr_fo is None
    assert "did not fall visibly" in str(found)


def test_nonfinite_losses_end_a_sweep():
    problem = Quadratic(nonfinite="raise")
    start = problem().item()

    def barred():
        loss = problem()
        return torch.where(loss < 1.2 * start, loss, math.inf)

    found = find_lr(problem.optimizer, barred, modes=["zo"]).zo
    assert found.diverged == found.rates[-1]
    assert found.losses[-1] == math.inf
    assert len(found.smoothed) == len(found.losses) - 1


def test_outcome_of_losses():
    """A fall around 1e-2 and a rise around 10: what falls again later is elsewhere."""
    x = np.linspace(-6, 4, 101)
    valley = 5 - 2 / (1 + np.exp(-4 * (x + 2))) + 4 / (1 + np.exp(-6 * (x - 1))) - 6 * (x > 3)
    found = outcome((10.0**x).tolist(), valley.tolist(), early_stop=2.0, steps=101)
    assert found.lr == pytest.approx(1e-2, rel=0.3)
    assert 0.3 < found.lowest < 3
    assert found.diverged is None
    high = np.where(x > 2, 11.0, valley)[:82]
    ended = outcome((10.0 ** x[:82]).tolist(), high.tolist(), early_stop=2.0, steps=101)
    assert ended.lr == found.lr
    assert ended.diverged == ended.rates[-1]


def test_noise_is_no_fall():
    rates = [10.0**k for k in range(-6, 5)]
    noise = [5.0, 5.1, 4.9, 5.1, 4.9, 5.1, 4.9, 5.1, 4.9, 5.1, 4.9]
    assert outcome(rates, noise, early_stop=2.0, steps=11).lr is None
    at_once = outcome(rates, [math.nan], early_stop=2.0, steps=11)
    assert (at_once.lr, at_once.diverged, at_once.smoothed) == (None, rates[0], ())


def test_straight_lines_stay():
    values = torch.arange(9.0).numpy()
    smooth, slopes = lines(3 * values + 1, 2)
    assert smooth.tolist() == pytest.approx((3 * values + 1).tolist())
    assert slopes.tolist() == pytest.approx([3.0] * 9)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    problem = Quadratic()
    found = find_lr(problem.optimizer, problem, steps=20)
    found.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be():
    problem = Quadratic()
    optimizer = problem.optimizer
    for steps in (9, True, 20.0):
        with pytest.raises(ValueError, match="steps must be an int >= 10"):
            find_lr(optimizer, problem, steps=steps)
    for given in ((1.0, 0.1), (0.0, 1.0), 3.0, (1.0, math.inf)):
        with pytest.raises(ValueError, match="zo must be two rates, 0 < low < high"):
            find_lr(optimizer, problem, zo=given)
    with pytest.raises(ValueError, match="modes must be some of 'zo' and 'fo'"):
        find_lr(optimizer, problem, modes="zo")
    with pytest.raises(ValueError, match="early_stop must be a finite number > 1"):
        find_lr(optimizer, problem, early_stop=1.0)
    with pytest.raises(ValueError, match="finite losses at the start"):
        find_lr(optimizer, lambda: problem() * math.nan)
    with pytest.raises(RuntimeError, match="must not be called inside a closure"):
        optimizer.step(lambda: find_lr(optimizer, problem))


def test_ratios_of_groups_are_kept():
    """One of curvature 400 has a thousandth of the rate: alone, 2 / 400 would be the limit."""
    y, z = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    groups = [dict(params=[y], lr=1.0), dict(params=[z], lr=1e-3)]
    optimizer = HybridZOFO(groups)
    found = find_lr(optimizer, lambda: (2 * y.square() + 200 * z.square()).sum())
    assert found.fo.diverged > 0.5
    found.apply(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [found.lr_fo, 1e-3 * found.lr_fo]


def test_the_picture_shows_a_small_fall(tmp_path, monkeypatch):
    """The rise at the end would hide it."""
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: seen.append(self))
    problem = Quadratic(("fo",))
    found = find_lr(problem.optimizer, lambda: problem() + 1000)
    found.plot(tmp_path / "rates.png")
    low, high = seen[0].axes[0].get_ylim()
    assert low < min(found.fo.smoothed)
    assert high - low < 3 * (found.fo.losses[0] - min(found.fo.smoothed))
