"""Offloaded weights train as those in memory do, to the bit."""

import copy
import mmap
import os
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from torch import nn

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from offloaded import (  # noqa: E402, F401
    ON_LINUX,
    OPTIONS,
    any_folder,
    assert_offloaded,
    assert_same,
    closure_of,
    trained,
    trained_by_trainer,
)
from tiny_llama import base_model, lora  # noqa: E402

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    Journal,
    hybrid_param_groups,
    load_base_weights,
    replay,
    save_base_weights,
)
from zofo_optim.offload import in_turn, maps, offload_weights, offloading  # noqa: E402

pytestmark = ON_LINUX

CASES = [("LoRA", name) for name in OPTIONS]
CASES += [("base", name) for name in OPTIONS if name != "coupled"]  # with first-order groups
MADE = {"base": lambda: base_model().requires_grad_(False), "LoRA": lora}


# ---- the same results ---------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "options"), CASES)
def test_a_model_in_memory(made, options, tmp_path, monkeypatch):
    monkeypatch.setattr(in_turn, "_PIECE", 1 << 10)  # updates cut every weight
    expected, model = MADE[made](), MADE[made]()
    offload = offload_weights(model, folder=tmp_path)
    assert_offloaded(model)
    assert offload.count == sum(not p.requires_grad for p in model.parameters())
    trained(expected, **OPTIONS[options])
    trained(model, **OPTIONS[options])
    assert_same(model, expected)


def test_sixteen_bits(tmp_path, monkeypatch):
    """Rounding bits too belong to elements, not to parts."""
    monkeypatch.setattr(in_turn, "_PIECE", 1 << 10)
    expected, model = (base_model().requires_grad_(False).bfloat16() for _ in range(2))
    offload_weights(model, folder=tmp_path)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_the_trainer_and_checkpointed_layers(tmp_path):
    trained_by_trainer(lambda model: offload_weights(model, folder=tmp_path), tmp_path, True)


def test_a_module_whose_weight_another_one_reads(tmp_path):
    """Attention computes with its output layer's weight, and never calls that layer."""

    def made():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).requires_grad_(False)

    expected, model = made(), made()
    offload_weights(model, folder=tmp_path)
    x = torch.linspace(-1, 1, 48).view(3, 2, 8)
    for one in (expected, model):
        groups = hybrid_param_groups(one, zo=dict(lr=1e-3), verbose=False)
        optimizer = HybridZOFO(groups, perturbation="streamed")
        for _ in range(2):
            optimizer.step(lambda: one(x).square().mean())  # noqa: B023
    assert_same(model, expected)


class Strided(nn.Module):
    """Weights of other memory orders than their shapes'."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.point = nn.Conv2d(4, 5, 1).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(5, 6)
        self.linear.weight.data = self.linear.weight.data.t().contiguous().t()

    def forward(self, x):
        return self.linear(self.point(torch.tanh(self.convolution(x))).mean((2, 3)))


@pytest.mark.parametrize("structure", ["full", "low_rank"])
def test_strides_stay(structure, tmp_path, monkeypatch):
    monkeypatch.setattr(in_turn, "_PIECE", 1 << 5)
    monkeypatch.setattr(offloading, "_PIECE", 1 << 5)
    torch.manual_seed(0)
    expected = Strided().requires_grad_(False)
    model = copy.deepcopy(expected)
    offload_weights(model, folder=tmp_path)
    assert_offloaded(model)
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in expected.parameters()]
    assert_same(model, expected)
    x = torch.linspace(-1, 1, 150).view(2, 3, 5, 5)
    for one in (expected, model):
        groups = hybrid_param_groups(one, zo=dict(lr=1e-2), verbose=False)
        optimizer = HybridZOFO(groups, perturbation="streamed", structure=structure)
        for _ in range(2):
            optimizer.step(lambda: one(x).square().mean())  # noqa: B023
    assert_same(model, expected)


def test_a_copy_is_in_memory(tmp_path):
    model = base_model().requires_grad_(False)
    offload_weights(model, folder=tmp_path)
    other = copy.deepcopy(model)
    assert not any(map(in_turn.is_offloaded, other.parameters()))
    trained(other)
    assert_same(model, base_model())


def test_optimizers_that_have_the_parameters_keep_them(tmp_path):
    model = base_model().requires_grad_(False)
    before = [id(p) for p in model.parameters()]
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    offload_weights(model, folder=tmp_path)
    assert [id(p) for p in model.parameters()] == before
    assert all(map(in_turn.is_offloaded, groups[0]["params"]))


# ---- saving, journal, errors --------------------------------------------------------------------


def test_journal_and_saving(tmp_path):
    model = lora()
    start = copy.deepcopy(model)
    offload_weights(model, folder=tmp_path)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3, mu=1e-3), fo=dict(lr=1e-2), verbose=False)
    optimizer = HybridZOFO(groups, perturbation="streamed")
    journal = Journal(tmp_path / "run.zofo").attach(optimizer)
    for _ in range(3):
        optimizer.step(closure_of(model))
    journal.close()
    save_base_weights(optimizer, model, tmp_path / "tuned")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for load in (load_base_weights, lambda other, _: replay(other, tmp_path / "run.zofo")):
        other = copy.deepcopy(start)
        load(other, tmp_path / "tuned")
        theirs = dict(other.named_parameters())
        for name, p in model.named_parameters():
            assert name not in frozen or same_bits(p, theirs[name]), name

    again = copy.deepcopy(start)  # a journal replays into offloaded weights too
    offload_weights(again, folder=tmp_path)
    replay(again, tmp_path / "run.zofo")
    for name, p in again.named_parameters():
        assert name not in frozen or same_bits(p, dict(model.named_parameters())[name]), name


def test_save_pretrained(tmp_path):
    model = accelerate.cpu_offload(base_model().requires_grad_(False), execution_device="cpu")
    offload_weights(model, folder=tmp_path)
    trained(model)
    model.save_pretrained(tmp_path / "tuned")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", range(1, 6))
def test_a_closure_that_raises(error, call, tmp_path):
    """Also within the first step's verification, which writes to weights."""
    model = base_model().requires_grad_(False)
    offload_weights(model, folder=tmp_path)
    optimizer = trained(model, steps=0)
    calls = iter(range(1, 100))

    def closure():
        loss = closure_of(model)()
        if next(calls) == call:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert_same(model, base_model())


# ---- the private file ---------------------------------------------------------------------------


def mapped():
    """Bytes of this process's maps of files without a name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith("(deleted)")]
    return sum(int(high, 16) - int(low, 16) for low, high in ends)


def test_the_file_has_no_name_and_goes_with_the_model(tmp_path):
    before = mapped()
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, folder=tmp_path)
    assert os.listdir(tmp_path) == []
    assert mapped() >= before + offload.nbytes
    del offload, model
    assert mapped() == before


def test_pages_that_are_dropped_are_not_lost(tmp_path):
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, folder=tmp_path)
    weight = model.lm_head.weight
    weight.add_(1)
    offload.drop()
    assert same_bits(weight, base_model().lm_head.weight + 1)


def test_hooks_can_be_removed(tmp_path):
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, folder=tmp_path)
    assert any(module._forward_hooks for module in model.modules())
    offload.remove()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    expected = base_model().requires_grad_(False)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_merged_pages(tmp_path):
    one = maps.new_map(tmp_path, 10 * mmap.PAGESIZE)
    size = mmap.PAGESIZE
    some = [maps.Pages(one, 4 * size, 5 * size), maps.Pages(one, 0, size)]
    some += [maps.Pages(one, size, 3 * size), maps.Pages(one, 2 * size, 3 * size)]
    found = maps.merged(some)
    assert [(p.start // size, p.stop // size) for p in found] == [(0, 3), (4, 5)]
    last = one.tensor(10 * size - 4, [1], torch.float32)
    assert maps.pages_of(last) == maps.Pages(one, 9 * size, 10 * size)
    assert maps.pages_of(torch.ones(3)) is None
