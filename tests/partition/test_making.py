"""Partitions of several models: the budget holds, the groups train, nothing else changes."""

import itertools

import pytest
import torch
from partitioned import KINDS, made, mlp, transformers
from torch import nn

from experiments.measure import peak_memory
from zofo_optim import HybridZOFO
from zofo_optim.costs import costs_of
from zofo_optim.partition import Partition, importance_partition, make_partition

ZO, FO = dict(lr=1e-4, mu=1e-3), dict(lr=1e-2)


def partition_of(model, closure, zo=ZO, fo=FO, **options):
    return importance_partition(model, closure, zo, fo, **{"verbose": False, **options})


def names(groups, mode):
    return [n for g in groups if g["mode"] == mode for n in g["param_names"]]


@pytest.mark.parametrize(
    ("kind", "budget", "of"),
    [(kind, 0.6, "flops") for kind in KINDS]
    + [(kind, "60%", "memory") for kind in ("bert", "lora_llama")],
)
def test_models(kind, budget, of):
    model, closure = made(kind)
    required = [p.requires_grad for p in model.parameters()]
    contents = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    groups, partition = partition_of(
        model, closure, budget=budget, of=of, fo_optimizer=torch.optim.AdamW
    )
    assert torch.equal(drawn, torch.rand(1))
    assert required == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, contents, model.parameters()))

    costs = costs_of(model, closure, fo_optimizer=torch.optim.AdamW)
    every = [t.name for t in costs.tensors]
    assert [row.name for row in partition.rows if row.why != "unused"] == every
    assert set(names(groups, "fo")) == set(partition.first_order) > set()
    assert set(names(groups, "zo")) >= set(partition.zeroth_order)
    spent = costs.flops if of == "flops" else costs.bytes
    share = spent(partition.first_order) / spent(every)
    assert 0 < share <= 0.6
    assert partition.flops == costs.flops(partition.first_order)
    assert partition.bytes == costs.bytes(partition.first_order)
    assert partition.full_flops == costs.flops(every)
    assert partition.full_bytes == costs.bytes(every)
    shares = sum(row.flops for row in partition.rows), sum(row.bytes for row in partition.rows)
    whole = partition.full_flops, partition.full_bytes
    assert shares == (pytest.approx(whole, rel=0.1) if kind == "t5" else whole)  # see Costs
    left = [n for n in every if n not in partition.first_order]
    values = {row.name: row.importance for row in partition.rows}
    for name in left:  # nothing more fits
        assert values[name] < 0 or spent([*partition.first_order, name]) > share * spent(every)

    optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW, estimator="one_sided")
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    named = zip(model.named_parameters(), contents, strict=True)
    moved = {name for (name, p), before in named if not torch.equal(p, before)}
    assert moved >= set(partition.first_order) - set(dead_at_start(model))
    again = partition_of(*made(kind), budget=budget, of=of, fo_optimizer=torch.optim.AdamW)[1]
    assert again == partition


def dead_at_start(model):
    """lora_A has no gradient while lora_B is 0."""
    return [n for n, _ in model.named_parameters() if "lora_A" in n]


def test_the_dynamic_programme_beats_every_other_policy_by_importance():
    model, closure = made("llama")
    found = {}
    for policy in ("importance", "top_k", "last_layers", "random", "gradient_norm"):
        partition = partition_of(model, closure, budget=0.4, policy=policy)[1]
        assert partition.policy == policy
        values = {row.name: row.importance for row in partition.rows}
        if policy in ("last_layers", "random"):
            assert set(values.values()) == {None}
        found[policy] = set(partition.first_order)
    values = {row.name: row.importance for row in partition_of(model, closure, budget=0.4)[1].rows}
    totals = {policy: sum(values[n] for n in names) for policy, names in found.items()}
    assert max(totals, key=totals.get) == "importance"
    assert found["importance"] not in (found["last_layers"], found["random"])


@pytest.mark.parametrize("policy", ["importance", "top_k", "gradient_norm", "random"])
def test_the_whole_budget_is_first_order_training(policy):
    """Also of LoRA's A, which has no gradient while B is 0."""
    partition = partition_of(*made("lora_llama"), budget=1.0, policy=policy)[1]
    assert len(partition.first_order) == len(partition.rows) == 8
    assert partition.flops == partition.full_flops


def test_a_small_model_is_solved_exactly():
    """Against all sets, whose costs are exact; the programme knows upper bounds of them."""
    model, closure = mlp()
    partition = partition_of(model, closure, budget=0.6)[1]
    costs = costs_of(model, closure)
    values = {row.name: row.importance for row in partition.rows}
    every = list(values)
    limit = 0.6 * costs.flops(every)
    sets = itertools.chain.from_iterable(
        itertools.combinations(every, n) for n in range(len(every) + 1)
    )
    best = max(sum(values[n] for n in s) for s in sets if costs.flops_bound(s) <= limit)
    assert sum(values[n] for n in partition.first_order) >= best - 1e-12


def test_memory_in_bytes_is_the_peak_of_a_step():
    model, closure = made("llama")
    costs = costs_of(model, closure)
    every = [t.name for t in costs.tensors]
    most = costs.peak(every, evaluations=True)
    least = costs.peak(every[:1], evaluations=True)
    for budget in (most, (most + least) // 2):
        partition = partition_of(model, closure, budget=budget, of="memory")[1]
        assert partition.peak == costs.peak(partition.first_order, evaluations=True) <= budget
        assert (set(partition.first_order) == set(every)) is (budget == most)
    with pytest.raises(ValueError, match="the weights and one tensor at least, got '1kB'") as error:
        partition_of(model, closure, budget="1kB", of="memory")
    stated = int(str(error.value).split(" bytes)")[0].rpartition("(")[2])
    assert partition_of(model, closure, budget=stated, of="memory")[1].peak <= stated


@pytest.mark.parametrize(
    "further", [{}, dict(optimizer_in_backward=True), dict(coupling=0.1)], ids=str
)
def test_a_step_takes_what_the_budget_says(further):
    """Measured in torch's allocator, with everything that HybridZOFO does in a step."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model, ids = transformers.LlamaForCausalLM(config), torch.zeros(4, 64, dtype=torch.long)
    closure = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    options = dict(fo_optimizer=torch.optim.AdamW, **further)
    groups, partition = partition_of(model, closure, budget="9MB", of="memory", **options)
    nonfinite = "raise" if "optimizer_in_backward" in further else "skip"
    optimizer = HybridZOFO(groups, estimator="one_sided", nonfinite=nonfinite, **options)

    def step():
        optimizer.step(closure)
        optimizer.zero_grad()

    step()
    step()
    measured = peak_memory(step, model, optimizer, torch.device("cpu"))
    assert partition.peak <= 9e6
    assert measured == pytest.approx(partition.peak, rel=0.03)


def test_gradients_that_are_freed_as_they_come_leave_more_room():
    model, closure = made("llama")
    options = dict(budget=0.3, of="memory", policy="last_layers")
    costs = costs_of(model, closure)
    every = [t.name for t in costs.tensors]
    kept = partition_of(model, closure, **options)[1]
    freed = partition_of(model, closure, **options, optimizer_in_backward=True)[1]
    assert freed.in_backward
    assert freed.full_bytes == costs.bytes(every, in_backward=True) < kept.full_bytes
    assert freed.bytes <= 0.3 * freed.full_bytes
    by_importance = partition_of(model, closure, **{**options, "policy": "importance"})[1]
    assert by_importance.bytes <= 0.3 * by_importance.full_bytes


def test_several_batches_are_averaged():
    model, closure = made("bert")
    other = lambda: 3 * closure()  # noqa: E731
    one = partition_of(model, [closure])[1]
    two = partition_of(model, [closure, other])[1]
    assert one.rows[0].gradient_norm * 5**0.5 == pytest.approx(two.rows[0].gradient_norm)


def test_adapters_from_the_loss_down():
    model, closure = made("lora_llama")
    whole = partition_of(model, closure, budget=1.0, policy="adapters")[1]
    assert all("lora_" in name for name in whole.first_order)
    assert len(whole.first_order) == 8
    groups, half = partition_of(model, closure, budget=0.7, policy="adapters")
    assert {name.split("layers.")[1][0] for name in half.first_order} == {"1"}
    assert {name.split("layers.")[1][0] for name in half.zeroth_order} == {"0"}
    assert set(half.zeroth_order) < set(names(groups, "zo"))
    with pytest.raises(ValueError, match="'adapters' where no candidate is an adapter's"):
        partition_of(*made("llama"), policy="adapters")


def test_frozen_models_are_partitioned_as_a_whole():
    model, closure = made("llama")
    trainable = partition_of(model, closure)[1]
    model.requires_grad_(False)
    groups, partition = partition_of(model, closure)
    assert partition == trainable
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names(groups, "fo"))
    rows = [row.name for row in partition.rows]
    assert partition_of(model, closure, candidates=rows)[1] == partition


def test_include_exclude_and_examples():
    model, closure = made("opt")
    groups, partition = partition_of(model, closure, exclude=["embed", "fc1.weight"], budget=0.5)
    kept = {row.name: row for row in partition.rows if row.mode == "frozen"}
    assert {row.why for row in kept.values()} == {"excluded"}
    assert all("embed" in name or "fc1.weight" in name for name in kept)
    assert not kept.keys() & set(names(groups, "fo") + names(groups, "zo"))

    groups, partition = partition_of(model, closure, include="fc2", budget=0.5)
    assert all("fc2" in name for name in names(groups, "zo"))
    assert partition.first_order == partition_of(model, closure, budget=0.5)[1].first_order

    groups, partition = partition_of(model, closure, directions="per_example", budget=0.1)
    whys = {row.name: row.why for row in partition.rows if row.mode == "frozen"}
    assert "model.decoder.embed_positions.weight" in whys
    assert set(whys.values()) == {"no direction for each example"}
    with pytest.raises(ValueError, match="got 'nowhere', which matches none"):
        partition_of(model, closure, exclude="nowhere")


def test_tensors_that_the_loss_does_not_depend_on():
    model, _ = mlp()
    model.spare = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"2 tensors cannot be first-order.*'spare.weight'"):
        groups, partition = partition_of(model, lambda: closure_of(model))
    spare = {"spare.weight", "spare.bias"}
    assert {row.name: row.mode for row in partition.rows[-2:]} == dict.fromkeys(spare, "zo")
    assert spare <= set(names(groups, "zo"))


def closure_of(model):
    x = torch.ones(3, 6)
    for layer in list(model)[:8]:
        x = layer(x)
    return x.square().mean()


def test_meta_models_are_partitioned_without_data():
    with torch.device("meta"):
        model, batch = KINDS["llama"]()
        batch = {name: value.to("meta") for name, value in batch.items() if "mask" not in name}
    closure = lambda: model(**batch).loss  # noqa: E731
    options = dict(budget=0.3, fo=FO, verbose=False)
    with pytest.raises(ValueError, match=r"takes no gradients.*got 'importance'"):
        make_partition(model, closure, **options)
    partition = make_partition(model, closure, policy="last_layers", **options)
    real = partition_of(*made("llama"), policy="last_layers", budget=0.3)[1]
    assert partition == real
    with pytest.raises(ValueError, match="meta device"):
        partition.groups(model, ZO, FO)


def test_the_summary_is_printed_when_wanted(capsys):
    model, closure = mlp()
    partition = partition_of(model, closure, verbose=True)[1]
    printed = capsys.readouterr().out
    assert printed.startswith(partition.summary() + "\npartition: zeroth-order: ")
    partition_of(model, closure)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(budget=2.0), ValueError, "budget must be a share"),
        (dict(of="time"), ValueError, "of must be one of"),
        (dict(coupling=-1), ValueError, "coupling must be a finite number >= 0, got -1"),
        (
            dict(coupling=True, optimizer_in_backward=True),
            ValueError,
            "coupling must be 0 where optimizer_in_backward=True, got True",
        ),
        (dict(policy="best"), ValueError, "policy must be one of .*got 'best'"),
        (dict(seed=-1), ValueError, "seed must be in"),
        (dict(fo=dict(lr=0.1, betas=1)), TypeError, "'betas' is no option"),
        (dict(zo=3), TypeError, "zo must be a mapping"),
        (dict(candidates=["9.weight"]), ValueError, "candidates must be names.*got '9.weight'"),
        (dict(candidates="0.weight"), TypeError, "candidates must be a collection"),
        (dict(directions="own"), ValueError, "directions must be one of"),
        (dict(budget=0.001, policy="random", exclude="bias"), ValueError, r"the least is .*for '6"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        partition_of(*mlp(), **options)


def test_bad_closures():
    model, _ = mlp()
    with pytest.raises(TypeError, match=r"closure must be a function .*got int"):
        partition_of(model, 3)
    with pytest.raises(ValueError, match="got none"):
        partition_of(model, [])
    with pytest.raises(TypeError, match="model must be"):
        partition_of(3, lambda: 3)
    with pytest.raises(TypeError):
        partition_of(model, lambda: 3.0)
    with pytest.raises(ValueError, match="depends on none; does it use this model"):
        partition_of(model, mlp()[1])


def test_partitions_are_data():
    partition = partition_of(*mlp())[1]
    assert isinstance(partition, Partition)
    assert hash(partition) == hash(partition_of(*mlp())[1])
