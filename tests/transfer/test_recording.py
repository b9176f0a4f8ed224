"""What is recorded of a model while it reads: rows that passed, and no more than that."""

import weakref

import families
import torch
from torch import nn

from zofo_optim.transfer.activations import Tap, positions
from zofo_optim.transfer.activations_cache import KEYS, record_cache
from zofo_optim.transfer.layers import stack_of
from zofo_optim.transfer.projections import Rows
from zofo_optim.transfer.recording import joined, record

TEXTS = families.texts(count=6)


class Toy(nn.Module):
    """Embeds tokens; three layers read that, and what the first gave is changed in place."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(families.VOCABULARY, 4)
        self.a, self.b, self.c, self.pooled = (nn.Linear(4, 4, bias=False) for _ in range(4))
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        self.before, self.forwards = None, 0

    def forward(self, input_ids, attention_mask=None):
        self.forwards += 1
        hidden = self.embed(input_ids)
        first = self.a(hidden)
        self.before = first.detach().clone()
        first.mul_(0)
        self.b(hidden)
        hidden.add_(1)
        return self.c(hidden), self.pooled(hidden[:, 0])


def rows_of(places, tensors):
    parts = []
    for held in (False, True):
        which = [place.tokens & (place.held == held)[:, None] for place in places]
        parts.append(torch.cat([t[w] for t, w in zip(tensors, which, strict=True)]))
    return parts


def test_outputs_that_are_changed_in_place():
    """Rows are those that passed."""
    model, places = Toy(), positions(TEXTS, 50, 0)
    found = record(model, [Tap("a", "output")], TEXTS, places)[Tap("a", "output")]
    passed = []
    for batch in TEXTS:
        model(**batch)
        passed.append(model.before)
    assert all(torch.equal(*both) for both in zip(found, rows_of(places, passed), strict=True))
    assert found.fitted.abs().sum() > 0
    assert len(found.fitted) + len(found.held) == 50


class Watched(Toy):
    """Notes whether what its layers read is still there when a pass ends."""

    def __init__(self):
        super().__init__()
        self.left = []
        self.a.register_forward_pre_hook(self.watch)

    def watch(self, _, args):
        self.hidden = weakref.ref(args[0].untyped_storage())

    def forward(self, **batch):
        super().forward(**batch)
        self.left.append(self.hidden() is not None)


def test_activations_are_not_kept_until_the_pass_ends():
    """Large models have hundreds: rows are taken at once."""
    model = Watched()
    record(model, [Tap("a", "input")], TEXTS, positions(TEXTS, 50, 0))
    assert model.left == [False] * len(TEXTS)


def test_taps_of_one_tensor_share_its_rows():
    """Unless it was changed in between."""
    taps = [Tap(name, "input") for name in "abc"]
    found = record(Toy(), taps, TEXTS, positions(TEXTS, 50, 0))
    assert found[taps[0]] is found[taps[1]]
    torch.testing.assert_close(found[taps[2]].fitted, found[taps[0]].fitted + 1)


def test_query_key_and_value_share_their_rows():
    model, places = families.llama(), positions(TEXTS, 50, 0)
    taps = [Tap(f"model.layers.1.self_attn.{name}_proj", "input") for name in "qkvo"]
    found = record(model, taps, TEXTS, places)
    assert found[taps[0]] is found[taps[1]] is found[taps[2]]
    assert not torch.equal(found[taps[0]].fitted, found[taps[3]].fitted)


def test_parts_are_joined_one_by_one(monkeypatch):
    """What was joined is given up before the next is."""
    parts = {Tap(name, "input"): [(torch.ones(2, 3), torch.ones(1, 3))] * 2 for name in "ab"}
    parts[Tap("b", "input")] = [(torch.zeros(2, 3), torch.ones(1, 3)) for _ in range(2)]
    first, alive, true = weakref.ref(parts[Tap("a", "input")][0][0]), [], torch.cat

    def cat(tensors):
        alive.append((first() is not None, len(parts)))
        return true(tensors)

    monkeypatch.setattr(torch, "cat", cat)
    found = joined(parts)
    assert alive == [(True, 1), (True, 1), (False, 0), (False, 0)]
    assert isinstance(found[Tap("b", "input")], Rows)
    assert found[Tap("a", "input")].fitted.tolist() == [[1.0] * 3] * 4


def test_batches_of_which_nothing_is_taken_are_not_run():
    """Unless a module has one row a text: all texts have one."""
    model, places = Toy(), positions(TEXTS, 2, 0)
    some = sum(bool(place.tokens.any()) for place in places)
    assert some <= 2
    record(model, [Tap("a", "input")], TEXTS, places)
    assert model.forwards == some
    model.forwards = 0
    found = record(model, [Tap("pooled", "output")], TEXTS, places)[Tap("pooled", "output")]
    assert model.forwards == len(TEXTS)
    assert (len(found.fitted), len(found.held)) == (18, 6)


def test_nor_for_a_cache():
    model, places = families.llama(), positions(TEXTS, 2, 0)
    runs = []
    model.model.register_forward_pre_hook(lambda *_: runs.append(1))
    tap = Tap(stack_of(model).layer(1), KEYS)
    found = record_cache(model, [tap], TEXTS, places)[tap]
    assert len(runs) == sum(bool(place.tokens.any()) for place in places)
    assert len(found.fitted) + len(found.held) == 2
