"""Conditions of the theorem: against hand computation, and what must hold for any constants."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_optim.theory import Constants, theorem_step_sizes

PROOFS = ("paper", "corrected")
BY_HAND = Constants(L_x=2, L_y=1, L_x_max=4, L_y_max=2, sigma=3, G=5, gap=0.5, d_x=6, n=10)


def between(low, high):
    return st.floats(math.log10(low), math.log10(high)).map(lambda power: 10**power)


@st.composite
def problems(draw):
    L_x, L_y = draw(between(1e-3, 1e3)), draw(between(1e-3, 1e3))
    return Constants(
        L_x=L_x,
        L_y=L_y,
        L_x_max=L_x * draw(between(1, 100)),
        L_y_max=L_y * draw(between(1, 100)),
        sigma=draw(st.just(0.0) | between(1e-2, 100)),
        G=draw(st.just(0.0) | between(1e-2, 100)),
        gap=draw(between(1e-3, 100)),
        d_x=draw(st.integers(1, 10**9)),
        n=draw(st.integers(1, 10**5)),
    )


targets = {"epsilon": between(1e-3, 10), "delta": between(1e-3, 0.9)}


def test_the_paper_s_conditions_by_hand():
    found = theorem_step_sizes(BY_HAND, epsilon=0.1, delta=0.2, epochs=50, proof="paper")
    zo, fo = found.conditions["lr_zo"], found.conditions["lr_fo"]
    assert list(zo.values()) == pytest.approx([1 / 80, 1 / 46080, 1 / 600, 1 / 400])
    assert list(fo.values()) == pytest.approx([1 / 40, 1 / 300, 1 / 200])
    mu = [1 / (10 * 50 * 4 * 5 * 27), 4 / (12 * math.sqrt(6**3 * 500))]
    assert list(found.conditions["mu"].values()) == pytest.approx(mu)
    first, rest = 10 + 25 / 8, 0.5 + 2 / 46080 + 1 / 300
    epochs = [100 * (first + rest * 4 * 46080 / 10), 100 * (first + rest * 3 * 300 / 10)]
    assert list(found.conditions["epochs"].values()) == pytest.approx(epochs)
    assert found.level == pytest.approx(40 * rest)
    assert (found.lr_zo, found.lr_fo, found.mu) == pytest.approx((1 / 46080, 1 / 300, mu[0]))
    assert found.binding == {
        "lr_zo": "1/(384 L_x n d_x)",
        "lr_fo": "sqrt(2/T)/(sigma n L_y_max)",
        "mu": "1/(n T L_x_max G (d_x + 3)^(3/2))",
        "epochs": "(2/delta + G^2/8 + (gap + 2 lr_zo + lr_fo)/(n lr_zo/4))/epsilon^2",
    }
    assert found.epochs == 50
    assert not found.enough


def test_the_corrected_conditions_by_hand():
    found = theorem_step_sizes(BY_HAND, epsilon=0.1, delta=0.2, epochs=50)
    zo = [1 / (72 * 40 * 8), math.sqrt(0.5 / (72 * 40 * 8 * 9 * 50))]
    assert list(found.conditions["lr_zo"].values()) == pytest.approx(zo)
    fo = [1 / 40, math.sqrt(2 / (5 * 20 * 9 * 50))]
    assert list(found.conditions["lr_fo"].values()) == pytest.approx(fo)
    bias = 0.5 / (4 * 50 * found.lr_zo * 10 * 5 * 4 * 6)
    spread = 2 / 4 * math.sqrt(0.5 / (50 * found.lr_zo * 6 * (10 + 5)))
    assert list(found.conditions["mu"].values()) == pytest.approx([bias, spread])
    needed = 16 * 0.5 / (0.2 * 0.01 * 10)
    epochs = [needed / found.lr_zo, needed / found.lr_fo]
    assert list(found.conditions["epochs"].values()) == pytest.approx(epochs)
    assert found.level == pytest.approx(10)


@pytest.mark.parametrize("proof", PROOFS)
@given(constants=problems(), **targets)
@settings(deadline=None, max_examples=50)
def test_all_conditions_hold_and_one_binds(proof, constants, epsilon, delta):
    found = theorem_step_sizes(constants, epsilon=epsilon, delta=delta, proof=proof)
    for name in ("lr_zo", "lr_fo", "mu"):
        value = getattr(found, name)
        assert 0 < value == min(found.conditions[name].values())
        assert value == found.conditions[name][found.binding[name]]
    assert found.epochs >= max(found.conditions["epochs"].values())
    assert found.enough
    assert found.guaranteed == (proof == "corrected")


@pytest.mark.parametrize("proof", PROOFS)
@given(constants=problems(), **targets)
@settings(deadline=None, max_examples=50)
def test_the_epochs_are_the_fewest(proof, constants, epsilon, delta):
    """With the rates that belong to one epoch less, its own condition fails."""
    targets = dict(epsilon=epsilon, delta=delta, proof=proof)
    fewest = theorem_step_sizes(constants, **targets).epochs
    again = theorem_step_sizes(constants, **targets, epochs=fewest)
    assert again.enough
    assert again == theorem_step_sizes(constants, **targets)
    if fewest > 1:
        assert not theorem_step_sizes(constants, **targets, epochs=fewest - 1).enough


@pytest.mark.parametrize("proof", PROOFS)
@given(constants=problems(), factor=between(1, 10), **targets)
@settings(deadline=None, max_examples=50)
def test_harder_problems_take_more_epochs(proof, constants, factor, epsilon, delta):
    """The paper's line on T has gap + 2 lr_zo + lr_fo, which falls with a rate: so much less,
    up to the next integer."""
    easier = theorem_step_sizes(constants, epsilon=epsilon, delta=delta, proof=proof)
    with_rates = constants.gap + 2 * easier.lr_zo + easier.lr_fo
    share = constants.gap / with_rates if proof == "paper" else 1.0
    fewest = (easier.epochs - 1) * share**2 * (1 - 1e-12)
    more = {
        "d_x": math.ceil(constants.d_x * factor),
        "sigma": constants.sigma * factor,
        "gap": constants.gap * factor,
        "G": constants.G * factor,
        "L_x_max": constants.L_x_max * factor,
    }
    for name, value in more.items():
        harder = dataclasses.replace(constants, **{name: value})
        found = theorem_step_sizes(harder, epsilon=epsilon, delta=delta, proof=proof)
        assert found.epochs >= fewest, name
    for changed in (dict(epsilon=epsilon / factor), dict(delta=delta / factor)):
        target = {"epsilon": epsilon, "delta": delta, **changed}
        assert theorem_step_sizes(constants, **target, proof=proof).epochs >= fewest


@given(constants=problems(), **targets)
@settings(deadline=None, max_examples=100)
def test_mu_costs_what_the_proof_allows_and_no_more(constants, epsilon, delta):
    """E1 + E2 of Lemma B.6, by Lemma B.5, over all epochs: at most lr_zo; half of it at least."""
    c = constants
    found = theorem_step_sizes(c, epsilon=epsilon, delta=delta, proof="paper")
    L, lr, mu = c.L_x_max, found.lr_zo, found.mu
    bias = lr * c.n * c.G * mu / 2 * L * (c.d_x + 3) ** 1.5
    most = 1 / (384 * c.L_x * c.n * c.d_x)
    spread = lr * most * c.L_x * c.n**2 * 108 * mu**2 * L**2 * float(c.d_x) ** 4
    assert bias * found.epochs <= lr / 2 * (1 + 1e-9)
    assert spread * found.epochs <= lr / 2 * (1 + 1e-9)
    assert (bias + spread) * found.epochs >= lr / 2 * (1 - 1e-9)


@given(constants=problems(), **targets)
@settings(deadline=None, max_examples=100)
def test_the_corrected_step_sizes_spend_the_gap_on_noise(constants, epsilon, delta):
    """As docs/theory.md bounds it: a quarter each in x and y, and a half by mu."""
    c = constants
    found = theorem_step_sizes(c, epsilon=epsilon, delta=delta)
    T, L, d, mu, zo = found.epochs, c.L_x_max, c.d_x, found.mu, found.lr_zo
    most = c.gap * (1 + 1e-9)
    assert 18 * (d + 2) * c.n * L * zo**2 * c.sigma**2 * T <= most / 4
    assert 0.3125 * c.n * c.L_y_max * found.lr_fo**2 * c.sigma**2 * T <= most / 4
    kappa = (mu * L) ** 2 * d * (d + 2) * (d + 4) / 2
    spread = 4.42 * L * zo**2 * ((c.n * mu * L * d) ** 2 + c.n * kappa) * T
    assert zo * c.n * c.G * mu * L * d * T + spread <= most / 2
    average = 2 * c.gap / (min(zo, found.lr_fo) * c.n * T / 4)
    assert average <= epsilon**2 * delta / 2 * (1 + 1e-9)


@pytest.mark.parametrize("sigma", [0.5, 1.9, 2.5, 8.0])
@pytest.mark.parametrize("gap", [1.0, 16.0])
def test_the_floor_under_the_printed_step_sizes_falls_with_epsilon(sigma, gap):
    """As docs/theory.md says: lr_zo L d sigma^2/2 over epsilon^2 rises to d sigma^2/(16 gap L n),
    or d/(4 gap L n) from sigma = 2 on, and no further: no floor that all epsilon meet."""
    c = Constants(1.0, 1.0, 1.0, 1.0, sigma=sigma, G=1.0, gap=gap, d_x=1024, n=16)
    limit = 1024 / (gap * 16) * min(sigma**2 / 16, 1 / 4)
    found = []
    for epsilon in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):
        sizes = theorem_step_sizes(c, epsilon=epsilon, delta=0.1, proof="paper")
        found.append(sizes.lr_zo * 1024 * sigma**2 / 2 / epsilon**2)
        if sizes.binding["lr_zo"].startswith("1/(384"):
            assert found[-1] == pytest.approx(sigma**2 / (768 * 16) / epsilon**2)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(limit, rel=0.02)


def test_lemma_b5_holds_for_all_d_though_its_proof_does_not():
    """Nesterov and Spokoiny's constants make 32 d and 108 d^4 from d = 5 on only; the moments of
    a Gaussian, split as 2 a^2 + 2 b^2, for all d."""
    for d in range(1, 2000):
        assert 2 * (d + 1) <= 32 * d
        assert d * (d + 2) * (d + 4) / 2 <= 108 * d**4
        printed = 16 * (d + 4) + 2 <= 32 * d
        printed &= 4 * (d + 4) * (d + 3) ** 3 + 6 * (d + 4) ** 3 <= 108 * d**4
        assert printed == (d >= 5)
        assert math.sqrt(d) <= d <= (d + 3) ** 1.5 / 2 or d == 1


@pytest.mark.parametrize("proof", PROOFS)
def test_without_noise_or_gradient_bound_their_conditions_are_empty(proof):
    calm = dataclasses.replace(BY_HAND, sigma=0, G=0)
    found = theorem_step_sizes(calm, epsilon=0.1, delta=0.1, proof=proof)
    empty = [
        name
        for some in found.conditions.values()
        for name, value in some.items()
        if value == math.inf
    ]
    assert len(empty) == 3
    assert all("sigma" in name or "G" in name for name in empty)
    assert found.enough
    assert math.isfinite(found.mu)


@pytest.mark.parametrize("proof", PROOFS)
def test_printed(proof):
    found = theorem_step_sizes(BY_HAND, epsilon=0.1, delta=0.2, epochs=50, proof=proof)
    text = str(found)
    for some in found.conditions.values():
        for name, value in some.items():
            (line,) = [line for line in text.splitlines() if f" {name} " in line]
            assert f"{value:.3e}" in line
            assert line.endswith("binds") == (name in found.binding.values())
    assert "nothing is promised: too few epochs" in text
    text = str(theorem_step_sizes(BY_HAND, epsilon=0.1, delta=0.2, proof=proof))
    assert "too few" not in text
    without = "nothing is promised: the printed proof leaves out the data's noise"
    assert (without in text) == (proof == "paper")


def test_what_is_printed_guarantees_nothing():
    """Even without noise, or in a million times as many epochs: the drift has a gap, too."""
    calm = dataclasses.replace(BY_HAND, sigma=0)
    for constants in (BY_HAND, calm):
        fewest = theorem_step_sizes(constants, epsilon=0.1, delta=0.2, proof="paper").epochs
        for epochs in (fewest, 10**6 * fewest):
            found = theorem_step_sizes(
                constants, epsilon=0.1, delta=0.2, proof="paper", epochs=epochs
            )
            assert found.enough
            assert not found.guaranteed


def test_numbers_of_other_kinds():
    """NumPy's, and fractions, become Python's, so that single precision goes no further."""
    other = Constants(
        L_x=np.float32(2),
        L_y=np.int64(1),
        L_x_max=Fraction(4),
        L_y_max=np.float64(2),
        sigma=np.float16(3),
        G=5,
        gap=0.5,
        d_x=np.int32(6),
        n=np.uint8(10),
    )
    assert other == BY_HAND
    assert {type(value) for value in vars(other).values()} == {int, float}
    found = theorem_step_sizes(
        other, epsilon=np.float32(0.5), delta=np.float64(0.2), epochs=np.int64(50)
    )
    assert found == theorem_step_sizes(BY_HAND, epsilon=0.5, delta=0.2, epochs=50)
    assert type(found.epochs) is int


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(L_x=0), ValueError, "L_x must be finite and above 0, got 0"),
        (dict(gap=-1.0), ValueError, "gap must be finite and above 0, got -1.0"),
        (dict(sigma=-1), ValueError, "sigma must be finite and at least 0, got -1"),
        (dict(G=math.nan), ValueError, "G must be finite and at least 0, got nan"),
        (dict(L_y="1"), TypeError, "L_y must be a number, got '1'"),
        (dict(L_y_max=True), TypeError, "L_y_max must be a number, got True"),
        (dict(d_x=1.0), TypeError, "d_x must be an int, got 1.0"),
        (dict(n=0), ValueError, "n must be at least 1, got 0"),
        (dict(L_x_max=1.5), ValueError, "L_x_max must be at least L_x = 2.0, got 1.5"),
        (dict(L_x_max=10**400), ValueError, "L_x_max must be finite and above 0, got more than a"),
        (dict(n=np.bool_(True)), TypeError, "n must be an int, got"),
        (dict(d_x=2**1001), ValueError, "d_x must be at most 2^1000, got an int of 1002 bits"),
    ],
)
def test_bad_constants(changed, error, message):
    with pytest.raises(error) as raised:
        dataclasses.replace(BY_HAND, **changed)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(epsilon=0.0), ValueError, "epsilon must be finite and above 0, got 0.0"),
        (dict(epsilon=None), TypeError, "epsilon must be a number, got None"),
        (dict(delta=1.0), ValueError, "delta must be below 1, got 1.0"),
        (dict(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (dict(epochs=2.0), TypeError, "epochs must be an int, got 2.0"),
        (dict(proof="mine"), ValueError, "proof must be one of 'corrected', 'paper', got 'mine'"),
        (dict(constants={}), TypeError, "constants must be a Constants, got dict"),
        (dict(epochs=10**400), ValueError, "epochs must be at most 2^1000, got an int of 1329"),
        (dict(epsilon=1e-160), ValueError, "epsilon must be larger for step sizes and epochs"),
        (dict(epsilon=1e-90), ValueError, "epsilon must be larger for step sizes and epochs"),
    ],
)
def test_bad_arguments(changed, error, message):
    given = {"constants": BY_HAND, "epsilon": 0.1, "delta": 0.1, **changed}
    with pytest.raises(error) as raised:
        theorem_step_sizes(given.pop("constants"), **given)
    assert message in str(raised.value)


@pytest.mark.parametrize("proof", PROOFS)
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("sigma", 1e200, "smaller"),
        ("gap", 1e308, "smaller"),
        ("L_y_max", 1e308, "smaller"),
        ("d_x", 2**900, "smaller"),
        ("epochs", 2**1000, "smaller"),
        ("delta", 1e-320, "larger"),
        ("epsilon", 1e-120, "larger"),
        ("epsilon", 1e200, "smaller"),
    ],
)
def test_what_is_beyond_floats_is_named(proof, name, value, rule):
    """The argument that is farthest from 1."""
    given = {"epsilon": 0.1, "delta": 0.1, "proof": proof}
    constants = dataclasses.replace(BY_HAND, sigma=1e5, G=1e100 if name == "epochs" else 5)
    if hasattr(constants, name):
        constants = dataclasses.replace(constants, **{name: value})
    else:
        given[name] = value
    with pytest.raises(ValueError, match=f"^{name} must be {rule} for step sizes and epochs to be"):
        theorem_step_sizes(constants, **given)
