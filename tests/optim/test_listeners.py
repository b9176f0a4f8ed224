"""Listeners hear all that happens to the zeroth-order weights, in order, and can do it again."""

import copy
import itertools
import pickle

import pytest
import torch
from conftest import same_bits
from torch.nn import Parameter

from zofo_kernels import Direction, Shift, perturb_, update_
from zofo_optim import HybridZOFO, Journal, Listener, replay

SETTINGS = list(
    itertools.product(("in_place", "streamed"), ("one_sided", "two_sided"), (1, 2), (False, True))
)


class Recorder(Listener):
    """Writes everything down."""

    def __init__(self):
        self.heard = []

    def moved(self, move):
        self.heard.append(("moved", move))

    def estimated(self, estimated):
        self.heard.append(("estimated", estimated))

    def updated(self, updates):
        self.heard.append(("updated", updates))

    def state_loaded(self):
        self.heard.append(("state_loaded", None))

    def group_adding(self, group):
        self.heard.append(("group_adding", group))

    def places_changing(self):
        self.heard.append(("places_changing", None))

    def names(self):
        return [name for name, _ in self.heard]

    def of(self, name):
        return [what for heard, what in self.heard if heard == name]


def problem(hybrid=False, dtype=torch.float32, **options):
    a = Parameter(torch.linspace(1.2, 1.8, 12).reshape(3, 4).to(dtype), False)
    b = Parameter(torch.linspace(-1.8, -1.2, 5).to(dtype), False)
    y = Parameter(torch.ones(2))
    groups = [
        dict(params=[a], mode="zo", lr=1e-2, mu=1e-2, weight_decay=0.1),
        dict(params=[b], mode="zo", lr=1e-3, mu=3e-2),
    ]
    if hybrid:
        groups.append(dict(params=[y], mode="fo", lr=1e-2))
    optimizer = HybridZOFO(groups, seed=5, **options)

    def closure():
        return (a.double() ** 2).sum() * (y.double().mean()) + b.double().exp().sum()

    return optimizer, closure, [a, b]


@pytest.mark.parametrize(("perturbation", "estimator", "samples", "hybrid"), SETTINGS)
def test_what_is_heard_in_a_step(perturbation, estimator, samples, hybrid):
    optimizer, closure, _ = problem(
        hybrid, perturbation=perturbation, estimator=estimator, num_samples=samples
    )
    listener = optimizer.add_listener(Recorder())
    optimizer.step(closure)
    signs = (1,) if estimator == "one_sided" else (1, -1)
    points = [(s, sign) for s in range(samples) for sign in signs]
    moves = points if perturbation == "in_place" else []
    assert listener.names() == ["moved"] * len(moves) + ["estimated", "updated"]
    assert listener.of("moved") == [(s, (sign * 1e-2, sign * 3e-2)) for s, sign in moves]
    (estimated,) = listener.of("estimated")
    has_clean = hybrid or estimator == "one_sided"
    assert estimated.losses.shape == (has_clean + len(points),)
    assert estimated.slopes.shape == (2, samples)
    assert torch.equal(estimated.slopes, optimizer.projected_grads)
    assert torch.equal(estimated.loss, optimizer.last_loss)
    assert estimated.finite
    (updates,) = listener.of("updated")
    assert [u.weight_decay for u in updates] == [0.1, 0.0]
    assert [float(u.lr) for u in updates] == [1e-2, 1e-3]
    for update, slopes in zip(updates, estimated.slopes, strict=True):
        assert update.directions == tuple(Direction(5, 0, s) for s in range(samples))
        assert torch.equal(update.coefficients, slopes / samples)


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_and_updates_are_enough_to_do_it_again(perturbation, dtype):
    """Written with the kernels alone, from what was heard; accumulation and a failure included."""
    optimizer, closure, weights = problem(dtype=dtype, perturbation=perturbation, num_samples=2)
    copies = [w.detach().clone() for w in weights]
    listener = optimizer.add_listener(Recorder())
    optimizer.step(closure)
    optimizer.backward(closure)
    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.backward(failing_at(closure, 3))
    optimizer.step(closure)

    carried, step = [None, None], 0
    for name, what in listener.heard:
        for i, tensor in enumerate(copies):
            if name == "moved":
                sample, scale = what.sample, what.scales[i]
                direction = Direction(5, step, sample) if scale else None
                perturb_([tensor], direction, scale, recover=carried[i], indices=[i])
                carried[i] = Shift(direction, scale) if scale else None
            elif name == "updated":
                directions, coefficients, lr, decay, _ = what[i]
                more = dict(weight_decay=decay, recover=carried[i], indices=[i])
                update_([tensor], directions, coefficients, lr, **more)
                carried[i] = None
        step += name == "updated"
    for ours, theirs in zip(copies, weights, strict=True):
        assert same_bits(ours, theirs.detach())


def failing_at(closure, count):
    calls = itertools.count(1)

    def failing():
        if next(calls) == count:
            raise RuntimeError("in the closure")
        return closure()

    return failing


def test_a_skipped_estimate():
    optimizer, closure, _ = problem()
    listener = optimizer.add_listener(Recorder())
    optimizer.step(lambda: closure() * float("nan"))
    (estimated,) = listener.of("estimated")
    assert not estimated.finite
    assert estimated.slopes.tolist() == [[0.0], [0.0]]
    assert [float(u.lr) for u in listener.of("updated")[0]] == [0.0, 0.0]


def test_states_and_groups():
    optimizer, closure, _ = problem()
    optimizer.step(closure)
    listener = optimizer.add_listener(Recorder())
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group(dict(params=[Parameter(torch.ones(2))], mode="fo"))
    new = dict(params=[Parameter(torch.ones(2), False)], mode="zo", lr=1e-3)
    optimizer.add_param_group(new)
    assert listener.names() == ["state_loaded", "group_adding"]
    assert listener.of("group_adding")[0] is new


def in_groups(tensors, *members):
    """An optimizer whose groups have a unit, by which state dicts arrange them."""
    groups = [
        dict(params=[tensors[name] for name in names], param_names=list(names), unit=1.0)
        for names in members
    ]
    return HybridZOFO(groups, mode="zo", lr=1e-3)


def test_groups_that_are_arranged_as_they_were_saved():
    """Places change, and the groups are made anew: a listener may refuse either."""
    tensors = {name: Parameter(torch.ones(2), False) for name in "abc"}
    state = in_groups(tensors, "ac", "b").state_dict()
    optimizer = in_groups(tensors, "ab", "c")
    listener = optimizer.add_listener(Recorder())
    optimizer.load_state_dict(state)
    heard = ["places_changing", "group_adding", "group_adding", "state_loaded"]
    assert listener.names() == heard
    assert [g["param_names"] for g in listener.of("group_adding")] == [["a", "c"], ["b"]]
    assert [g["param_names"] for g in optimizer.param_groups] == [["a", "c"], ["b"]]
    optimizer.load_state_dict(state)  # nothing is to be arranged
    assert listener.names() == [*heard, "state_loaded"]


@pytest.mark.parametrize("event", ["places_changing", "group_adding"])
def test_a_listener_may_refuse_an_arrangement(event):
    tensors = {name: Parameter(torch.ones(2), False) for name in "abc"}
    state = in_groups(tensors, "ac", "b").state_dict()
    optimizer = in_groups(tensors, "ab", "c")

    class Refuses(Listener):
        pass

    def refuse(self, *args):
        raise RuntimeError("not now")

    setattr(Refuses, event, refuse)
    optimizer.add_listener(Refuses())
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.load_state_dict(state)
    assert [g["param_names"] for g in optimizer.param_groups] == [["a", "b"], ["c"]]


def test_a_listener_may_refuse_a_group():
    class Refuses(Listener):
        def group_adding(self, group):
            raise RuntimeError("not now")

    optimizer, _, _ = problem()
    optimizer.add_listener(Refuses())
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.add_param_group(dict(params=[Parameter(torch.ones(2))], mode="zo", lr=1e-3))
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("event", ["moved", "estimated"])
def test_one_that_raises_leaves_the_weights(event):
    optimizer, closure, weights = problem(dtype=torch.bfloat16)
    before = [w.detach().clone() for w in weights]

    class Breaks(Listener):
        pass

    def broken(self, *args):
        raise ValueError("broken listener")

    setattr(Breaks, event, broken)
    breaks = optimizer.add_listener(Breaks())
    with pytest.raises(ValueError, match="broken listener"):
        optimizer.step(closure)
    for w, old in zip(weights, before, strict=True):
        assert same_bits(w.detach(), old)
    optimizer.remove_listener(breaks)
    optimizer.step(closure)  # and nothing is left over
    assert optimizer.param_groups[0]["zo_step"] == 1


def test_adding_and_removing():
    optimizer, closure, _ = problem()
    listener = Recorder()
    assert optimizer.add_listener(listener) is listener
    assert optimizer.listeners == (listener,)
    with pytest.raises(ValueError, match="listener must not be added twice"):
        optimizer.add_listener(listener)
    with pytest.raises(TypeError, match=r"listener must be a zofo_optim\.Listener, got list"):
        optimizer.add_listener([])
    optimizer.remove_listener(listener)
    with pytest.raises(ValueError, match="listener must have been added before"):
        optimizer.remove_listener(listener)
    optimizer.step(closure)
    assert listener.heard == []


def test_copies_have_no_listeners():
    optimizer, closure, _ = problem()
    listener = optimizer.add_listener(Recorder())
    other = copy.deepcopy(optimizer)
    assert other.listeners == ()
    optimizer.step(closure)
    heard = len(listener.heard)
    other.backward(lambda: torch.ones(()))
    assert len(listener.heard) == heard


@pytest.mark.parametrize("name", ["settings", "moves", "accumulated", "evaluating", "listeners"])
def test_what_can_be_read_cannot_be_set(name):
    optimizer, _, _ = problem()
    with pytest.raises(AttributeError):
        setattr(optimizer, name, None)


def test_what_can_be_read():
    optimizer, closure, _ = problem(num_samples=2)
    seen = []
    assert optimizer.accumulated is None
    optimizer.backward(lambda: seen.append(optimizer.evaluating) or closure())
    assert set(seen) == {True}
    assert not optimizer.evaluating
    assert torch.equal(optimizer.accumulated, optimizer.projected_grads / 2)
    assert [move.scales for move in optimizer.moves[-2:]] == [(-1e-2, -3e-2), (0.0, 0.0)]
    optimizer.step()
    assert optimizer.accumulated is None
    assert optimizer.moves == ()
    assert optimizer.settings.num_samples == 2
    assert optimizer.settings.zo_rule == "sgd"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_journal_that_begins_while_accumulating(dtype, tmp_path):
    """Its first step's moves are partly from before; a state dict of that step has them all."""
    optimizer, closure, weights = problem(dtype=dtype, distribution="rademacher")
    optimizer.step(closure)
    optimizer.backward(closure)
    start = {str(i): w.detach().clone() for i, w in enumerate(weights)}
    with Journal(tmp_path / "a.zofo").attach(optimizer):
        optimizer.backward(closure)
        saved = copy.deepcopy(optimizer.state_dict()), [w.detach().clone() for w in weights]
        optimizer.step()
        optimizer.step(closure)
    model = {name: w.clone() for name, w in start.items()}
    assert replay(model, tmp_path / "a.zofo").verified

    other, closure, weights = problem(dtype=dtype, distribution="rademacher")
    other.load_state_dict(saved[0])
    for w, content in zip(weights, saved[1], strict=True):
        w.data.copy_(content)
    with pytest.warns(UserWarning, match="is cut at the optimizer's step"):
        journal = Journal(tmp_path / "a.zofo", resume=True).attach(other)
    with journal:
        other.step()
        other.step(closure)
    model = {name: w.clone() for name, w in start.items()}
    assert replay(model, tmp_path / "a.zofo").verified
    for found, w in zip(model.values(), weights, strict=True):
        assert same_bits(found, w.detach())


@pytest.mark.parametrize("journal_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(1, 6))
def test_raising_at_any_move(number, dtype, journal_first, tmp_path):
    """From that move on, so at the restoring one too: weights come back, and no move is lost."""
    generator = torch.Generator().manual_seed(0)
    w = Parameter(torch.randn(300, generator=generator).to(dtype), False)
    group = dict(params=[w], mode="zo", lr=1e-2, mu=3e-2)
    optimizer = HybridZOFO([group], num_samples=2, distribution="rademacher")
    before = w.detach().clone()

    class Breaks(Listener):
        count = 0

        def moved(self, move):
            self.count += 1
            if self.count >= number:
                raise ValueError("broken listener")

    breaks = Breaks()
    if not journal_first:
        optimizer.add_listener(breaks)
    with Journal(tmp_path / "a.zofo").attach(optimizer):
        if journal_first:
            optimizer.add_listener(breaks)
        if number == 5:  # the four points' moves went well: backward's own restoring is the fifth
            with pytest.raises(ValueError, match="broken listener"):
                optimizer.backward(lambda: (w.double() ** 2).sum())
        else:
            with pytest.raises(ValueError, match="broken listener"):
                optimizer.step(lambda: (w.double() ** 2).sum())
        assert optimizer.moves[-1].scales == (0.0,)
        optimizer.remove_listener(breaks)
        optimizer.zero_grad()
        error = (w.detach().double() - before.double()).abs().max()
        assert error < 4 * torch.finfo(dtype).eps * before.abs().max()  # as moves round
        optimizer.step(lambda: (w.double() ** 2).sum())
    again = {"0": before}
    assert replay(again, tmp_path / "a.zofo").verified
    assert same_bits(again["0"], w.detach())


@pytest.mark.parametrize("event", ["moved", "estimated", "updated"])
@pytest.mark.parametrize("end", ["leaves", "raises"])
def test_the_others_hear_all(event, end):
    optimizer, closure, _ = problem()

    class Ends(Listener):
        pass

    def ending(self, *args):
        optimizer.remove_listener(self)
        if end == "raises":
            raise ValueError("broken listener")

    setattr(Ends, event, ending)
    optimizer.add_listener(Ends())
    listener = optimizer.add_listener(Recorder())
    if end == "raises":
        with pytest.raises(ValueError, match="broken listener"):
            optimizer.step(closure)
        heard = {
            "moved": ["moved"] * 2,  # to the point, and back
            "estimated": ["moved", "moved", "estimated", "moved"],
            "updated": ["moved", "moved", "estimated", "updated"],
        }
        assert listener.names() == heard[event]
    else:
        optimizer.step(closure)
        assert listener.names() == ["moved", "moved", "estimated", "updated"]


def test_the_first_error_is_raised():
    optimizer, closure, _ = problem()
    for name in ("first", "second"):

        class Breaks(Listener):
            def updated(self, updates, name=name):
                raise ValueError(name)

        optimizer.add_listener(Breaks())
    with pytest.raises(ValueError, match="first"):
        optimizer.step(closure)
    assert [group["zo_step"] for group in optimizer.param_groups] == [1, 1]


def test_pickles_have_no_listeners():
    optimizer, _, _ = problem()

    class CannotBePickled(Listener):
        pass

    optimizer.add_listener(CannotBePickled())
    assert pickle.loads(pickle.dumps(optimizer)).listeners == ()
    assert len(optimizer.listeners) == 1


def test_a_journal_is_added_and_removed_by_its_own_calls_only(tmp_path):
    optimizer, closure = problem()[:2]
    with pytest.raises(RuntimeError, match=r"attach\(optimizer\)"):
        optimizer.add_listener(Journal(tmp_path / "run.zofo"))
    assert optimizer.listeners == ()
    assert not (tmp_path / "run.zofo").exists()
    with Journal(tmp_path / "run.zofo").attach(optimizer) as journal:
        optimizer.step(closure)
        with pytest.raises(RuntimeError, match=r"close\(\)"):
            optimizer.remove_listener(journal)
        assert optimizer.listeners == (journal,)
    assert optimizer.listeners == ()


def test_a_listener_is_removed_by_identity():
    class Equal(Recorder):
        def __eq__(self, other):
            return True

        __hash__ = None

    optimizer = problem()[0]
    a, b = optimizer.add_listener(Equal()), optimizer.add_listener(Equal())
    optimizer.remove_listener(b)
    (left,) = optimizer.listeners
    assert left is a


def test_a_listener_that_raises_leaves_no_estimate_behind():
    class Refuses(Listener):
        def estimated(self, estimated):
            raise KeyError("refused")

    optimizer, closure = problem()[:2]
    listener = optimizer.add_listener(Refuses())
    with pytest.raises(KeyError, match="refused"):
        optimizer.backward(closure)
    assert optimizer.accumulated is None
    optimizer.remove_listener(listener)


@pytest.mark.parametrize("capturable", [False, True])
def test_updates_that_were_kept_keep_their_step(capturable):
    optimizer, closure = problem(capturable=capturable, backend="reference")[:2]
    recorder = optimizer.add_listener(Recorder())
    for _ in range(3):
        optimizer.step(closure)
    steps = [int(updates[0].directions[0].step) for updates in recorder.of("updated")]
    assert steps == [0, 1, 2]
