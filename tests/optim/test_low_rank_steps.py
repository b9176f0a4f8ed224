"""Steps along low-rank directions, against their arithmetic; the settings that ask for them."""

import math

import pytest
import torch
import torch.nn.functional as F
from low_rank import MU, PER_EXAMPLE, STREAMED, named, optimizer_of, randn
from torch.nn import Parameter

from zofo_kernels import LARGEST_RANK, Direction, factors, noise
from zofo_optim import HybridZOFO
from zofo_optim.perturbation import closed_forms

IDS = torch.tensor([[0, 4, 2, 2], [5, 2, 1, 0], [3, 3, 5, 1]])


def network(table, norm, w, b, conv, stack):
    """One of every kind, in float64."""
    h = F.layer_norm(F.embedding(IDS, table), (6,), norm)
    h = F.linear(h, w, b).tanh()
    h = h + torch.stack([h[i] @ stack[i] for i in range(3)])
    return F.conv2d(h[:, None], conv).square().mean()


def parts():
    shapes = dict(table=(6, 6), norm=(6,), w=(5, 6), b=(5,), conv=(3, 1, 2, 2), stack=(3, 5, 5))
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def simulated(weights, step, settings, groups):
    """The weights after one step, dense: every direction materialised."""
    rank, samples, distribution = (settings[k] for k in ("rank", "num_samples", "distribution"))
    mus, lrs, decay = groups
    two_sided = settings["estimator"] == "two_sided"
    total = [torch.zeros_like(w) for w in weights]
    for s in range(samples):
        direction = Direction(3, step, s, distribution, rank=rank)
        z = [noise(w.shape, direction, index=i, dtype=w.dtype) for i, w in enumerate(weights)]

        def at(sign, z=z):
            moved = zip(weights, mus, z, strict=True)
            return network(*[w + sign * mu * v for w, mu, v in moved])

        difference = (at(1) - at(-1)) / 2 if two_sided else at(1) - at(0)
        for t, mu, v in zip(total, mus, z, strict=True):
            t += difference / mu * v / samples
    moved = zip(weights, total, lrs, strict=True)
    return [w - lr * (t + decay * w) for w, t, lr in moved]


@pytest.mark.parametrize("perturbation", ["streamed", "in_place"])
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize(
    ("num_samples", "rank", "distribution"),
    [(1, 1, "gaussian"), (1, 2, "rademacher"), (3, 1, "rademacher"), (3, 3, "gaussian")],
)
def test_steps_are_those_of_dense_directions(
    perturbation, estimator, num_samples, rank, distribution
):
    """Groups with different mu and rate; decay; a stack of matrices, a convolution and vectors."""
    settings = dict(
        estimator=estimator, num_samples=num_samples, rank=rank, distribution=distribution
    )
    params = named(parts())
    wanted = [p.detach().clone() for _, p in params]
    groups = [
        dict(params=params[:3], mode="zo", lr=0.05, mu=1e-2, weight_decay=0.1),
        dict(params=params[3:], mode="zo", lr=0.02, mu=4e-3, weight_decay=0.1),
    ]
    optimizer = HybridZOFO(
        groups, seed=3, perturbation=perturbation, structure="low_rank", **settings
    )
    numbers = [1e-2] * 3 + [4e-3] * 3, [0.05] * 3 + [0.02] * 3, 0.1
    for step in range(3):
        optimizer.step(lambda: network(**dict(params)))
        wanted = simulated(wanted, step, settings, numbers)
    for (name, p), w in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-10, msg=name)


# ---- what the estimates are on average ---------------------------------------------------------

M, N, T = 4, 3, 5
INPUTS, FACTORS = randn(4, T, N, seed=7), randn(4, T, M, seed=8)


def quadratic(w, examples):
    """f_b(W) = sum_t a_bt . W x_bt + |W x_bt|^2 / 2, of examples of four kinds in turn."""
    x, a = INPUTS.repeat(examples // 4, 1, 1), FACTORS.repeat(examples // 4, 1, 1)
    y = F.linear(x, w)
    return (a * y + y.square() / 2).sum((1, 2))


def gradients(w):
    """Of the four kinds: shape (4, M, N)."""
    return torch.einsum("btm,btn->bmn", FACTORS + INPUTS @ w.T, INPUTS)


def fourth_moment(distribution):
    """K with E[(g . v)^2 |v|^2] = K |g|^2 for v = u w^T.

    For Gaussian u in R^m, E[(u . a)^2 |u|^2] = (m + 2) |a|^2. Take a = G w, and then the same over
    w: K = (m + 2)(n + 2). Of +-1, |v|^2 is m n, and E[(g . v)^2] = |g|^2, so that K = m n.
    The estimate (g . v) v has the mean g, so its covariance has the trace (K - 1) |g|^2.
    """
    return (M + 2) * (N + 2) if distribution == "gaussian" else M * N


def check_moments(estimates, gradient, trace, room):
    """Their mean within 4.5 standard errors; their variance to ``room``."""
    error = (estimates.mean(0) - gradient).norm()
    assert error < 4.5 * math.sqrt(trace / len(estimates))
    found = (estimates - gradient).square().sum((1, 2)).mean().item()
    assert found == pytest.approx(trace, rel=room)


def directions_of(optimizer, samples):
    """Shape (samples, M, N), of the present step."""
    (group,) = optimizer.zo_groups()
    ((u, v),) = factors([(M, N)], [group.direction(s) for s in range(samples)])
    return torch.einsum("ski,skj->sij", u.double(), v.double())


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize(("distribution", "room"), [("gaussian", 0.2), ("rademacher", 0.1)])
def test_mean_and_variance_of_examples(estimator, distribution, room):
    """8,000 examples, four at a time: one estimate of a batch of four, each along its own.

    Its variance is (K - 1) mean_b |g_b|^2 / 4.
    """
    n = 8000
    w = Parameter(randn(M, N, seed=2), False)
    options = dict(PER_EXAMPLE, estimator=estimator, distribution=distribution)
    optimizer = optimizer_of([("w", w)], mu=1e-5, **options)
    # the first step is verified, example by example: let it be one of few, which moves nothing
    optimizer.step(lambda: quadratic(w, 4))
    optimizer.backward(lambda: quadratic(w, n))
    each = optimizer.projected_grads.view(n, 1, 1) * directions_of(optimizer, n)
    g, k = gradients(w), fourth_moment(distribution)
    for kind in range(4):
        trace = (k - 1) * g[kind].square().sum().item()
        check_moments(each[kind::4], g[kind], trace, 2 * room)
    trace = (k - 1) * g.square().sum((1, 2)).mean().item() / 4
    check_moments(each.unflatten(0, (-1, 4)).mean(1), g.mean(0), trace, room)


@pytest.mark.parametrize(("distribution", "room"), [("gaussian", 0.4), ("rademacher", 0.25)])
def test_mean_and_variance_of_shared_directions(distribution, room):
    """(K - 1) |g|^2, g the mean gradient: more than the examples' where these agree."""
    n = 700
    w = Parameter(randn(M, N, seed=2), False)
    options = dict(distribution=distribution, num_samples=n)
    optimizer = optimizer_of([("w", w)], mu=1e-5, **options)
    optimizer.backward(lambda: quadratic(w, 4).mean())
    each = optimizer.projected_grads.view(n, 1, 1) * directions_of(optimizer, n)
    g = gradients(w).mean(0)
    check_moments(each, g, (fourth_moment(distribution) - 1) * g.square().sum().item(), room)


# ---- settings ---------------------------------------------------------------------------------

LOW = dict(structure="low_rank")
BAD = [
    (dict(structure="sparse"), ValueError, r"structure must be one of \('full', 'low_rank'\), got"),
    (dict(LOW, rank=0), ValueError, "rank must be an int >= 1, got 0"),
    (dict(LOW, rank=True), ValueError, "rank must be an int >= 1, got True"),
    (dict(LOW, rank=2.0), ValueError, r"rank must be an int >= 1, got 2\.0"),
    (dict(LOW, rank=LARGEST_RANK + 1), ValueError, f"rank must be at most {LARGEST_RANK}, got"),
    (dict(rank=2), ValueError, "rank must be left alone where structure='full', got 2"),
    (dict(LOW, noise_version=1), ValueError, "noise_version must be 2 or later .*got 1"),
    (dict(directions="each"), ValueError, r"directions must be one of \('shared', 'per_example'\)"),
    (
        dict(directions="per_example"),
        ValueError,
        "structure must be 'low_rank' where directions='per_example', got 'full'",
    ),
    (
        dict(LOW, directions="per_example"),
        ValueError,
        "perturbation must be 'streamed' where directions='per_example', got 'in_place'",
    ),
    (
        dict(PER_EXAMPLE, num_samples=2),
        ValueError,
        "num_samples must be 1 where directions='per_example', got 2",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_settings_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        HybridZOFO([Parameter(torch.ones(2, 3), False)], mode="zo", lr=0.1, **options)


def made(**options):
    return HybridZOFO([Parameter(torch.ones(2, 3), False)], mode="zo", lr=0.1, **options)


OTHERS = [
    (dict(LOW), dict(), r"structure='low_rank' \(here 'full'\)"),
    (dict(LOW, rank=2), dict(LOW), r"rank=2 \(here 1\)"),
    (dict(), dict(LOW), r"structure='full' \(here 'low_rank'\)"),
    (PER_EXAMPLE, STREAMED, r"directions='per_example' \(here 'shared'\)"),
]


@pytest.mark.parametrize(("saved", "here", "message"), OTHERS)
def test_a_state_of_other_settings_warns(saved, here, message):
    with pytest.warns(UserWarning, match=message):
        made(**here).load_state_dict(made(**saved).state_dict())


@pytest.mark.parametrize("here", [dict(LOW), STREAMED, PER_EXAMPLE])
def test_a_state_from_before_there_was_a_choice(here):
    """Its directions were full and shared."""
    state = made(perturbation=here.get("perturbation", "in_place")).state_dict()
    for name in ("structure", "rank", "directions"):
        del state["param_groups"][0]["zo_settings"][name]
    with pytest.warns(UserWarning, match=r"structure='full' \(here 'low_rank'\)"):
        made(**here).load_state_dict(state)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [dict(), dict(LOW, rank=3), PER_EXAMPLE])
def test_a_state_of_the_same_settings_does_not(options):
    made(**options).load_state_dict(made(**options).state_dict())


def test_defaults_are_full_and_shared():
    settings = made().settings
    assert (settings.structure, settings.rank, settings.directions) == ("full", 1, "shared")
    assert settings.direction_rank == 0
    assert made(**LOW).settings.direction_rank == 1
    assert made(mu=MU).param_groups[0]["mu"] == MU


# ---- groups, and what is verified ---------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_groups_have_directions_of_their_own(samples):
    """Seeds, steps and mu of each; slopes are those in place, to rounding."""
    found = {}
    for perturbation in ("in_place", "streamed"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)).double()
        model.requires_grad_(False)
        options = (dict(seed=0), dict(seed=5, mu=1e-2))
        groups = [
            dict(params=list(layer.parameters()), mode="zo", lr=0.0, **own)
            for layer, own in zip(model, options, strict=True)
        ]
        optimizer = HybridZOFO(
            groups, structure="low_rank", perturbation=perturbation, num_samples=samples
        )
        optimizer.param_groups[1]["zo_step"] = 7
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
        optimizer.backward(lambda model=model, x=x: model(x).square().mean())
        found[perturbation] = optimizer.projected_grads
    torch.testing.assert_close(found["streamed"], found["in_place"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mu", [1e-3, 1e-4])
@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_a_wrong_form_is_found_however_small_mu_is(dtype, mu, directions, monkeypatch):
    """A form that displaces nothing: at mu, rounding alone could explain its loss."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (torch.nn.Linear(64, 64), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers).to(dtype).requires_grad_(False)
    x = torch.randn(4, 64).to(dtype)

    def closure():
        losses = model(x).float().square().mean(1)
        return losses if directions == "per_example" else losses.mean()

    def step():
        groups = [dict(params=list(model.parameters()), mode="zo", lr=0.0, mu=mu)]
        chosen = dict(PER_EXAMPLE, directions=directions)
        HybridZOFO(groups, **chosen).step(closure)

    step()
    plain = torch.nn.functional.linear

    def nothing(forms, input, weight, bias=None):
        return plain(input, weight.detach(), None if bias is None else bias.detach())

    monkeypatch.setitem(closed_forms._FORMS, plain, nothing)
    with pytest.raises(RuntimeError, match="closure"):
        step()
