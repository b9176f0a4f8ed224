"""Rules: from the coefficients of a step to what it does to the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from zofo_kernels import Direction, Weights, noise
from zofo_optim import HybridZOFO, Listener
from zofo_optim.rules import RULES, sgd
from zofo_optim.zo_groups import Noise, ZOGroup

numbers = st.floats(-1e3, 1e3)


GAUSSIAN = Noise()


def group(noise=GAUSSIAN, **options):
    defaults = dict(maximize=False, weight_decay=0.0, seed=3, zo_step=5)
    return ZOGroup(Weights([Parameter(torch.ones(2), False)]), {**defaults, **options}, noise)


@given(
    st.lists(numbers, min_size=1, max_size=4),
    st.floats(0, 10),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["gaussian", "rademacher"]),
)
def test_sgd(numbers, lr, decay, maximize, distribution):
    coefficients, rate = torch.tensor(numbers), torch.tensor(lr)
    kept = coefficients.clone()
    of = group(Noise(distribution), weight_decay=decay, maximize=maximize)
    update = sgd(of, coefficients, rate)
    samples = range(len(numbers))
    assert update.directions == tuple(Direction(3, 5, s, distribution) for s in samples)
    assert torch.equal(update.coefficients, -kept if maximize else kept)
    assert update.lr is rate
    assert update.weight_decay == decay
    assert torch.equal(coefficients, kept)  # a rule changes nothing
    assert of.options["zo_step"] == 5


@pytest.mark.parametrize("maximize", [False, True])
def test_an_update_is_what_is_done(maximize):
    """w - lr (sum_s c_s v_s + weight_decay w), written out, from what listeners are told."""
    w = Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64), False)
    options = dict(lr=0.1, mu=1e-2, weight_decay=0.5, maximize=maximize)
    optimizer = HybridZOFO([dict(params=[w], mode="zo", **options)], num_samples=3)
    told = []

    class Keeps(Listener):
        def updated(self, updates):
            told.extend(updates)

    optimizer.add_listener(Keeps())
    before = w.detach().clone()
    optimizer.step(lambda: (w**3).sum())
    (update,) = told
    along = zip(update.coefficients, update.directions, strict=True)
    step = sum(c * noise(w.shape, v, dtype=w.dtype) for c, v in along)
    wanted = before - update.lr * (step + update.weight_decay * before)
    torch.testing.assert_close(w.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_their_names():
    w = Parameter(torch.ones(2), False)
    assert list(RULES) == ["sgd"]
    with pytest.raises(ValueError, match=r"zo_rule must be one of \('sgd',\), got 'adam'"):
        HybridZOFO([w], mode="zo", lr=1e-3, zo_rule="adam")
