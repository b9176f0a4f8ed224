"""State and groups that a user or a framework replaces: what torch's own optimizers make of it."""

import copy
from collections import defaultdict

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam

from zofo_optim import HybridZOFO


class Job:
    """Two parameters in two first-order groups; ours beside a frozen one in a ZO group."""

    def __init__(self, cls, ours, **options):
        self.y = [Parameter(torch.linspace(1, 2, 3)), Parameter(torch.linspace(-1, 1, 4))]
        self.x = torch.ones(3)
        groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(self.y)]
        if ours:
            zeroth = {"params": [self.x], "mode": "zo", "lr": 0.0, "mu": 1e-3}
            self.optimizer = HybridZOFO([zeroth, *groups], fo_optimizer=cls, **options)
        else:
            self.optimizer = cls(groups, **options)

    def loss(self):
        return sum((p * p * p.detach().sin()).sum() for p in self.y) + self.x.sum()

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            if isinstance(self.optimizer, HybridZOFO):
                self.optimizer.step(self.loss)
            else:
                self.loss().backward()
                self.optimizer.step()

    @property
    def groups(self):
        return [g for g in self.optimizer.param_groups if g.get("mode") != "zo"]


def fresh_state(job):
    job.optimizer.state = defaultdict(dict)


def copied_state(job):
    old = job.optimizer.state
    job.optimizer.state = defaultdict(dict, {p: copy.deepcopy(s) for p, s in old.items()})
    old.clear()  # nothing may still read it


def cleared_state(job):
    job.optimizer.state.clear()


def copied_groups(job):
    old = job.optimizer.param_groups
    job.optimizer.param_groups = [{**group, "lr": group["lr"] / 2} for group in old]
    old.clear()


def one_group_replaced(job):
    position = len(job.optimizer.param_groups) - 1
    job.optimizer.param_groups[position] = {**job.optimizer.param_groups[position], "lr": 0.01}


def group_removed(job):
    job.optimizer.param_groups.pop()


def group_appended(job):
    late = Parameter(torch.ones(2))
    job.y.append(late)
    job.optimizer.param_groups.append({**job.groups[0], "params": [late]})


def groups_left_and_back(job):
    """All are taken out, a step goes by, and they come again."""
    kept, p = job.groups, Parameter(torch.ones(1))
    others = [g for g in job.optimizer.param_groups if g.get("mode") == "zo"]
    job.optimizer.param_groups = [*others, {**kept[0], "params": [p]}]
    job.step()
    job.optimizer.param_groups = [*others, *kept]


def parameters_replaced(job):
    """As frameworks do that flatten or shard them."""
    new = Parameter(job.y[0].detach().clone())
    job.optimizer.state[new] = job.optimizer.state.pop(job.y[0], {})
    job.y[0] = new
    job.groups[0]["params"] = [new]


def state_set(job):
    job.optimizer.__setstate__({"state": defaultdict(dict)})


def groups_set(job):
    groups = [{**group, "lr": 0.03} for group in job.optimizer.param_groups]
    job.optimizer.__setstate__({"param_groups": groups})


def both_set(job):
    state = {"state": defaultdict(dict), "param_groups": job.optimizer.param_groups}
    job.optimizer.__setstate__(state)
    assert set(state) == {"state", "param_groups"}


def shallow_copy(job):
    job.optimizer = copy.copy(job.optimizer)


def its_dictionary_shared(job):
    """As wrappers do that take over ``__dict__``."""
    other = job.optimizer.__class__.__new__(job.optimizer.__class__)
    other.__dict__ = job.optimizer.__dict__
    job.optimizer = other


IDIOMS = [
    fresh_state, copied_state, cleared_state, copied_groups, one_group_replaced, group_removed,
    group_appended, groups_left_and_back, parameters_replaced, state_set, groups_set, both_set,
    shallow_copy, its_dictionary_shared,
]  # fmt: skip


def numbers(job):
    """State by position, of the groups that are there; parameters are other objects."""
    present = {p for group in job.groups for p in group["params"]}
    order = {p: i for i, p in enumerate(job.y) if p in present}
    return {order[p]: s for p, s in job.optimizer.state.items() if p in order}


def assert_same(ours, theirs):
    for p, q in zip(ours.y, theirs.y, strict=True):
        assert torch.equal(p, q)
    left, right = numbers(ours), numbers(theirs)
    assert left.keys() == right.keys()
    for position, state in right.items():
        assert left[position].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(left[position][name]), torch.as_tensor(value))


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(Adam, {}), (SGD, {"momentum": 0.9}), (Adagrad, {})],
    ids=["Adam", "SGD", "Adagrad"],
)
@pytest.mark.parametrize("replace", IDIOMS)
def test_as_torch_s_own(replace, cls, options, used):
    def run(job):
        job.step(3 * used)
        replace(job)
        job.step(2)

    ours, theirs = Job(cls, True, **options), Job(cls, False, **options)
    try:
        run(theirs)
    except KeyError:  # Adagrad of older torch makes its state in the constructor alone
        pytest.skip(f"torch's own {cls.__name__} does not take this")
    run(ours)
    assert_same(ours, theirs)
    if replace is not group_removed:  # torch's state_dict misses what its state is of
        assert_same_saved(ours.optimizer.state_dict(), ours)


def assert_same_saved(saved, job):
    """What is saved is what is stepped."""
    steps = {s["step"].item() for s in saved["state"].values() if "step" in s}
    assert steps == {s["step"].item() for s in job.optimizer.state.values() if "step" in s}
    assert saved["state"]


def test_options_of_a_group_that_is_replaced_reach_zeroth_order_too():
    job = Job(Adam, True)
    job.step()
    before = job.x.clone()
    zeroth, *others = job.optimizer.param_groups
    job.optimizer.param_groups = [{**zeroth, "lr": 0.5}, *others]
    job.step()
    assert not torch.allclose(job.x, before)
    assert [g["zo_step"] for g in job.optimizer.param_groups if g["mode"] == "zo"] == [2]
