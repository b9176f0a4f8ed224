"""One direction an example: losses (B,), slopes of their own, accumulation, and what cannot be."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from low_rank import MU, PER_EXAMPLE, Seen, named, optimizer_of, randn, wanted
from torch import nn
from torch.nn import Parameter

from zofo_kernels import noise
from zofo_optim import HybridZOFO, Listener
from zofo_optim.evaluation import NoLossError

LR = 0.02
ESTIMATORS = ["one_sided", "two_sided"]
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


def weights():
    shapes = dict(w=(4, 5), b=(4,), n=(4,), v=(3, 4))
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def batch(size, seed=9):
    return randn(size, 5, seed=seed)


def outputs(x, w, b, n, v):
    return F.linear(F.layer_norm(F.linear(x, w, b), (4,), n).tanh(), v)


class Task:
    """A small network, and the losses of a batch's examples."""

    def __init__(self, **options):
        self.params = named(weights())
        self.optimizer = optimizer_of(
            self.params, **{**PER_EXAMPLE, "lr": LR, "estimator": "one_sided", **options}
        )

    def losses(self, x):
        y = outputs(x, **dict(self.params))
        return (y * torch.tensor([0.5, 1.0, 1.5], dtype=y.dtype)).sum(1) + y.square().sum(1)

    def values(self):
        return [p.detach().clone() for _, p in self.params]

    def own_slope(self, x, example, first=0):
        """Of one example of the batch, by itself, along the direction of its number in the step."""
        (group,) = self.optimizer.zo_groups()
        direction, kept = group.direction(first + example), self.values()

        def at(sign):
            for (_, p), w, index in zip(self.params, kept, group.indices, strict=True):
                z = noise(w.shape, direction, index=index, dtype=w.dtype)
                p.data.copy_(w + sign * group.mu * z)
            found = self.losses(x[example : example + 1]).item()
            for (_, p), w in zip(self.params, kept, strict=True):
                p.data.copy_(w)
            return found

        if self.optimizer.settings.estimator == "two_sided":
            return (at(1) - at(-1)) / 2 / group.mu
        return (at(1) - at(0)) / group.mu


def close(found, expected, room=1e-9):
    torch.testing.assert_close(found, expected, rtol=room, atol=room)


def stepped(task, before, coefficients, decay=0.0):
    """The weights after a step, dense: each direction materialised."""
    (group,) = task.optimizer.zo_groups()
    found = []
    for index, w in enumerate(before):
        total = decay * w
        for s, c in enumerate(coefficients):
            direction = group.direction(s)._replace(step=group.options["zo_step"] - 1)
            total = total + c * noise(w.shape, direction, index=index, dtype=w.dtype)
        found.append(w - LR * total)
    return found


# ---- slopes, accumulation, the update ---------------------------------------------------------


@estimators
@pytest.mark.parametrize("rank", [1, 3])
def test_slopes_are_each_examples_own(estimator, rank):
    """And one batch after the other, of other sizes: memory for 4, then 2, then 5 examples."""
    task = Task(estimator=estimator, rank=rank)
    for step, size in enumerate((4, 2, 5, 1)):
        x = batch(size, seed=step)
        expected = [task.own_slope(x, s) for s in range(size)]
        returned = task.optimizer.step(lambda x=x: task.losses(x))
        assert task.optimizer.projected_grads.shape == (1, size)
        close(task.optimizer.projected_grads[0], torch.tensor(expected, dtype=torch.float64))
        assert returned.shape == ((size,) if estimator == "one_sided" else ())


@pytest.mark.parametrize("maximize", [False, True])
def test_micro_batches_count_on(maximize):
    """Of 3, 2 and 1 examples: examples 0 to 5 of the step; each batch's mean; then the update."""
    task = Task()
    task.optimizer.param_groups[0].update(maximize=maximize, weight_decay=0.25)
    for step in range(2):
        before, expected, first = task.values(), [], 0
        for part, size in enumerate((3, 2, 1)):
            x = batch(size, seed=10 * step + part)
            slopes = [task.own_slope(x, s, first) for s in range(size)]
            expected += [slope / size for slope in slopes]
            first += size
            task.optimizer.backward(lambda x=x: task.losses(x))
            close(task.optimizer.projected_grads[0], torch.tensor(slopes, dtype=torch.float64))
        close(task.optimizer.accumulated[0], torch.tensor(expected, dtype=torch.float64))
        told = []

        class Keeps(Listener):
            def updated(self, updates, told=told):
                told.extend(updates)

        listener = task.optimizer.add_listener(Keeps())
        task.optimizer.step()
        task.optimizer.remove_listener(listener)
        (update,) = told
        assert [d.sample for d in update.directions] == list(range(6))
        coefficients = [-c if maximize else c for c in expected]
        for found, w in zip(task.values(), stepped(task, before, coefficients, 0.25), strict=True):
            close(found, w)


def test_zero_grad_counts_from_0_again():
    task = Task()
    task.optimizer.backward(lambda: task.losses(batch(3)))
    task.optimizer.zero_grad()
    x = batch(2)
    task.optimizer.backward(lambda: task.losses(x))
    expected = [task.own_slope(x, s) for s in range(2)]
    close(task.optimizer.projected_grads[0], torch.tensor(expected, dtype=torch.float64))
    assert task.optimizer.accumulated.shape == (1, 2)


def test_the_report_is_of_all_examples():
    """Slopes of micro-batches stand side by side, also where these are equally large."""
    task, expected = Task(), []
    for part in range(2):
        x = batch(3, seed=part)
        task.optimizer.backward(lambda x=x: task.losses(x) / 2)
        expected.append(task.optimizer.projected_grads.abs())
    assert task.optimizer.accumulated.shape == (1, 6)
    size = 2 * torch.cat(expected).mean().item()
    assert f"slope {size:.2e}" in task.optimizer.report()


def through_a_file(optimizer, fresh):
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    fresh.load_state_dict(state)
    return fresh


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_copies_go_on_in_the_middle_of_a_step(how):
    whole, task = Task(), Task()
    for part in range(2):
        whole.optimizer.backward(lambda part=part: whole.losses(batch(3 - part, seed=part)))
    whole.optimizer.step()
    task.optimizer.backward(lambda: task.losses(batch(3, seed=0)))
    if how == "state_dict":
        other = Task()
        through_a_file(task.optimizer, other.optimizer)
    elif how == "deepcopy":
        other = copy.deepcopy(task)
    else:
        other = pickle.loads(pickle.dumps(task))
    other.optimizer.backward(lambda: other.losses(batch(2, seed=1)))
    other.optimizer.step()
    for a, b in zip(other.values(), whole.values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(task.values(), Task().values(), strict=True):
        assert torch.equal(a, b)  # the one that was copied has not moved


# ---- first-order groups ------------------------------------------------------------------------


class Hybrid(nn.Module):
    """A frozen layer and its low-rank adapter."""

    def __init__(self):
        super().__init__()
        self.base = Parameter(randn(4, 5), False)
        self.a = Parameter(randn(2, 5, seed=1))
        self.b = Parameter(randn(4, 2, seed=2))

    def losses(self, x):
        return (F.linear(x, self.base) + x @ self.a.T @ self.b.T).tanh().square().sum(1)


@estimators
@pytest.mark.parametrize("style", ["returns", "calls backward", "calls and divides"])
def test_first_order_gradients_are_of_the_mean(estimator, style):
    model = Hybrid()
    groups = [
        dict(params=[("base", model.base)], mode="zo", lr=LR, mu=MU),
        dict(params=[("a", model.a), ("b", model.b)], mode="fo", lr=LR),
    ]
    optimizer = HybridZOFO(groups, seed=3, estimator=estimator, **PER_EXAMPLE)
    total = None
    for size in (3, 2):
        x = batch(size, seed=size)

        def closure(x=x):
            losses = model.losses(x)
            if style == "calls and divides":
                losses = losses / 2
            if style != "returns":
                losses.mean().backward()
            return losses

        optimizer.backward(closure)
        factor = 0.5 if style == "calls and divides" else 1.0
        grads = torch.autograd.grad(factor * model.losses(x).mean(), (model.a, model.b))
        total = grads if total is None else [t + g for t, g in zip(total, grads, strict=True)]
        close(model.a.grad, total[0])
        close(model.b.grad, total[1])
    assert optimizer.accumulated.shape == (1, 5)
    before = model.a.detach().clone()
    optimizer.step()
    close(model.a.detach(), before - LR * total[0])


# ---- losses that are not finite ---------------------------------------------------------------


def with_a_bad_row(task, x, bad, at=None):
    """Row 1 is bad in all evaluations, or in the one of this number."""
    count = iter(range(100))

    def closure():
        losses = task.losses(x).clone()
        if at is None or next(count) == at:
            losses[1] = bad
        return losses

    return closure


@estimators
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_slope_0(estimator, bad):
    """The others count; the mean is over all of them."""
    task, x = Task(estimator=estimator), batch(3)
    expected = [task.own_slope(x, s) for s in range(3)]
    expected[1] = 0.0
    before = task.values()
    task.optimizer.step(with_a_bad_row(task, x, bad))
    close(task.optimizer.projected_grads[0], torch.tensor(expected, dtype=torch.float64))
    for found, w in zip(
        task.values(), stepped(task, before, [c / 3 for c in expected]), strict=True
    ):
        close(found, w)
    assert task.optimizer.skipped_steps == 1


def test_none_finite_changes_nothing():
    task, before = Task(), Task().values()
    task.optimizer.param_groups[0]["weight_decay"] = 0.5
    task.optimizer.step(lambda: task.losses(batch(3)) * math.nan)
    for found, w in zip(task.values(), before, strict=True):
        assert torch.equal(found, w)


@estimators
def test_a_row_that_is_not_finite_raises(estimator):
    task, before = Task(estimator=estimator, nonfinite="raise"), Task().values()
    with pytest.raises(FloatingPointError, match="closure must return finite losses"):
        task.optimizer.step(with_a_bad_row(task, batch(3), math.nan))
    for found, w in zip(task.values(), before, strict=True):
        assert torch.equal(found, w)
    assert task.optimizer.accumulated is None


# ---- what cannot be ---------------------------------------------------------------------------

BAD = [
    (lambda y: y.mean(), ValueError, r"one loss for each example, shape \(B,\).*got shape \(\)"),
    (lambda y: y[:, None], ValueError, r"shape \(B,\).*got shape \(3, 1\)"),
    (lambda y: y[:0], ValueError, r"shape \(B,\).*got shape \(0,\)"),
    (lambda y: y.long(), TypeError, "closure must return real losses, got dtype torch.int64"),
    (lambda y: y + 0j, TypeError, "closure must return real losses, got dtype torch.complex128"),
    (lambda y: [y.tolist()], TypeError, "a number for each example where directions='per_example'"),
    (lambda y: 0.5, TypeError, "list of numbers, where directions='per_example', got float"),
    (lambda y: None, NoLossError, "list of numbers, where directions='per_example', got NoneType"),
]


@estimators
@pytest.mark.parametrize(("spoil", "error", "message"), BAD)
def test_what_a_closure_must_not_return(estimator, spoil, error, message):
    task, before = Task(estimator=estimator), Task().values()
    with pytest.raises(error, match=message):
        task.optimizer.step(lambda: spoil(task.losses(batch(3))))
    for found, w in zip(task.values(), before, strict=True):
        assert torch.equal(found, w)
    task.optimizer.step(lambda: task.losses(batch(3)))  # goes on


@estimators
@pytest.mark.parametrize("sizes", [(3, 6), (6, 3)])
def test_as_many_losses_in_every_evaluation(estimator, sizes):
    task, count = Task(estimator=estimator), iter(range(100))
    with pytest.raises((ValueError, RuntimeError), match=r"as many losses|that the closure"):
        task.optimizer.step(lambda: task.losses(batch(sizes[next(count) > 0])))


def mixes(x, w, b, n, v):
    """Batch normalisation."""
    h = F.batch_norm(F.linear(x, w, b), None, None, training=True)
    return F.linear(h * n, v)


def reverses(x, w, b, n, v):
    """Sorted examples, which are put back at the end."""
    return outputs(x.flip(0), w, b, n, v).flip(0)


def swaps(x, w, b, n, v):
    """Two examples, but not the last one."""
    order = [1, 0, 2, 3]
    return outputs(x[order], w, b, n, v)[order]


def looks_back(x, w, b, n, v):
    """Each example sees the one before."""
    y = outputs(x, w, b, n, v)
    return y + torch.cat([torch.zeros_like(y[:1]), y[:-1]])


def interleaves(x, w, b, n, v):
    """Rows (T, B), flattened, as though they were (B, T)."""
    rows = x.unflatten(1, (5, 1)).expand(-1, 5, 5) * torch.eye(5, dtype=x.dtype)
    flat = rows.transpose(0, 1).reshape(-1, 5)
    return outputs(flat, w, b, n, v).view(5, len(x), 3).sum(0)


@estimators
@pytest.mark.parametrize("function", [mixes, reverses, swaps, looks_back, interleaves])
def test_examples_that_are_mixed_are_found(estimator, function):
    params, x = named(weights()), batch(4)
    before = [p.detach().clone() for _, p in params]
    optimizer = optimizer_of(params, estimator=estimator, **PER_EXAMPLE)
    seen = Seen(lambda **p: function(x, **p), params, 4)
    with pytest.raises(RuntimeError, match=r"changed the losses of others \(by up to [0-9]"):
        optimizer.step(seen)
    for (_, p), w in zip(params, before, strict=True):
        assert torch.equal(p, w)


# ---- how many examples there are ---------------------------------------------------------------


def flattened(x, w, b, n, v):
    """The first input has 5 rows an example."""
    rows = (x.unflatten(1, (5, 1)).expand(-1, 5, 5) * torch.eye(5, dtype=x.dtype)).reshape(-1, 5)
    return outputs(rows, w, b, n, v).view(len(x), 5, 3).sum(1)


def pooled(x, w, b, n, v):
    """Only the first input has 5 rows an example: a later one cannot be divided by the guess."""
    rows = (x.unflatten(1, (5, 1)).expand(-1, 5, 5) * torch.eye(5, dtype=x.dtype)).reshape(-1, 5)
    h = F.linear(rows, w, b).tanh().view(len(x), 5, 4).sum(1)
    return F.linear(F.layer_norm(h, (4,), n), v)


@pytest.mark.parametrize("function", [flattened, pooled])
def test_their_number_is_found_without_a_clean_loss(function):
    """Zeroth order alone, two-sided: the first guess may be wrong, and is made good."""
    params, x = named(weights()), batch(3)
    seen = Seen(lambda **p: function(x, **p), params, 3)
    optimizer = optimizer_of(params, estimator="two_sided", **PER_EXAMPLE)
    optimizer.backward(seen)
    optimizer.zero_grad()
    seen.outputs.clear()
    optimizer.backward(seen)
    assert optimizer.projected_grads.shape == (1, 3)
    for sign, found in zip((1, -1), seen.outputs[-2:], strict=True):
        close(found, wanted(seen.function, params, optimizer, sign, 3))


def test_a_wrong_guess_costs_one_batch_only():
    """Of batches of one size, the first one is evaluated once more; a smaller last one is, too."""
    params = named(weights())
    calls = []
    optimizer = optimizer_of(params, estimator="two_sided", **PER_EXAMPLE)

    def steps(*sizes):
        found = []
        for size in sizes:
            x = batch(size)
            del calls[:]

            def closure(x=x):
                calls.append(1)
                return flattened(x, **dict(params)).square().mean(1)

            optimizer.step(closure)
            assert optimizer.projected_grads.shape == (1, size)
            found.append(len(calls))
        return found

    assert steps(3)[0] > 3  # and verified
    assert steps(3, 3, 2, 2) == [2, 2, 4, 2]


def test_random_draws_are_shared_though_a_guess_was_wrong():
    """Dropout is the same in both evaluations, and the generator ends as after one."""
    params, x = named(weights()), batch(3)

    def function(**p):
        return F.dropout(flattened(x, **p), 0.5)

    optimizer = optimizer_of(params, estimator="two_sided", **PER_EXAMPLE)
    torch.manual_seed(1)
    function(**dict(params))
    after = torch.get_rng_state()
    for _ in range(2):
        torch.manual_seed(1)
        seen = Seen(function, params, 3)
        optimizer.step(seen)
        assert torch.equal(torch.get_rng_state(), after)
    zero = seen.outputs[-1] == 0
    assert 0 < zero.sum() < zero.numel()
    assert torch.equal(seen.outputs[-2] == 0, zero)


# ---- closures that fail, and modes -------------------------------------------------------------


@estimators
@pytest.mark.parametrize("at", range(6))
def test_a_closure_that_raises_leaves_all_as_it_was(estimator, at):
    """In any evaluation, those that verify among them; the next step is as the first would be."""
    task, sound, count = Task(estimator=estimator), Task(estimator=estimator), iter(range(100))

    def closure():
        if next(count) == at:
            raise ZeroDivisionError
        return task.losses(batch(3))

    before = task.values()
    with pytest.raises(ZeroDivisionError):
        task.optimizer.step(closure)
    for found, w in zip(task.values(), before, strict=True):
        assert torch.equal(found, w)
    assert task.optimizer.accumulated is None
    task.optimizer.step(lambda: task.losses(batch(3)))
    sound.optimizer.step(lambda: sound.losses(batch(3)))
    for a, b in zip(task.values(), sound.values(), strict=True):
        assert torch.equal(a, b)


def test_groups_with_their_own_mu():
    params = named(weights())
    groups = [
        dict(params=params[:2], mode="zo", lr=LR, mu=1e-3),
        dict(params=params[2:], mode="zo", lr=LR, mu=4e-3),
    ]
    optimizer = HybridZOFO(groups, seed=3, estimator="one_sided", **PER_EXAMPLE)
    seen = Seen(lambda **p: outputs(batch(3), **p), params, 3)
    optimizer.step(seen)
    clean, displaced = seen.outputs[:2]
    directions = [optimizer.zo_groups()[0].direction(s)._replace(step=0) for s in range(3)]
    start = weights()
    for s, direction in enumerate(directions):
        moved = {
            name: w + (1e-3 if i < 2 else 4e-3) * noise(w.shape, direction, index=i, dtype=w.dtype)
            for i, (name, w) in enumerate(start.items())
        }
        close(displaced[s], outputs(batch(3), **moved)[s], 1e-12)
    ratio = optimizer.projected_grads[0] / optimizer.projected_grads[1]
    close(ratio, torch.full((3,), 4.0, dtype=torch.float64))
    assert not torch.equal(clean, displaced)


@pytest.mark.parametrize("sizes", [(4,), (1, 4), (1, 1, 4)])
def test_a_batch_of_one_example_verifies_no_ownership(sizes):
    """Sorted rows are found by the first batch of several."""
    torch.manual_seed(0)
    first, second = (nn.Linear(*shape).double() for shape in ((8, 16), (16, 1)))
    model = nn.Sequential(first, second).requires_grad_(False)
    optimizer = optimizer_of(list(model.named_parameters()), **PER_EXAMPLE)

    def losses(x):
        order = x.sum(1).argsort()
        h = torch.tanh(first(x[order]))
        return second(h[order.argsort()]).square().mean(1)

    for size in sizes[:-1]:
        optimizer.step(lambda size=size: losses(batch_of(size)))
    with pytest.raises(RuntimeError, match="changed the losses of others"):
        optimizer.step(lambda: losses(batch_of(sizes[-1])))


def batch_of(size):
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(size)).double()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_slopes_that_are_reported_are_of_the_whole_batch(parts):
    """However it is divided, where the closure divides as for a scalar loss."""
    task = Task(estimator="two_sided")
    optimizer = task.optimizer
    for some in batch(4).chunk(parts):
        optimizer.backward(lambda some=some: task.losses(some) / parts)
    told = float(optimizer.report().split("slope ")[1].split(",")[0])
    each = optimizer.accumulated.abs().mean().item() * 4
    assert told == pytest.approx(each, rel=1e-2)


def test_first_order_alone_reports_the_mean():
    layer = nn.Linear(8, 1).double()
    optimizer = HybridZOFO(layer.parameters(), lr=0.1, **PER_EXAMPLE)
    losses = optimizer.step(lambda: layer(batch_of(4)).square().mean(1))
    assert losses.shape == (4,)
    assert optimizer.last_loss.item() == pytest.approx(losses.mean().item())
    assert "loss" in optimizer.report()
