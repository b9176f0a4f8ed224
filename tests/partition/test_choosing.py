"""Budgets of bytes: every budget from the least peak on is met, as well as can be."""

import itertools
import random

import pytest
import torch
from partitioned import mlp, transformers
from torch import nn

from zofo_optim.costs import costs_of
from zofo_optim.partition.choosing import chosen_within
from zofo_optim.partition.policies import POLICIES, Problem


def llama():
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.zeros(3, 8, dtype=torch.long)
    return model, lambda: model(input_ids=ids, labels=ids).loss


def conv():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    x = torch.zeros(6, 3, 8, 8)
    return model, lambda: model(x).square().mean()


def problem_of(costs, in_backward, draw):
    names = [t.name for t in costs.tensors]
    values = {n: draw.random() ** 3 if draw.random() < 0.7 else -draw.random() for n in names}
    norms = {n: abs(value) for n, value in values.items()}
    return Problem(costs, "memory", 0, in_backward, values, norms, (), 0)


@pytest.mark.parametrize("made", [llama, conv, mlp])
@pytest.mark.parametrize("in_backward", [False, True])
def test_no_budget_is_falsely_called_impossible(made, in_backward):
    costs = costs_of(*made())
    names = [t.name for t in costs.tensors]

    def peak(chosen):
        return costs.peak(chosen, in_backward=in_backward, evaluations=True)

    singles, whole = {name: peak([name]) for name in names}, peak(names)
    draw = random.Random(1)
    for _ in range(2):
        problem = problem_of(costs, in_backward, draw)
        useful = [name for name in names if problem.importance[name] > 0]
        least = min(singles[name] for name in useful)
        for budget in (least, int(1.05 * least), (least + whole) // 2):
            for policy in ("importance", "top_k"):
                chosen = chosen_within(problem, policy, budget)
                assert peak(chosen) <= budget
                worth = sum(problem.importance[name] for name in chosen)
                best = max(problem.importance[n] for n in useful if singles[n] <= budget)
                assert worth >= best - 1e-12
        with pytest.raises(ValueError, match=rf"\({least} bytes\)"):
            chosen_within(problem, "importance", least - 1)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "adapters"])
def test_the_least_that_is_said_is_enough(policy):
    costs = costs_of(*llama())
    problem = problem_of(costs, False, random.Random(0))
    with pytest.raises(ValueError, match="the weights and one tensor") as error:
        chosen_within(problem, policy, 2)
    stated = int(str(error.value).split(" bytes)")[0].rpartition("(")[2])
    assert costs.peak(chosen_within(problem, policy, stated), evaluations=True) <= stated


def test_the_choice_is_nearly_the_best_of_all_sets():
    costs = costs_of(*conv())
    names = [t.name for t in costs.tensors]
    sets = [s for n in range(1, len(names) + 1) for s in itertools.combinations(names, n)]
    peaks = [costs.peak(s, evaluations=True) for s in sets]
    draw = random.Random(3)
    for budget in sorted(set(peaks))[::4]:
        problem = problem_of(costs, False, draw)
        values = [sum(problem.importance[n] for n in s) for s in sets]
        best = max(v for v, p in zip(values, peaks, strict=True) if p <= budget)
        if best > 0:
            chosen = chosen_within(problem, "importance", budget)
            assert sum(problem.importance[n] for n in chosen) >= 0.8 * best


def test_last_layers_have_no_gap():
    costs = costs_of(*mlp(6))
    names = [t.name for t in costs.tensors]
    problem = problem_of(costs, False, random.Random(0))
    for depth in range(1, len(names) + 1):
        peak = costs.peak(names[:depth], evaluations=True)
        chosen = chosen_within(problem, "last_layers", peak)
        assert chosen == names[: len(chosen)]
        assert len(chosen) >= depth
