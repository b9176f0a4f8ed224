"""Parameters of any shape, layout, dtype and group."""

import pytest
import torch
from torch.nn import Parameter
from toys import ESTIMATORS, Toy, run

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["zo", "hybrid"])
def test_no_gradients_are_made_for_frozen_parameters(mode, estimator):
    toy = Toy()
    optimizer = toy.optimizer(mode, estimator=estimator)
    run(optimizer, toy, 3)
    assert toy.x.grad is None
    assert not toy.x.requires_grad
    assert (toy.y.grad is None) == (mode == "zo")
    assert toy.y.requires_grad == (mode == "hybrid")
    assert len(optimizer.state) == 0


def test_gradients_of_zeroth_order_parameters_are_left_alone():
    """ZO-only: a gradient that is there already is neither used nor changed by a step."""
    toy = Toy()
    optimizer = HybridZOFO([toy.x, toy.y], mode="zo", lr=1e-3)
    toy.x.grad = torch.full_like(toy.x, 1e6)
    optimizer.step(toy)
    assert (toy.x.grad == 1e6).all()
    assert (toy.x - Toy().x).abs().max() < 1


def test_weights_of_any_shape_and_layout():
    shapes = {"scalar": (), "empty": (0, 3), "one": (1, 1), "cube": (2, 3, 4)}
    params = {k: Parameter(torch.full(s, 1.5), requires_grad=False) for k, s in shapes.items()}

    def grid(*shape):
        return torch.linspace(1.2, 1.8, torch.Size(shape).numel()).reshape(shape)

    dense = {
        "transposed": grid(4, 3).t(),
        "strided": grid(4, 6)[:, ::2],
        "channels last": grid(1, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }
    strided = {k: Parameter(v, requires_grad=False) for k, v in dense.items()}
    plain = {k: Parameter(v.clone().contiguous(), requires_grad=False) for k, v in dense.items()}
    assert not any(p.is_contiguous() for p in strided.values())

    def train(chosen):
        others = [Parameter(p.detach().clone(), requires_grad=False) for p in params.values()]
        every = [*others, *chosen]
        optimizer = HybridZOFO(every, mode="zo", lr=1e-2)
        run(optimizer, lambda: sum(p.double().square().sum() for p in every), 4)
        return every

    left, right = train(strided.values()), train(plain.values())
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)
    for p, start in zip(left, params.values(), strict=False):
        assert p.shape == start.shape
        assert p.numel() == 0 or not torch.equal(p, start)
    assert not strided["transposed"].is_contiguous()


def test_strided_views_leave_their_neighbours():
    whole = torch.ones(4, 6)
    optimizer = HybridZOFO([whole[:, ::2]], mode="zo", lr=1e-2)
    view = optimizer.param_groups[0]["params"][0]
    run(optimizer, lambda: view.square().sum(), 3)
    assert (whole[:, 1::2] == 1).all()
    assert (whole[:, ::2] != 1).all()


def test_dtypes_may_be_mixed():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [Parameter(torch.full((7,), 1.5, dtype=d), requires_grad=False) for d in dtypes]
    start = [p.clone() for p in params]
    optimizer = HybridZOFO(params, mode="zo", lr=1e-3, mu=1e-2)
    points = []

    def closure():
        points.append([p.detach().clone().double() for p in params])
        return sum(p.double().square().sum() for p in params)

    optimizer.step(closure)
    for index, dtype in enumerate(dtypes):
        z = noise((7,), Direction(0, 0, 0), index=index)
        expected = (1.5 + 1e-2 * z.double()).to(dtype)
        torch.testing.assert_close(points[0][index], expected.double(), rtol=0, atol=2e-7)
        assert params[index].dtype == dtype
        assert not torch.equal(params[index], start[index])


def test_rounding_is_stochastic_unless_nearest_is_asked_for():
    """An update of a tenth of an ulp: nearest loses all of it, stochastic keeps its mean."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        x = Parameter(torch.full((2000,), 1.5, dtype=torch.bfloat16), requires_grad=False)
        optimizer = HybridZOFO([x], mode="zo", lr=0.0, weight_decay=1.0, rounding=rounding)
        optimizer.param_groups[0]["lr"] = 0.1 * 2.0**-7 / 1.5
        optimizer.step(lambda: 1.0)
        moved[rounding] = (1.5 - x.double()) * 2**7
    assert (moved["nearest"] == 0).all()
    assert set(moved["stochastic"].tolist()) == {0.0, 1.0}
    assert moved["stochastic"].mean().item() == pytest.approx(0.1, abs=0.03)


def test_the_distribution_is_the_one_asked_for():
    moved = {}
    for distribution in ("gaussian", "rademacher"):
        x = Parameter(torch.zeros(64, dtype=torch.float64), requires_grad=False)
        optimizer = HybridZOFO([x], mode="zo", distribution=distribution, lr=1.0, mu=0.25)
        optimizer.step(lambda x=x: 2 * x[0])
        moved[distribution] = len(x.abs().unique())
    assert moved == {"gaussian": 64, "rademacher": 1}


def test_the_backend_is_the_one_asked_for(monkeypatch):
    from zofo_kernels import reference

    used = []
    for name in ("perturb", "update"):
        original = getattr(reference, name)
        spy = (lambda f, n: lambda *args: (used.append(n), f(*args))[1])(original, name)
        monkeypatch.setattr(reference, name, spy)
    toy = Toy()
    toy.optimizer("zo", backend="reference").step(toy)
    assert used == ["perturb", "perturb", "update"]


def test_duplicates_count_once():
    a, b = (Parameter(torch.linspace(1, 2, 6).double(), requires_grad=False) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = HybridZOFO([a, a], mode="zo", lr=1e-3)
    once = HybridZOFO([b], mode="zo", lr=1e-3)
    run(twice, lambda: a.square().sum(), 3)
    run(once, lambda: b.square().sum(), 3)
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.linspace(1, 2, 6).double())


def test_shared_memory_is_refused():
    p = Parameter(torch.ones(4), requires_grad=False)
    other = Parameter(p.data, requires_grad=False)
    groups = [{"params": [("a", p)]}, {"params": [("b", other)]}]
    for given in ([("a", p), ("b", other)], groups):
        with pytest.raises(ValueError, match="parameters 'a' and 'b' share memory"):
            HybridZOFO(given, mode="zo", lr=1e-3)
    with pytest.raises(ValueError, match="share memory"):
        HybridZOFO([torch.ones(1).expand(4)], mode="zo", lr=1e-3)
    HybridZOFO([Parameter(torch.empty(0)), Parameter(torch.empty(0))], mode="zo", lr=1e-3)


def test_groups_of_different_mu_move_together():
    """Each sees the common loss difference over its own mu."""
    x, y = (Parameter(torch.ones(4).double(), requires_grad=False) for _ in range(2))
    groups = [{"params": [x], "mu": 1e-3}, {"params": [y], "mu": 4e-3}]
    optimizer = HybridZOFO(groups, mode="zo", lr=1.0, seed=2)
    optimizer.step(lambda: 3 * x.sum() + y.sum())
    z = [noise((4,), Direction(2, 0, 0), index=i, dtype=torch.float64) for i in range(2)]
    difference = 1e-3 * 3 * z[0].sum() + 4e-3 * z[1].sum()
    expected = torch.stack([difference / 1e-3, difference / 4e-3]).reshape(2, 1)
    torch.testing.assert_close(optimizer.projected_grads, expected, rtol=1e-9, atol=1e-12)
    for p, c, v in zip((x, y), expected, z, strict=True):
        torch.testing.assert_close(p.detach(), 1 - c * v, rtol=1e-9, atol=1e-11)
