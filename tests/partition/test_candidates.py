"""Candidates of a partition, what is none, and what is frozen: it takes no gradient."""

import dataclasses
import warnings

import pytest
import torch
from partitioned import made, mlp, transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.measure import peak_memory
from zofo_optim import HybridZOFO
from zofo_optim.partition import Partition, importance_partition

ZO, FO = dict(lr=1e-4, mu=1e-3), dict(lr=1e-2)
ADAMW = dict(fo_optimizer=torch.optim.AdamW)


def partition_of(model, closure, **options):
    return importance_partition(model, closure, ZO, FO, **{"verbose": False, **options})


def members(groups):
    return {group["mode"]: group["param_names"] for group in groups}


def step(optimizer, closure):
    optimizer.zero_grad()
    optimizer.step(closure)


def test_the_peak_holds_where_tensors_are_excluded():
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model, ids = transformers.LlamaForCausalLM(config), torch.zeros(4, 64, dtype=torch.long)
    closure = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    options = dict(budget="6.5MB", of="memory", exclude="embed", policy="last_layers")
    groups, partition = partition_of(model, closure, **options, **ADAMW)
    optimizer = HybridZOFO(groups, estimator="one_sided", **ADAMW)

    def whole():
        optimizer.step(closure)
        optimizer.zero_grad()

    whole()
    whole()
    measured = peak_memory(whole, model, optimizer, torch.device("cpu"))
    assert measured == pytest.approx(partition.peak, rel=0.03)
    assert partition.peak <= 6.5e6


@pytest.mark.parametrize("options", [dict(exclude="embed"), dict(directions="per_example")])
def test_the_flops_hold_and_no_gradient_is_left_where_tensors_are_frozen(options):
    model, closure = made("opt")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    groups, partition = partition_of(model, closure, budget=0.2, policy="last_layers", **options)
    tensors = dict(model.named_parameters())
    frozen = [row.name for row in partition.rows if row.mode == "frozen"]
    assert frozen
    for name in frozen:
        assert not tensors[name].requires_grad
        assert tensors[name].grad is None
    assert all(tensors[name].requires_grad for name in partition.first_order)
    optimizer = HybridZOFO(groups, estimator="one_sided")
    step(optimizer, closure)
    step(optimizer, closure)
    assert {n for n, p in tensors.items() if p.grad is not None} == set(partition.first_order)
    optimizer.zero_grad()
    with FlopCounterMode(display=False) as counter:
        optimizer.step(closure)
    assert counter.get_total_flops() <= 2 * partition.forward_flops + partition.flops


def test_a_frozen_row_without_a_reason_is_frozen(tmp_path):
    model, closure = mlp()
    partition = partition_of(model, closure)[1]
    rows = [
        dataclasses.replace(row, mode="frozen") if row.name == "0.weight" else row
        for row in partition.rows
    ]
    frozen = dataclasses.replace(partition, rows=tuple(rows))
    groups = frozen.groups(model, ZO, FO, verbose=False)
    assert "0.weight" not in members(groups)["zo"]
    assert not model[0].weight.requires_grad
    frozen.save(tmp_path / "partition.json")
    with pytest.raises(ValueError, match="a frozen row does not say why"):
        Partition.load(tmp_path / "partition.json")


class Experts(nn.Module):
    """One of three layers in the middle."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.low, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.x = torch.randn(5, 6)

    def by(self, k):
        return lambda: self.head(self.experts[k](self.low(self.x).tanh()).tanh()).square().mean()


@pytest.mark.parametrize("policy", ["importance", "last_layers"])
def test_what_the_first_batch_does_not_reach_is_zeroth_order(policy):
    model = Experts()
    with pytest.warns(UserWarning, match=r"4 tensors cannot be first-order.*'experts.1.weight'"):
        groups, partition = partition_of(model, [model.by(0), model.by(1)], policy=policy)
    assert {row.mode for row in partition.rows if row.name.startswith("experts.1")} == {"zo"}
    assert {"experts.1.weight", "experts.2.bias"} < set(members(groups)["zo"])
    before = model.experts[1].weight.detach().clone()
    optimizer = HybridZOFO(groups)
    step(optimizer, model.by(1))
    assert not torch.equal(before, model.experts[1].weight)
    assert model.experts[1].weight.grad is None

    with pytest.warns(UserWarning, match=r"4 tensors cannot"):  # another expert is not reached
        again = partition_of(model, model.by(2), policy=policy)[1]
    again.apply(optimizer)
    assert sum(map(len, members(optimizer.param_groups).values())) == 10


def test_an_adapter_that_the_first_batch_does_not_reach_is_zeroth_order():
    peft = pytest.importorskip("peft")
    model = Experts()
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1", "2"], r=2))
    with pytest.warns(UserWarning, match="4 tensors cannot be first-order"):
        groups, partition = partition_of(tuned, model.by(0), budget=1.0)
    assert len(partition.first_order) == 2
    assert {row.mode for row in partition.rows if "experts.1" in row.name} == {"zo"}
    assert set(partition.zeroth_order) < set(members(groups)["zo"])


def test_candidates_of_a_model_that_trains():
    model, closure = mlp()
    wanted = ["6.weight", "6.bias", "4.weight"]
    groups, partition = partition_of(model, closure, candidates=wanted, budget=0.9)
    assert set(partition.first_order) <= set(wanted)
    others = {row.name for row in partition.rows if not row.candidate}
    assert others == {name for name, _ in model.named_parameters()} - set(wanted)
    assert others <= set(members(groups)["zo"])
    optimizer = HybridZOFO(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(optimizer, closure)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(
        partition.first_order
    )
    again = partition_of(model, closure, budget=0.9)[1]
    assert [(r.name, r.candidate) for r in again.rows] == [
        (r.name, r.candidate) for r in partition.rows
    ]

    other, _ = mlp()  # which trains all
    assert members(partition.groups(other, ZO, FO, verbose=False)) == members(groups)
    other.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"trains 'more.weight', 'more.bias' beside"):
        partition.groups(other, ZO, FO, verbose=False)


def test_adapters_that_are_no_candidates_are_zeroth_order():
    model, closure = made("lora_llama")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    groups, partition = partition_of(model, closure, candidates=names[:2], budget=1.0)
    assert sorted(partition.first_order) == sorted(names[:2])
    assert set(names[2:]) <= set(members(groups)["zo"])


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.linear = nn.Linear(4, 4)

    def closure(self):
        return (self.linear(torch.ones(3, 4)) * self.phase).abs().square().mean()


def test_a_complex_parameter_is_refused_before_anything_runs():
    model = Complex()

    def never():
        raise AssertionError("the closure ran")

    with pytest.raises(ValueError, match=r"cannot be perturbed.*exclude=; 'phase' is one"):
        partition_of(model, never)
    groups, partition = partition_of(model, model.closure, exclude="phase", budget=1.0)
    assert [row.name for row in partition.rows if row.why == "excluded"] == ["phase"]
    assert members(groups) == {"fo": ["linear.weight", "linear.bias"]}
    assert not model.phase.requires_grad


@pytest.mark.parametrize("exclude", [(), "embed"])
def test_a_second_partition_has_the_candidates_of_the_first(exclude):
    model, closure = made("llama")
    model.requires_grad_(False)
    first = partition_of(model, closure, exclude=exclude, budget=0.3)[1]
    again = partition_of(model, closure, exclude=exclude, budget=0.3)[1]
    assert again == first
    optimizer = HybridZOFO(first.groups(model, ZO, FO, verbose=False))
    larger = partition_of(model, closure, budget=0.8)[1]
    larger.apply(optimizer, model)
    first.apply(optimizer, model)
    whole = partition_of(model, closure, budget=1.0)[1]
    assert len(whole.first_order) == len(list(model.parameters()))


def test_requires_grad_that_was_set_since_decides():
    model, closure = mlp()
    partition_of(model, closure, candidates=["6.weight", "4.weight"])
    model.requires_grad_(False)
    model[0].requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition = partition_of(model, closure, budget=1.0)[1]
    assert {row.name for row in partition.rows} == {"0.weight", "0.bias"}
