"""When copies of visiting weights are made, waited for, and dropped."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import same_bits
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from offloaded import ON_LINUX, any_folder, assert_same, closure_of, trained
from tiny_llama import TOKENS, base_model, lora
from visited import pretended, visiting

from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups
from zofo_optim.offload import copies, device_visits
from zofo_optim.offload.in_turn import is_offloaded

pytestmark = ON_LINUX
__all__ = ["any_folder", "pretended"]  # fixtures


class Stream:
    """Does what is asked of it when someone waits for it, and not before."""

    def __init__(self, device=None):
        self.work, self.done = [], 0

    def record_event(self):
        return self, len(self.work)

    def wait_event(self, event):
        other, end = event
        assert other is not self
        while other.done < end:
            other.work[other.done]()
            other.done += 1

    def wait_stream(self, other):
        assert other is not self

    def synchronize(self):
        Stream().wait_event(self.record_event())


class Streams:
    """As torch.cuda, with one stream for what is computed and those that are made."""

    Stream = Stream

    def __init__(self):
        self.computes, self.now = Stream(), None

    def current_stream(self, device):
        return self.computes

    @contextmanager
    def stream(self, stream):
        self.now = stream
        yield
        self.now = None


def test_copies_are_waited_for(monkeypatch):
    """With copies that are late, results are the same, and the next block's are under way."""
    streams, copying, under_way = Streams(), copies._copy, []

    def late(made):
        for copied in made:
            copied.tensor.fill_(torch.nan)
        streams.now.work.append(lambda: copying(made))

    monkeypatch.setattr(copies, "_copy", late)
    monkeypatch.setattr(copies, "_streams_of", lambda device: streams)
    expected, model = lora(), visiting(lora())
    (visits,) = {device_visits.visits_of(p) for p in model.parameters() if p.dim() > 1} - {None}
    layers = model.get_base_model().model.layers
    layers[0].mlp.act_fn.register_forward_pre_hook(
        lambda *_: under_way.append(len(visits._copier._stream.work) - visits._copier._stream.done)
    )
    trained(expected)
    trained(model)
    assert_same(model, expected)
    assert len(visits._copier._stream.work) == visits._copier._stream.done
    assert under_way[0] == 0
    assert set(under_way[1:]) == {1}


def visits(monkeypatch):
    """The number of copies that are made."""
    count, copying = [0], copies._copy

    def copied(made):
        count[0] += len(made)
        copying(made)

    monkeypatch.setattr(copies, "_copy", copied)
    return count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), 2),
        (dict(structure="low_rank"), 2),
        (dict(structure="low_rank", directions="per_example", estimator="one_sided"), 2),
        (dict(structure="low_rank", directions="per_example", estimator="antithetic"), 1),
    ],
)
def test_a_step_copies_each_weight_once_a_forward_pass(options, expected, monkeypatch):
    """Both sides of a direction for each example share a visit."""
    model, count = visiting(base_model().requires_grad_(False)), visits(monkeypatch)
    per_example = options.get("directions") == "per_example"
    groups = hybrid_param_groups(
        model, zo=dict(lr=1e-3), verbose=False, directions=options.get("directions", "shared")
    )
    optimizer = HybridZOFO(groups, perturbation="streamed", **options)
    tokens = TOKENS.repeat_interleave(2, 0)
    batch = {"input_ids": tokens, "labels": tokens}

    def closure():
        return example_losses_of(model, batch) if per_example else model(**batch).loss

    optimizer.step(closure)
    count[0] = 0
    optimizer.step(closure)
    assert count[0] == expected * sum(p.dim() > 1 for p in model.parameters())


def test_one_block_is_on_its_way_at_a_time():
    """Where the order changes from pass to pass, as of experts."""
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(16)).requires_grad_(False)
    model = nn.ModuleDict({"experts": experts})
    visiting(model)
    (visits,) = {device_visits.visits_of(expert.weight) for expert in experts}
    x = torch.ones(1, 4)

    def forward(order):
        for number in order:
            experts[number](x)
            assert all(is_offloaded(expert.weight) for expert in experts)

    model.forward = forward
    for _ in range(4):
        model(torch.randperm(16).tolist())
    assert visits._coming is None


def test_a_copy_on_its_way_of_what_is_written_since_is_made_again():
    torch.manual_seed(0)
    model = visiting(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False))
    x = torch.ones(1, 4)
    model(x)

    def write(module, args, output):
        model[1].weight.fill_(3.0)

    model[0].register_forward_hook(write)
    expected = nn.functional.linear(model[0](x), torch.full((4, 4), 3.0), model[1].bias)
    assert same_bits(model(x), expected)


def test_a_module_with_a_matrix_of_its_own_does_not_bring_its_parts():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.Parameter(torch.ones(2, 4, 4))
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            assert is_offloaded(self.layers[1].weight)
            assert not is_offloaded(self.places)
            return self.layers(x + self.places)

    visiting(Vision().requires_grad_(False))(torch.ones(2, 4, 4))


def test_gradients_after_an_update_are_refused():
    """As torch refuses them of a model in memory."""
    model = visiting(lora())
    optimizer = trained(model, steps=1)
    loss = closure_of(model)()
    optimizer.step(closure_of(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_func_keeps_the_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).requires_grad_(False)
    expected, x = copy.deepcopy(model), torch.linspace(-1, 1, 4)
    visiting(model)
    ours, theirs = (torch.func.grad(lambda x: one(x).sum())(x) for one in (model, expected))  # noqa: B023
    assert same_bits(ours, theirs)
    ours, theirs = (torch.func.jvp(one, (x,), (x,)) for one in (model, expected))
    assert all(map(same_bits, ours, theirs))
