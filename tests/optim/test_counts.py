"""What a trainer counts in attributes of any name is put back, and nothing else is touched."""

from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import torch

from zofo_optim.counts import Counts


def trainer():
    nested = defaultdict(lambda: defaultdict(list))
    nested["train"]["loss"].append(1.0)
    return SimpleNamespace(
        nested=nested,
        tokens=3,
        seen={"steps": torch.tensor(1), "loss": torch.tensor(2.0)},
        recent=deque([1, 2], maxlen=2),
        weights=torch.ones(2),
        train_dataset=[1],
        model=torch.nn.Linear(1, 1),
    )


def test_counts_are_put_back():
    owner = trainer()
    objects = dict(vars(owner))
    steps = owner.seen["steps"]
    counts = Counts(owner)
    owner.nested["train"]["loss"].append(5.0)
    owner.nested["train"]["new"].append(5.0)
    owner.nested["eval"]["loss"].append(5.0)
    owner.tokens += 4
    owner.seen["steps"] += 1
    owner.seen["loss"] = owner.seen["loss"] + 1
    owner.recent.append(3)
    counts.restore()
    assert owner.nested == {"train": {"loss": [1.0]}}
    assert owner.nested["other"]["key"] == []  # it still makes what it lacks
    assert owner.tokens == 3
    assert owner.seen == {"steps": 1, "loss": 2.0}
    assert owner.seen["steps"] is steps
    assert list(owner.recent) == [1, 2]
    assert owner.recent.maxlen == 2
    assert all(vars(owner)[name] is value for name, value in objects.items() if name != "tokens")


def test_replaced_containers_are_put_back():
    owner = trainer()
    nested = owner.nested
    counts = Counts(owner)
    owner.nested = {}
    counts.restore()
    assert owner.nested is nested


def test_what_is_no_count_is_left_alone():
    owner = trainer()
    counts = Counts(owner)
    owner.weights += 1
    owner.train_dataset.append(2)
    owner.model = None
    counts.restore()
    assert owner.weights.tolist() == [2.0, 2.0]
    assert owner.train_dataset == [1, 2]
    assert owner.model is None


def test_counts_of_numpy_and_of_inference_mode_are_put_back():
    owner = trainer()
    owner.total = np.int64(3)
    with torch.inference_mode():
        owner.made_there = torch.tensor(1.0)
    counts = Counts(owner)
    owner.total += 5
    with torch.inference_mode():
        owner.made_there += 1
    counts.restore()
    assert owner.total == 3
    assert owner.made_there == 1


def test_long_lists_lose_what_was_added_and_dictionaries_may_hold_themselves():
    owner = trainer()
    owner.long, owner.own = [0.0] * 20_000, {}
    owner.own["own"] = owner.own
    counts = Counts(owner)
    owner.long.append(1.0)
    counts.restore()
    assert len(owner.long) == 20_000
