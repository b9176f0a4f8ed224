"""The same random draws in every evaluation, and directions of their own in every step."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter
from toys import (
    CONFIGURATIONS,
    ESTIMATORS,
    MODES,
    Net,
    Toy,
    draw,
    equal,
    evaluations,
    random_states,
    seed_everything,
)

from zofo_optim import HybridZOFO


@pytest.mark.parametrize(("mode", "estimator", "samples"), CONFIGURATIONS)
def test_the_random_state_is_as_after_one_evaluation(mode, estimator, samples):
    for phases in ("one", "two"):
        toy, drawn = Toy(), []
        optimizer = toy.optimizer(mode, estimator=estimator, num_samples=samples)

        def closure(toy=toy, drawn=drawn):
            drawn.append(draw())
            return toy() * drawn[-1][0]

        seed_everything(8)
        for step in range(2):
            optimizer.zero_grad()
            if phases == "one":
                optimizer.step(closure)
            else:
                optimizer.backward(closure)
                optimizer.step()
            after = random_states()
            seed_everything(8)
            expected = [draw() for _ in range(step + 1)]
            assert after == random_states()
        count = evaluations(mode, estimator, samples)
        first = count + (mode != "fo")
        assert drawn == [expected[0]] * first + [expected[1]] * count
        assert expected[0] != expected[1]


@pytest.mark.parametrize("mode", MODES)
def test_the_optimizer_draws_nothing_itself(mode):
    seed_everything(9)
    before = random_states()
    toy = Toy(torch.bfloat16)  # with stochastic rounding
    optimizer = toy.optimizer(mode)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(toy)
    assert random_states() == before


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", MODES)
def test_dropout_masks_are_the_same_in_every_evaluation(mode, estimator):
    net, masks = Net(), []
    net.requires_grad_(mode == "fo")
    net.head.requires_grad_(mode != "zo")
    if mode == "hybrid":
        optimizer = net.optimizer(estimator=estimator, num_samples=2)
    else:
        optimizer = HybridZOFO(
            net.parameters(), 1e-3, mode=mode, estimator=estimator, num_samples=2
        )

    def closure():
        masks.append(F.dropout(torch.ones(64), 0.5))
        return net() * masks[-1].mean()

    torch.manual_seed(6)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    count = evaluations(mode, estimator, 2)
    first = count + (mode != "fo")
    assert len(masks) == first + count
    assert all(torch.equal(m, masks[0]) for m in masks[:first])
    assert all(torch.equal(m, masks[-1]) for m in masks[first:])
    assert not torch.equal(masks[0], masks[-1])


@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_seeds_select_the_path(mode):
    def path(seed, torch_seed):
        seed_everything(torch_seed)
        toy = Toy()
        optimizer = toy.optimizer(mode, seed=seed)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(toy)
        return toy.values()

    expected = path(1, 1)
    assert equal(path(1, 2), expected)
    for other in (0, 2, (1 << 64) - 1):
        assert not torch.equal(path(other, 1)[0], expected[0])


def test_every_step_has_directions_of_its_own():
    points = []
    x = Parameter(torch.zeros(16, dtype=torch.float64))
    optimizer = HybridZOFO([x], mode="zo", mu=1.0, lr=0.0, estimator="one_sided", num_samples=2)

    def closure():
        points.append(x.detach().clone())
        return x.sum()

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(points[1], points.pop(2))  # the first step evaluates there once more
    drawn = [p for i, p in enumerate(points) if i % 3]
    assert len(drawn) == 6
    for a, b in itertools.combinations(drawn, 2):
        assert (a - b).abs().min() > 0 or (a - b).abs().max() > 0.1
        assert not torch.allclose(a, b, atol=1e-3)
