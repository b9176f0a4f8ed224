"""Suggested rates against closed forms on quadratics; and that nothing is changed."""

import itertools
import math

import pytest
import torch
from hybrid_nets import (
    FO_CURVATURES,
    ZO_CURVATURES,
    Quadratic,
    check_same,
    everything,
    hybrid_net,
)
from torch.nn import Parameter

from zofo_optim import HybridZOFO, Normalized, find_lr, suggest_hyperparameters
from zofo_optim.hyperparameters.first_order import turning
from zofo_optim.hyperparameters.rates import OF_FIRST_ORDER, OF_ZEROTH_ORDER, rates_of
from zofo_optim.hyperparameters.updates import WARM, trial_update
from zofo_optim.hyperparameters.zeroth_order import Terms, ZerothOrder
from zofo_optim.smoothness import along_directions
from zofo_optim.smoothness.forward import displacement
from zofo_optim.theory import theorem_step_sizes

TRACE = ZO_CURVATURES.sum().item()


def along_gradient(problem):
    """g' H g / g' g."""
    g = problem.gradient
    return ((ZO_CURVATURES * g) @ g / (g @ g)).item()


def test_the_zeroth_order_rate_of_gaussian_directions():
    """E[s^2 v'Hv] is |g|^2 tr H + 2 g'Hg; within 4 of its standard errors, and these below 5 %."""
    problem = Quadratic()
    found = suggest_hyperparameters(problem.optimizer, problem, directions=600)
    right = 1 / (TRACE + 2 * along_gradient(problem))
    measured = found.zeroth_order
    assert 0 < measured.error < 0.05 * right
    assert abs(measured.terms.lr - right) < 4 * measured.error
    assert abs(measured.trace - TRACE) < 4 * measured.trace_error < 0.2 * TRACE
    assert found.practical.lr_zo == OF_ZEROTH_ORDER * measured.terms.lr
    assert found.practical.warnings == ()
    assert found.evaluations >= 1 + 2 * 600


def test_signs_have_no_fourth_moment():
    """With a diagonal H every ±1 direction has the curvature tr H, so the rate is 1 / tr H."""
    problem = Quadratic(distribution="rademacher")
    found = suggest_hyperparameters(problem.optimizer, problem, directions=8).zeroth_order
    assert found.trace == pytest.approx(TRACE, rel=1e-6)
    assert found.terms.lr == pytest.approx(1 / TRACE, rel=1e-6)
    assert found.error < 1e-6 / TRACE


@pytest.mark.parametrize("samples", [4, 20])
def test_several_directions_allow_a_larger_rate(samples):
    """E[u'Hu] is |g|^2 tr H / q + (1 + 1 / q) g'Hg; to 20 %, some 2 standard errors."""
    problem = Quadratic(num_samples=samples)
    found = suggest_hyperparameters(problem.optimizer, problem, directions=600).zeroth_order
    along = along_gradient(problem)
    right = 1 / (TRACE / samples + (1 + 1 / samples) * along)
    assert found.terms.lr == pytest.approx(right, rel=0.2)


def test_a_rule_s_rate_is_in_its_units():
    """With slopes over their root mean square a rate is larger by it; to 15 %."""
    plain = Quadratic()
    ruled = Quadratic(zo_rule=Normalized(beta=0.999))
    rates = [
        suggest_hyperparameters(p.optimizer, p, directions=200).zeroth_order.terms.lr
        for p in (plain, ruled)
    ]
    assert rates[1] / rates[0] == pytest.approx(plain.gradient.norm().item(), rel=0.15)


def test_directions_of_examples():
    """Losses a_b + <g, x> + x'Hx/2 of examples that agree: an eighth of
    the part of one direction, and 7/8 of that of two, the covariance's half.
    """
    draw = torch.Generator().manual_seed(3)
    w = Parameter(torch.randn(6, 5, generator=draw, dtype=torch.float64), False)
    h = torch.linspace(0.5, 2.0, 30, dtype=torch.float64).view(6, 5)
    options = dict(structure="low_rank", perturbation="streamed", directions="per_example")

    def losses():
        return (h * w.square()).sum().expand(8) / 2 + torch.arange(8.0, dtype=torch.float64)

    optimizer = HybridZOFO([("w", w)], mode="zo", lr=1.0, **options)
    shared = HybridZOFO([("w", w)], mode="zo", lr=1.0, structure="low_rank")
    many = suggest_hyperparameters(optimizer, losses, directions=150).zeroth_order.terms
    one = suggest_hyperparameters(shared, lambda: losses().mean(), directions=150)
    alone = one.zeroth_order.terms
    assert many.gain == pytest.approx(alone.gain)
    along = along_directions(shared, lambda: losses().mean(), directions=150)
    squares, forms = along.slopes.square(), along.curvatures
    pair = ((squares * forms).mean() - squares.mean() * forms.mean()).item() / 2
    assert pair > 0
    assert alone.bend == pytest.approx((squares * forms).mean().item())
    assert many.bend == pytest.approx(alone.bend / 8 + 7 / 8 * pair)


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({}, None),
        (dict(momentum=0.9), "tenth"),
    ],
)
def test_the_rate_of_sgd(options, right):
    """g'g / g'Hg; with momentum, whose update is ten gradients in the end, a tenth, to 5 %."""
    problem = Quadratic(("fo",), **options)
    g = FO_CURVATURES * problem.y.detach()
    wanted = (g @ g / ((FO_CURVATURES * g) @ g)).item() / (10 if right else 1)
    found = suggest_hyperparameters(problem.optimizer, problem)
    assert found.first_order.lr == pytest.approx(wanted, rel=0.05 if right else 1e-6)
    assert found.practical.lr_fo == OF_FIRST_ORDER * found.first_order.lr
    assert found.practical.lr_zo is found.practical.mu is found.zeroth_order is None


def test_the_rate_of_adam():
    """Its update is the gradient's sign: |g|_1 / tr H; and it is ill-conditioned here."""
    problem = Quadratic(("fo",), fo_optimizer=torch.optim.Adam)
    g = FO_CURVATURES * problem.y.detach()
    found = suggest_hyperparameters(problem.optimizer, problem)
    right = (g.abs().sum() / FO_CURVATURES.sum()).item()
    assert found.first_order.lr == pytest.approx(right, rel=1e-4)
    along = found.first_order.curvature
    assert along == pytest.approx(FO_CURVATURES.sum().item(), rel=1e-4)


def test_rates_of_first_order_groups_keep_their_ratio():
    """The second group's update is a tenth: lr* is that of (u_1, u_2 / 10)."""
    y, z = (Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = [dict(params=[y], lr=0.5), dict(params=[z], lr=0.05)]
    optimizer = HybridZOFO(groups)
    found = suggest_hyperparameters(optimizer, lambda: (y.square().sum() + z.square().sum()) / 2)
    assert found.first_order.lr == pytest.approx((1 + 0.1) / (1 + 0.01))


def test_curvature_is_that_of_the_length_of_the_step():
    """f = y^4 / 4 from 1: along u = 1 the loss is lowest at y = 0, where Newton says 1 / 3."""
    y = Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = HybridZOFO([y], lr=1.0)
    found = suggest_hyperparameters(optimizer, lambda: (y**4).sum() / 4).first_order
    assert found.slope / found.curvature == pytest.approx(1 / 3, rel=0.01)
    assert 0.6 < found.lr < 1.1


def test_mu_weighs_truncation_against_rounding():
    """f = a x^3 / 6 in single precision around 1: the third derivative is a."""
    x = Parameter(torch.zeros(1), False)
    optimizer = HybridZOFO([x], mode="zo", lr=1.0, mu=0.3, distribution="rademacher")
    found = suggest_hyperparameters(optimizer, lambda: (1 + 0.1 * x + 8 * x**3 / 6).sum())
    size = found.perturbation
    assert size.error == pytest.approx(8 * 0.3**2 / 6 / (0.1 + 8 * 0.3**2 / 6), rel=0.01)
    assert 1e-9 < size.noise < 1e-6
    assert size.best == pytest.approx((3 * size.noise / 8) ** (1 / 3), rel=0.01)
    assert found.practical.mu == size.best
    assert "Suggested is the latter" in str(found)


def test_a_good_mu_is_kept():
    problem = Quadratic()
    found = suggest_hyperparameters(problem.optimizer, problem)
    assert found.perturbation.error < 1e-6
    assert found.practical.mu == 1e-3


def test_batches_that_disagree_are_told():
    """Batches pull to opposite sides: a step lowers its own loss alone."""
    x = Parameter(torch.zeros(20, dtype=torch.float64), False)
    closures = [lambda side=side: side * x.sum() + 0.5 * x @ x for side in (1.0, -1.0)]
    optimizer = HybridZOFO([x], mode="zo", lr=1.0)
    found = suggest_hyperparameters(optimizer, closures, directions=64)
    assert found.zeroth_order.terms.others == pytest.approx(-found.zeroth_order.terms.gain)
    assert any("noise prevails" in warning for warning in found.practical.warnings)


def test_no_rate_where_the_loss_does_not_turn():
    x, y = Parameter(torch.ones(3), False), Parameter(torch.ones(3))
    optimizer = HybridZOFO([dict(params=[x], mode="zo", lr=1.0), dict(params=[y], lr=1.0)])
    found = suggest_hyperparameters(optimizer, lambda: x @ x + y.sum()).practical
    assert found.lr_zo > 0
    assert found.lr_fo is None
    assert sum("lr_fo: no rate could be found" in warning for warning in found.warnings) == 1
    with pytest.raises(FloatingPointError, match="differ along random directions"):
        suggest_hyperparameters(optimizer, lambda: 0 * x.sum() + y @ y)


def test_where_the_loss_turns_downwards_its_magnitude_is_taken():
    """Upside down, each curvature along a direction changes its sign alone."""
    x = Parameter(torch.ones(30, dtype=torch.float64), False)
    slope = torch.linspace(-1, 1, 30, dtype=torch.float64)
    found = [
        suggest_hyperparameters(
            HybridZOFO([x], mode="zo", lr=1.0),
            lambda side=side: side * (slope @ x + (x - 1) @ (x - 1) / 2),
        )
        for side in (1, -1)
    ]
    assert found[0].practical.lr_zo == pytest.approx(found[1].practical.lr_zo)
    told = [any("does not turn upwards" in w for w in f.practical.warnings) for f in found]
    assert told == [False, True]


@pytest.mark.parametrize("method", ["finite_difference", "exact", "forward"])
def test_theory_takes_the_curvatures_as_they_are(method):
    """Two components, quadratics that differ by a slope, so that all constants are known."""
    problem = Quadratic()
    closures = [lambda side=side: problem() + side * problem.y.sum() for side in (1.0, -1.0)]
    options = dict(method=method, directions=40, epsilon=1.0, delta=0.5)
    found = suggest_hyperparameters(problem.optimizer, closures, components=50, **options)
    known, exact = found.constants, method != "forward"
    L_x, L_y = ZO_CURVATURES.max().item(), FO_CURVATURES.max().item()
    assert known.n == 50
    assert known.d_x == 30
    assert known.gap == pytest.approx(problem().item())
    if exact:
        assert known.L_x == pytest.approx(L_x, rel=0.02)
        assert known.L_y == pytest.approx(L_y, rel=0.02)
    else:  # Frobenius norms are upper bounds
        assert L_x < known.L_x_max < 3 * ZO_CURVATURES.square().sum().sqrt().item()
        assert known.L_y_max > L_y / 2
    assert known.sigma**2 == pytest.approx(2 * 4.0, rel=1e-6)  # unbiased, of two
    assert (FO_CURVATURES * problem.y.detach()).norm().item() < known.G
    assert found.theory == theorem_step_sizes(
        known, epsilon=1.0, delta=0.5, epochs=None, proof="corrected"
    )
    assert found.theory.guaranteed
    assert found.theory.lr_zo < found.practical.lr_zo
    assert "What the theorem admits" in str(found)


def test_theory_needs_a_loss_above_its_floor():
    problem = Quadratic()
    with pytest.raises(ValueError, match="floor must be below the loss"):
        suggest_hyperparameters(problem.optimizer, problem, epsilon=1.0, floor=1e9)
    with pytest.raises(ValueError, match="epsilon must be above 0 and delta in"):
        suggest_hyperparameters(problem.optimizer, problem, epsilon=0.0)
    first_order = Quadratic(("fo",))
    with pytest.raises(ValueError, match="epsilon needs an optimizer with a group of mode='zo'"):
        suggest_hyperparameters(first_order.optimizer, first_order, epsilon=1.0)


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_it_changes_nothing(perturbation):
    net, optimizer, closures = hybrid_net(perturbation=perturbation)
    before = everything(net, optimizer)
    first = suggest_hyperparameters(optimizer, closures, directions=4)
    check_same(before, net, optimizer)
    assert str(suggest_hyperparameters(optimizer, closures, directions=4)) == str(first)
    assert not math.isnan(first.first_order.lr)


def test_nor_where_the_closure_raises():
    """In its first run, and in its last ones, where first-order weights are moved."""
    net, optimizer, closures = hybrid_net()
    before = everything(net, optimizer)

    def failing_at(last):
        runs = itertools.count(1)

        def closure():
            optimizer.zero_grad()
            if next(runs) >= last:
                raise KeyboardInterrupt
            return closures[0]()

        return closure, runs

    whole, runs = failing_at(math.inf)
    suggest_hyperparameters(optimizer, whole, directions=2)
    count = next(runs) - 1
    for last in (1, count // 2, count - 2, count):
        with pytest.raises(KeyboardInterrupt):
            suggest_hyperparameters(optimizer, failing_at(last)[0], directions=2)
        check_same(before, net, optimizer)


def test_what_cannot_be():
    problem = Quadratic()
    optimizer = problem.optimizer
    with pytest.raises(TypeError, match="optimizer must be a HybridZOFO, got SGD"):
        suggest_hyperparameters(torch.optim.SGD([problem.y]), problem)
    with pytest.raises(ValueError, match="closures must be a function or a sequence"):
        suggest_hyperparameters(optimizer, [])
    with pytest.raises(TypeError, match="closures must be functions, got int"):
        suggest_hyperparameters(optimizer, [3])
    for directions in (1, True, 2.0):
        with pytest.raises(ValueError, match="directions must be an int >= 2"):
            suggest_hyperparameters(optimizer, problem, directions=directions)
    with pytest.raises(ValueError, match="seed must be an int >= 0"):
        suggest_hyperparameters(optimizer, problem, seed=-1)
    with pytest.raises(FloatingPointError, match="finite losses"):
        suggest_hyperparameters(optimizer, lambda: problem() * math.inf)
    with pytest.raises(RuntimeError, match="must not be called inside a closure"):
        optimizer.step(lambda: suggest_hyperparameters(optimizer, problem))
    optimizer.backward(problem)
    with pytest.raises(RuntimeError, match="between backward and step"):
        suggest_hyperparameters(optimizer, problem)
    for options, message in (
        (dict(active=0.5), "active must be None"),
        (dict(num_samples=16), "2 or more times num_samples"),
    ):
        with pytest.raises(ValueError, match=message):
            suggest_hyperparameters(Quadratic(**options).optimizer, problem)
    x, z = (Parameter(torch.ones(2), False) for _ in range(2))
    groups = [dict(params=[x], lr=1.0), dict(params=[z], lr=2.0)]
    with pytest.raises(ValueError, match="one mu and one lr"):
        suggest_hyperparameters(HybridZOFO(groups, mode="zo"), lambda: x.sum() * z.sum())


def test_the_suggestion_hardly_depends_on_mu():
    """Curvature has a displacement of its own; in single precision a small mu is rounding."""
    draw = torch.Generator().manual_seed(0)
    x = Parameter(0.1 * torch.randn(200, generator=draw), False)
    wave = torch.randn(200, generator=draw) / 5

    def closure():
        return 2 + x @ x + torch.sin(x @ wave) + 5 * (x**3).sum()

    found = {}
    for mu in (1e-3, 1e-5, 1e-7):
        optimizer = HybridZOFO([x], mode="zo", lr=1.0, mu=mu)
        found[mu] = suggest_hyperparameters(optimizer, closure)
    wanted = found[1e-3].practical.lr_zo
    for mu, suggested in found.items():
        assert suggested.practical.lr_zo == pytest.approx(wanted, rel=0.15), mu
        noise = suggested.perturbation.noise
        assert 3e-8 < noise < 6e-7, mu
    assert found[1e-5].zeroth_order.displacement > 1e-5
    assert found[1e-3].practical.mu == 1e-3
    assert found[1e-7].perturbation.error > 0.1  # of slopes by so small a mu
    assert found[1e-7].practical.mu > 1e-6


def test_noise_of_a_known_size():
    """Uniform in ±a: its deviation is a / sqrt(3), over 12 seeds to 40 %."""
    problem, a = Quadratic(("zo",)), 1e-6

    def closure():  # as a hash of the weights, so the same each time
        return problem() + a * (2 * torch.frac(1e4 * torch.sin(1e7 * problem.x).sum()).abs() - 1)

    found = suggest_hyperparameters(problem.optimizer, closure).perturbation
    noises = [displacement(problem.optimizer, closure, seed).noise for seed in range(12)]
    mean = math.sqrt(sum(noise**2 for noise in noises) / len(noises))
    assert mean == pytest.approx(a / 3**0.5, rel=0.4)
    two_sided = found.noise / 2**0.5 / 1e-3 / problem.gradient.norm().item()
    assert found.error == pytest.approx(two_sided, rel=0.3)


def test_mu_of_the_one_sided_estimate():
    """c is tr H along signs: mu = (8 s^2 / c^2)^(1/4), and the error at mu is c mu / 2 at most."""
    problem = Quadratic(("zo",), distribution="rademacher", estimator="one_sided")
    found = suggest_hyperparameters(problem.optimizer, problem).perturbation
    assert found.best == pytest.approx((8 * found.noise**2 / TRACE**2) ** 0.25, rel=0.01)
    slope = found.error / (TRACE * 1e-3 / 2)
    assert 1 / slope == pytest.approx(problem.gradient.norm().item(), rel=0.5)


def test_noise_is_no_curvature():
    """A straight loss in single precision: nothing is suggested, and it is said why."""
    x = Parameter(torch.full((50,), 0.1), False)
    slope = torch.linspace(-1, 1, 50)
    found = suggest_hyperparameters(HybridZOFO([x], mode="zo", lr=1.0, mu=1e-5), lambda: x @ slope)
    assert found.practical.lr_zo is None
    assert any("mostly noise of the computed loss" in w for w in found.practical.warnings)


def test_signs_with_several_samples():
    """Their covariance is blind to the diagonal: E[u'Hu] is |g|^2 (d/q + 1 - 1/q) for H = I."""
    x = Parameter(torch.ones(10, dtype=torch.float64), False)
    options = dict(distribution="rademacher", num_samples=100)
    optimizer = HybridZOFO([x], mode="zo", lr=1.0, **options)
    terms = suggest_hyperparameters(optimizer, lambda: x @ x / 2, directions=800)
    terms = terms.zeroth_order.terms
    assert terms.bend == pytest.approx(10 * (0.1 + 0.99), rel=0.3)
    with torch.no_grad():
        x.fill_(1.0)
    optimizer = HybridZOFO([x], mode="zo", lr=1.0, num_samples=2)
    terms = suggest_hyperparameters(optimizer, lambda: x @ x / 2, directions=800)
    assert terms.zeroth_order.terms.bend == pytest.approx(10 * (12 / 2 + 0.5), rel=0.2)


@pytest.mark.parametrize(("own_backward", "returned"), [(False, True), (True, False), (True, True)])
def test_a_scaled_loss_is_refused(own_backward, returned):
    problem = Quadratic()
    scaler = torch.amp.GradScaler("cpu")

    def closure():
        loss = problem()
        scaled = scaler.scale(loss)
        if own_backward:
            scaled.backward()
        return scaled if returned else loss

    for ask in (suggest_hyperparameters, find_lr):
        with pytest.raises(ValueError, match="GradScaler"):
            ask(problem.optimizer, closure)


def test_no_graph_of_zeroth_order_weights_and_no_gradient_beside():
    """The base may require gradients; and what the optimizer does not know keeps its ``.grad``."""
    x, y, other = (Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    other.grad = torch.full((3,), 7.0, dtype=torch.float64)
    kept, seen = other.grad, []
    x.register_hook(seen.append)
    optimizer = HybridZOFO(
        [dict(params=[x], mode="zo", lr=1.0), dict(params=[y], mode="fo", lr=1.0)]
    )

    def closure():
        return x @ x + y @ y + other @ y + other @ other

    for ask in (suggest_hyperparameters, find_lr):
        ask(optimizer, closure)
        assert not seen
        assert x.requires_grad
        assert other.grad is kept
        assert kept.tolist() == [7.0] * 3


@pytest.mark.parametrize("kind", ["Adagrad", "RAdam", "RMSprop"])
def test_optimizers_that_step_further_at_another_time(kind):
    """By one step at lr* the loss is lowest, also by the first; and it is told."""
    problem = Quadratic(("fo",), fo_optimizer=getattr(torch.optim, kind))
    found = suggest_hyperparameters(problem.optimizer, problem)
    assert found.first_order.step == 1
    assert any("at step 1" in warning for warning in found.practical.warnings)
    found.apply(problem.optimizer)
    losses = []
    for _ in range(30):
        problem.optimizer.zero_grad()
        losses.append(problem.optimizer.step(problem).item())
    assert max(losses) == losses[0]


def test_an_optimizer_without_regard_to_its_rate():
    problem = Quadratic(("fo",), fo_optimizer=torch.optim.Rprop)
    with pytest.raises(ValueError, match="must not move weights at rate 0"):
        suggest_hyperparameters(problem.optimizer, problem)


def test_the_update_is_of_all_batches_and_goes_on_from_the_state():
    """SGD with momentum 0.5: the sum of g_k / 2^age, over batches in turn, and over the state."""
    y = Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = HybridZOFO([y], lr=1.0, momentum=0.5)
    one, two = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [0.0, 1.0]))
    update, step, larger = trial_update(optimizer, [y], [[one], [two]])
    assert step == WARM
    assert larger == 1.0
    torch.testing.assert_close(update[0], torch.tensor([4 / 3, 2 / 3], dtype=torch.float64))
    adam = HybridZOFO([y], lr=1e-9, fo_optimizer=torch.optim.Adam)
    for _ in range(1000):  # squares that 31 steps do not forget
        adam.zero_grad()
        adam.step(lambda: 1000 * y.sum())
    update, _, _ = trial_update(adam, [y], [[one + two]])
    assert update[0].abs().max() < 0.1


def test_turning_looks_nearer_and_stops_where_it_is_not_finite():
    """Slopes of (r - a)^2 are straight, so that one between two is exact."""
    for a in (1e-9, 3.0, 70.0):
        found = turning(lambda r, a=a: 2 * (r - a), -2 * a, 1.0, 2 * (1 - a))
        assert found == pytest.approx(a)

    def wall(r):
        return -1.0 if r < 5 else math.nan if r > 5 else -1.0

    assert turning(wall, -1.0, 1.0, -1.0) == 4.0
    assert math.isnan(turning(lambda r: -1.0, -1.0, 1.0, -1.0))

    def steep(r):  # from 1 a straight line would say 0.1
        return -1.0 + 1e3 * min(r, 0.01)

    assert turning(steep, -1.0, 1.0, 9.0) == pytest.approx(1e-3)


def test_coupling_makes_first_order_steps_longer():
    rates = [
        suggest_hyperparameters(p.optimizer, p).first_order.lr
        for p in (Quadratic(estimator="one_sided", coupling=c) for c in (0.0, 1.0))
    ]
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_closures_that_draw_another_batch_each_time():
    y = Parameter(torch.ones(2))
    batches = itertools.count()
    for ask in (suggest_hyperparameters, find_lr):
        with pytest.raises(RuntimeError, match="the same loss each time"):
            ask(HybridZOFO([y], lr=1.0), lambda: (y @ y) * (1 + next(batches) % 7))


def test_rates_are_applied_by_their_ratios():
    x, y, z = (Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    groups = [
        dict(params=[x], mode="zo", lr=1e-6),
        dict(params=[y], mode="fo", lr=0.1),
        dict(params=[z], mode="fo", lr=0.01),
        dict(params=[], mode="fo", lr=5.0),
    ]
    optimizer = HybridZOFO(groups)
    found = suggest_hyperparameters(optimizer, lambda: x @ x + y @ y + z @ z)
    assert found.first_order.lr == pytest.approx((1 + 0.1) / (1 + 0.01) / 2)
    found.apply(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    lr_zo, lr_fo = found.practical.lr_zo, found.practical.lr_fo
    assert rates[:3] == pytest.approx([lr_zo, lr_fo, lr_fo / 10])
    assert "a schedule that decays" in str(found)
    torch.optim.lr_scheduler.LinearLR(optimizer)
    with pytest.raises(RuntimeError, match="before the scheduler is made"):
        found.apply(optimizer)


def test_the_theorem_s_doubts_are_printed():
    problem = Quadratic()
    found = suggest_hyperparameters(problem.optimizer, problem, epsilon=1.0, largest=False)
    assert [doubt[:9] for doubt in found.doubts] == [
        "n = 1, as",
        "sigma = 0",
        "L of x: 2",
        "L of y: 2",
    ]
    assert all(f"! {doubt}" in str(found) for doubt in found.doubts)


def test_variance_and_worst_batch_of_the_constants():
    """x's gradients differ by 2 along one axis, and curvatures by a factor of 3."""
    x = Parameter(torch.ones(4, dtype=torch.float64), False)
    optimizer = HybridZOFO([x], mode="zo", lr=1.0, distribution="rademacher")
    closures = [lambda c=c: c * (x @ x) / 2 for c in (1.0, 3.0)]
    known = suggest_hyperparameters(optimizer, closures, epsilon=1.0, directions=32).constants
    assert known.L_x == pytest.approx(2.0, rel=1e-3)
    assert known.L_x_max == pytest.approx(3.0, rel=1e-3)
    # unbiased: sum |g_i - g|^2 / (n - 1) = 2 |x|^2; slopes vary by directions
    assert known.sigma**2 == pytest.approx(2 * 4.0, rel=0.5)
    assert known.sigma > 1


def test_arguments_are_checked_before_anything_is_measured():
    problem = Quadratic()
    optimizer = problem.optimizer

    def never():
        raise AssertionError("measured")

    for options, message in (
        (dict(method="nonsense"), "method must be one of"),
        (dict(proof="none"), "proof must be one of"),
        (dict(epochs=-3), "epochs must be an int >= 1"),
        (dict(components=0), "components must be an int >= 1"),
        (dict(floor=math.nan), "floor must be a finite number"),
        (dict(step=-1.0), "step must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            suggest_hyperparameters(optimizer, never, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'direction'"):
        suggest_hyperparameters(optimizer, never, direction=9)
    ascent = Quadratic(maximize=True)
    for ask in (suggest_hyperparameters, find_lr):
        with pytest.raises(ValueError, match="maximize must be False"):
            ask(ascent.optimizer, never)
        for wrong in (torch.ones(3), [dict(x=1)], optimizer, torch.nn.Linear(1, 1)):
            with pytest.raises(TypeError, match=r"lambda: model\(\*\*batch\)\.loss"):
                ask(optimizer, wrong)
    w = Parameter(torch.ones(2, 3), False)
    options = dict(structure="low_rank", perturbation="streamed", directions="per_example")
    optimizer = HybridZOFO([w], mode="zo", lr=1.0, **options)
    uneven = [lambda b=b: w.square().sum().expand(b) for b in (2, 3)]
    with pytest.raises(ValueError, match=r"equally many examples, got \[2, 3\]"):
        suggest_hyperparameters(optimizer, uneven)


@pytest.mark.parametrize("error", [0.1, 3.0, math.nan])
def test_where_the_rate_is_not_known_the_trace_bounds_it(error):
    """lr* is 4 / 2 = 2; by the trace it is 4 / (4 (7 + 2)) = 1/9."""
    terms = Terms(gain=4.0, others=4.0, bend=2.0, magnitude=2.0, spread=4.0)
    values = dict(norms=(2.0,), mean_norm_squared=4.0, loss=1.0, directions=8, batches=1)
    found = ZerothOrder(
        terms, error, 7.0, 1.0, **values, displacement=1e-3, noise=0.0, evaluations=17
    )
    rates = rates_of(found, None, None)
    lr = 2.0 if error < 2 else 1 / 9
    assert rates.lr_zo == pytest.approx(0.15 * lr)
    assert any("may be anything" in warning for warning in rates.warnings) == (lr < 2)
