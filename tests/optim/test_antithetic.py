"""Pairs of examples, displaced one way and the other in one evaluation; scores of rewards."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from low_rank import MU, PER_EXAMPLE, copies, named, optimizer_of, randn
from torch.nn import Parameter

from zofo_kernels import perturbed
from zofo_optim import HybridZOFO, Journal, per_example_gain, replay
from zofo_optim.estimators import ESTIMATORS

PAIRED = dict(PER_EXAMPLE, estimator="antithetic")
IDS = torch.randint(6, (8, 3), generator=torch.Generator().manual_seed(1))
BIAS = randn(5, seed=7)
SHAPES = dict(e=(6, 5), w=(4, 5), b=(4,), n=(4,), v=(4, 5))


def weights(dtype=torch.float64):
    parts = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    return named({name: part.to(dtype) for name, part in parts.items()})


def outputs(e, w, b, n, v):
    """Of 8 examples: an embedding, a linear map with a bias, a norm, a product."""
    y = F.layer_norm(F.linear(F.embedding(IDS, e), w, b), (4,), n)
    return (torch.addmm(BIAS.to(v.dtype), y.flatten(0, 1).tanh(), v)).view(8, -1)


def losses_of(params):
    y = outputs(**dict(params))
    return (y * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype)).sum(1) + y.square().sum(1)


def displaced(params, direction, scale):
    return [
        (name, perturbed(p, direction, scale, index=index))
        for index, (name, p) in enumerate(params)
    ]


class Losses:
    """A closure that keeps what it gave."""

    def __init__(self, params, change=lambda losses: losses):
        self.params, self.change, self.seen = params, change, []

    def __call__(self):
        self.seen.append(losses_of(self.params))
        return self.change(self.seen[-1])


def wanted_losses(params, optimizer, each, first=0):
    """Of each example, under its direction and side alone."""
    (group,) = optimizer.zo_groups()
    found = torch.empty(8, dtype=torch.float64)
    for example in range(8):
        sample, second = divmod(example // each, 2)
        at = displaced(params, group.direction(first + sample), -MU if second else MU)
        found[example] = losses_of(at)[example]
    return found


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_example_is_displaced_along_its_direction_and_side(monkeypatch, each, rank, dtype):
    params = weights(dtype)
    optimizer = optimizer_of(params, rank=rank, examples_per_direction=each, **PAIRED)
    closure = Losses(params)
    optimizer.backward(closure)  # and verify
    optimizer.zero_grad()
    closure.seen.clear()
    with copies(monkeypatch) as copied:
        optimizer.backward(closure)
    assert copied == []
    (found,) = closure.seen  # one evaluation
    target = wanted_losses([(n, p.detach()) for n, p in params], optimizer, each).to(dtype)
    room = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, target, rtol=room, atol=room)
    assert (found - losses_of(params)).abs().min() > 1e-3


@pytest.mark.parametrize("each", [1, 2])
def test_slopes_are_those_of_the_pairs(each):
    params = weights()
    optimizer = optimizer_of(params, examples_per_direction=each, **PAIRED)
    optimizer.backward(Losses(params))
    at = wanted_losses([(n, p.detach()) for n, p in params], optimizer, each).view(-1, 2, each)
    slopes = ((at[:, 0] - at[:, 1]) / (2 * MU)).mean(1)
    found = optimizer.accumulated[0].double()
    torch.testing.assert_close(found, slopes / len(slopes), rtol=1e-9, atol=1e-9)


def test_micro_batches_go_on_with_the_directions():
    params = weights()
    optimizer = optimizer_of(params, **PAIRED)
    closure = Losses(params)
    for _ in range(2):
        optimizer.backward(closure)
    assert optimizer.accumulated.shape == (1, 8)
    still = [(n, p.detach()) for n, p in params]
    torch.testing.assert_close(closure.seen[-1], wanted_losses(still, optimizer, 1, first=4))


def test_the_estimate_is_unbiased():
    """Of a linear loss: exact on average, whatever mu."""
    torch.manual_seed(0)
    w = Parameter(torch.zeros(3, 2, dtype=torch.float64), False)
    slope = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)
    x = torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0).repeat(128, 1)
    weights = slope.T.repeat_interleave(2, 0).repeat(128, 1)
    optimizer = optimizer_of([("w", w)], lr=1.0, **PAIRED)
    for _ in range(8):
        optimizer.step(lambda: (F.linear(x, w) * weights).sum(1))
    # half of the pairs are of each column
    assert (w / 8 + slope / 2).abs().max() < 4 * slope.norm() / math.sqrt(8 * 128)


class TestDifferences:
    """Against a plain loop."""

    @given(
        st.sampled_from(sorted(ESTIMATORS)),
        st.integers(1, 3),
        st.integers(1, 3),
        st.booleans(),
        st.data(),
    )
    def test_of_rows(self, name, each, directions, first_order, data):
        estimator = ESTIMATORS[name]
        points = estimator.points(1, first_order=first_order)
        size = directions * each * estimator.sides
        number = st.floats(-10, 10) | st.sampled_from([math.nan, math.inf])
        losses = [[data.draw(number) for _ in range(size)] for _ in points]
        found = estimator.differences(points, torch.tensor(losses, dtype=torch.float64), each)
        clean = losses[0] if points[0].sign == 0 else [0.0] * size
        moved = losses[int(points[0].sign == 0) :]
        for direction in range(directions):
            values = []
            for k in range(each):
                row = direction * each * estimator.sides + k
                rows = [row, row + each] if estimator.sides == 2 else [row]
                if name == "antithetic":
                    value = (moved[0][rows[0]] - moved[0][rows[1]]) / 2
                elif name == "one_sided":
                    value = moved[0][row] - clean[row]
                else:
                    value = (moved[0][row] - moved[1][row]) / 2
                if math.isfinite(value) and all(math.isfinite(clean[r]) for r in rows):
                    values.append(value)
            if values:
                assert found[direction].item() == pytest.approx(sum(values) / len(values))
            else:
                assert not found[direction].isfinite()


def broken(losses):
    """In the third pair."""
    return torch.where(torch.arange(8) == 5, math.nan, losses)


def test_a_pair_that_is_not_finite_counts_nothing():
    params = weights()
    optimizer = optimizer_of(params, **PAIRED)
    optimizer.backward(Losses(params))
    right = optimizer.accumulated.clone()
    optimizer.zero_grad()
    optimizer.backward(Losses(params, broken))
    found = optimizer.accumulated[0]
    assert right[0].ne(0).all()
    assert found[2] == 0
    assert torch.equal(found[[0, 1, 3]], right[0, [0, 1, 3]])
    assert optimizer.skipped_steps == 1


@pytest.mark.filterwarnings("error")
def test_a_row_that_is_never_finite_is_no_divergence():
    w = Parameter(randn(4, 5), False)
    x = torch.eye(4, 5, dtype=torch.float64).repeat_interleave(2, 0)
    optimizer = optimizer_of([("w", w)], lr=1e-4, **PAIRED)
    calls = []

    def closure():
        calls.append(1)
        return broken(F.linear(x, w).square().sum(1))

    optimizer.step(closure)
    assert len(calls) > 5  # verified, by the other rows
    for _ in range(25):
        calls.clear()
        optimizer.step(closure)
        assert len(calls) == 1


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("change", ["rows", "noise"])
def test_sides_that_differ_at_rest_are_warned_of(each, change):
    params = weights()
    noise = torch.linspace(0, 1, 8, dtype=torch.float64)
    rows = torch.arange(8)
    pairs = rows.view(-1, 2, each)[:, :1].expand(-1, 2, -1).flatten()

    def closure():
        y = F.linear(torch.eye(8, 5, dtype=torch.float64)[rows if change == "rows" else pairs], w)
        return y.square().sum(1) + (noise if change == "noise" else 0)

    w = params[1][1]
    optimizer = optimizer_of(params[1:2], examples_per_direction=each, **PAIRED)
    with pytest.warns(UserWarning, match=r"sides of a direction .* no weight was displaced"):
        optimizer.step(closure)


@pytest.mark.filterwarnings("error")
def test_sides_that_are_the_same_at_rest_are_not():
    w = Parameter(randn(4, 5), False)
    x = torch.eye(4, 5, dtype=torch.float64).repeat_interleave(2, 0)
    optimizer = optimizer_of([("w", w)], **PAIRED)
    optimizer.step(lambda: F.linear(x, w).square().sum(1))


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda s: np.array(s, dtype=np.float32)])
def test_scores_come_in_any_form_and_are_ascended(kind):
    """A score that only Python knows rises."""
    torch.manual_seed(0)
    w = Parameter(torch.zeros(4, 3), False)
    x, target = torch.randn(8, 3), torch.randn(4, 3)
    x = x.repeat_interleave(2, 0).repeat(4, 1)
    group = dict(params=[("w", w)], mode="zo", lr=0.05, mu=0.05, maximize=True)
    optimizer = HybridZOFO([group], seed=1, **PAIRED)

    def score():
        wrong = F.linear(x, w) - F.linear(x, target)
        return kind([-float(row.square().sum()) for row in wrong])

    first = np.mean(score())
    for _ in range(80):
        optimizer.step(score)
    assert np.mean(score()) > first / 10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(PAIRED, directions="shared"), ValueError, "directions must be 'per_example' where"),
        (
            dict(structure="low_rank", examples_per_direction=2),
            ValueError,
            "examples_per_direction must be left alone where directions='shared', got 2",
        ),
        (dict(PAIRED, examples_per_direction=0), ValueError, "must be an int >= 1, got 0"),
        (dict(PAIRED, examples_per_direction=True), ValueError, "must be an int >= 1, got True"),
    ],
)
def test_settings_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        optimizer_of(weights(), **options)


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided", "antithetic"])
def test_examples_must_be_enough_for_whole_directions(estimator):
    params = weights()
    before = [p.clone() for _, p in params]
    options = dict(PER_EXAMPLE, estimator=estimator, examples_per_direction=3)
    optimizer = optimizer_of(params, **options)
    with pytest.raises(ValueError, match=r"a multiple of [36] losses .*got 8"):
        optimizer.step(lambda: losses_of(params))
    assert all(torch.equal(p, b) for (_, p), b in zip(params, before, strict=True))


BAD = {
    "texts": ["a", 1.0],
    "lists": [[1.0], [2.0, 3.0]],
    "None": [None, 1.0],
    "tensors of two dimensions": (torch.ones(1), torch.tensor(0.0)),
}


def test_scores_as_a_list_of_tensors():
    params = weights()
    optimizer = optimizer_of(params, **PAIRED)
    optimizer.backward(Losses(params))
    right = optimizer.accumulated.clone()
    optimizer.zero_grad()
    optimizer.backward(Losses(params, lambda losses: list(losses.unbind())))
    assert torch.equal(optimizer.accumulated, right)


@pytest.mark.parametrize("scores", BAD.values(), ids=BAD)
def test_scores_must_be_numbers(scores):
    optimizer = optimizer_of(weights(), **PAIRED)
    with pytest.raises(TypeError, match="closure must return a number for each example"):
        optimizer.step(lambda: scores)


class Beside:
    """First-order groups beside scores."""

    def __init__(self):
        self.params = weights()
        self.adapter = Parameter(torch.zeros(8, dtype=torch.float64))
        groups = [
            dict(params=self.params, mode="zo", lr=0.01, mu=MU),
            dict(params=[("adapter", self.adapter)], mode="fo", lr=0.1),
        ]
        self.optimizer = HybridZOFO(groups, seed=3, **PAIRED)


def test_scores_without_a_graph_are_refused_beside_first_order_groups():
    task = Beside()
    with pytest.raises(TypeError, match="first-order groups need a loss with a graph"):
        task.optimizer.step(lambda: losses_of(task.params).tolist())


def test_old_gradients_are_none_of_these_scores():
    task = Beside()
    task.adapter.grad = torch.ones_like(task.adapter)

    def closure():
        task.optimizer.zero_grad()
        return losses_of(task.params).tolist()

    with pytest.raises(TypeError, match="first-order groups need a loss with a graph"):
        task.optimizer.step(closure)


def test_the_gain_counts_examples_that_share_a_direction_once():
    gains = []
    for each in (1, 2):
        params = weights()
        optimizer = optimizer_of(params, examples_per_direction=each, **PAIRED)
        if each == 1:  # pairs of equal examples
            own = Losses(params, lambda losses: losses[[0, 0, 1, 1, 2, 2, 3, 3]])
        else:
            own = Losses(params, lambda losses: losses[[0, 0, 0, 0, 1, 1, 1, 1]])
        gains.append(per_example_gain(optimizer, own))
    assert [gain.examples for gain in gains] == [4, 2]
    optimizer = optimizer_of(params, **PER_EXAMPLE)
    plain = per_example_gain(optimizer, Losses(params, lambda losses: losses[[0, 1, 2, 3]]))
    assert plain.gain == pytest.approx(gains[0].gain)


def test_a_closure_may_give_first_order_gradients_itself():
    task = Beside()

    def closure():
        task.optimizer.zero_grad()
        losses = losses_of(task.params) + task.adapter
        losses.mean().backward()
        return losses.tolist()

    task.optimizer.step(closure)
    assert torch.allclose(task.adapter, torch.full_like(task.adapter, -0.1 / 8))
    assert task.optimizer.param_groups[0]["zo_step"] == 1


@pytest.mark.parametrize("each", [1, 2])
def test_journals_replay_to_the_bit(tmp_path, each):
    params = weights(torch.float32)
    base = {name: p.detach().clone() for name, p in params}
    optimizer = optimizer_of(params, lr=0.01, examples_per_direction=each, **PAIRED)
    with Journal(tmp_path / "run.zofo").attach(optimizer):
        for _ in range(3):
            optimizer.step(Losses(params))
    replay(base, tmp_path / "run.zofo")
    assert all(torch.equal(base[name], p) for name, p in params)


def test_mixed_examples_are_found():
    params = weights()
    optimizer = optimizer_of(params, **PAIRED)
    with pytest.raises(RuntimeError, match="compute the loss of each example from that example"):
        optimizer.step(Losses(params, lambda losses: losses + losses.roll(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("options", [PAIRED, PER_EXAMPLE], ids=["pairs", "examples"])
def test_few_rows_and_many_round_as_one_product(dtype, rows, rank, options):
    """As in decoding, and as in a prompt: beside displaced weights in fp64."""
    parts = dict(w=randn(40, 30) / 5, b=randn(40, seed=1))
    params = named({name: part.to(dtype) for name, part in parts.items()})
    wide = named({name: p.double() for name, p in params})
    x = randn(4, rows, 30, seed=2).repeat_interleave(2, 0).to(dtype)
    optimizer = optimizer_of(params, rank=rank, **options)
    seen = []

    def closure():
        y = F.linear(x, *(p for _, p in params))
        seen.append(y.double())
        return y.float().square().mean((1, 2))

    optimizer.backward(closure)
    (group,) = optimizer.zo_groups()
    for row, y in enumerate(seen[0]):
        sample, second = divmod(row, optimizer.settings.sides)
        at = displaced(wide, group.direction(sample), -MU if second else MU)
        wanted = F.linear(x[row].double(), *(p for _, p in at))
        room = 2 * torch.finfo(dtype).eps * wanted.abs().max()
        assert (y - wanted).abs().max() < room
        rest = F.linear(x[row].double(), *(p for _, p in wide))
        assert (wanted - rest).abs().max() > 5 * room or dtype == torch.bfloat16
