"""Options that are numpy's scalars become Python's numbers; strings and None are refused."""

import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from toys import MODES, Toy

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups
from zofo_optim.plain import plain

GIVEN = dict(
    lr=np.float32(0.25),
    momentum=np.float64(0.5),
    dampening=np.float16(0.0),
    weight_decay=np.float32(0.125),
    nesterov=np.bool_(True),
    maximize=np.bool_(False),
    mu=np.float32(0.5),
    estimator=np.str_("one_sided"),
    num_samples=np.int64(2),
    seed=np.uint64(7),
    restore_buffers=np.bool_(True),
    capturable=np.bool_(False),
)


def assert_plain(held):
    """No scalar of numpy anywhere: torch.load takes only what Python itself has."""
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_every_option(tmp_path):
    """The same bits as with Python's numbers, and plain numbers in all that is saved."""
    toys = Toy(), Toy()
    options = GIVEN, {name: value.item() for name, value in GIVEN.items()}
    ours, theirs = (t.optimizer("hybrid", **o) for t, o in zip(toys, options, strict=True))
    assert_plain(ours.state_dict())
    assert vars(ours.settings) == vars(theirs.settings)
    assert type(ours.settings.num_samples) is int
    with Journal(tmp_path / "a.zofo", fsync_every=np.int64(1)).attach(ours):
        ours.step(toys[0])
    theirs.step(toys[1])
    assert all(torch.equal(a, b) for a, b in zip(toys[0].values(), toys[1].values(), strict=True))
    assert b"numpy" not in pickle.dumps(ours)


def test_options_of_groups_and_of_fo_optimizer():
    x, y = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = HybridZOFO(
        [
            dict(params=[x], mode="zo", lr=np.float32(0.5), mu=np.float32(0.5), seed=np.int32(3)),
            dict(params=[y], lr=np.array(0.5), betas=(np.float64(0.5), np.float32(0.5))),
        ],
        fo_optimizer=torch.optim.AdamW,
        eps=np.float32(0.5),
    )
    assert_plain(optimizer.state_dict())
    assert type(optimizer.param_groups[0]["seed"]) is int
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.5)


def test_hybrid_param_groups_hold_plain_numbers():
    groups = hybrid_param_groups(
        torch.nn.Linear(2, 2).requires_grad_(False), zo=dict(lr=np.float32(0.5)), verbose=False
    )
    assert type(groups[0]["lr"]) is float


def test_a_schedule_that_computes_by_numpy():
    toy = Toy()
    optimizer = toy.optimizer("hybrid")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float32(1 / (1 + step)))
    for _ in range(2):
        optimizer.step(toy)
        schedule.step()
    optimizer.param_groups[0]["mu"] = np.float32(0.5)
    assert_plain(optimizer.state_dict())
    optimizer.step(toy)


def test_containers_that_are_plain_stay_the_same_object():
    held = {"a": (1, [2.0, "x"]), "b": torch.ones(2)}
    assert plain(held) is held


SHARED = [{"lr": "1e-3"}, {"lr": None}, {"weight_decay": "0.1"}, {"weight_decay": None}]
WRONG = [
    *((where, "zo", wrong) for where in ("optimizer", "group", "later") for wrong in SHARED),
    *((where, "fo", wrong) for where in ("optimizer", "group") for wrong in SHARED),
    *((where, mode, {"maximize": "no"}) for where in ("optimizer", "group") for mode in MODES[:2]),
    ("later", "zo", {"maximize": "no"}),
    ("optimizer", "fo", {"momentum": "0.9"}),
    ("group", "fo", {"momentum": "0.9"}),
    ("optimizer", "zo", {"capturable": "no"}),
]


@pytest.mark.parametrize(("where", "mode", "wrong"), WRONG, ids=repr)
def test_strings_and_none_are_refused_by_name(where, mode, wrong):
    ((name, value),) = wrong.items()
    parameter = Parameter(torch.ones(2))
    options = {"mode": mode, "lr": 1e-3}

    def give():
        if where == "optimizer":
            HybridZOFO([parameter], **{**options, **wrong})
        elif where == "group":
            HybridZOFO([{"params": [parameter], **wrong}], **options)
        else:
            optimizer = HybridZOFO([parameter], **options)
            optimizer.param_groups[0].update(wrong)
            optimizer.step(lambda: parameter.sum())

    with pytest.raises((TypeError, ValueError), match=rf"{name} (must|value).*{value!r}"):
        give()
    assert torch.equal(parameter, torch.ones(2))


def test_none_where_the_class_takes_it():
    """As torch's own optimizers do for ``foreach``, and Adafactor for ``eps``."""
    weight = Parameter(torch.ones(2))
    HybridZOFO([{"params": [weight], "foreach": None}], lr=0.1)
    HybridZOFO([weight], lr=0.1, foreach=None)
    HybridZOFO([weight], lr=0.1, fo_optimizer=torch.optim.Adafactor, eps=(None, 1e-3))


def test_patterns_must_be_strings():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(TypeError, match=r"include must be a string .*, got None"):
        hybrid_param_groups(model, include=None)
    with pytest.raises(TypeError, match=r"exclude must be a string .*, got \[1\]"):
        hybrid_param_groups(model, exclude=[1])


def test_weights_on_meta_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta")).requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter '0\.weight' must hold data.*meta device"):
        hybrid_param_groups(model, verbose=False)
