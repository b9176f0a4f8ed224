"""Steps that move some of the parameters: which, by how much, and that nothing else is touched."""

import copy
import math
from collections import Counter

import pytest
import torch
from conftest import same_bits
from journaled import Job
from torch import nn
from torch.nn import Parameter

from zofo_optim import Cycle, Draw, HybridZOFO, Journal, hybrid_param_groups, replay
from zofo_optim.active import active_of
from zofo_optim.journal import JournalError, read

NAMES = [f"layers.{i}.{part}" for i in range(3) for part in ("up", "down")] + ["norm", "head.b"]


def chosen(active, step=0, seed=3, names=NAMES, group=0):
    return active_of(active).choose(names, seed, step, group)


# ---- what is chosen ----------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.8, 1.0])
def test_a_draw_has_its_size_and_scale(fraction):
    count = max(1, round(fraction * len(NAMES)))
    for step in range(20):
        positions, scale = chosen(fraction, step)
        assert len(positions) == count
        assert list(positions) == sorted(set(positions))
        assert scale == len(NAMES) / count


def test_draws_are_uniform_and_depend_on_seed_step_and_group():
    """Each pair of 8 as often as any other: chi-square of 28 cells, 5,600 draws, 27 degrees."""
    pairs = Counter(chosen(0.25, step).positions for step in range(5600))
    assert len(pairs) == 28
    chi_square = sum((count - 200) ** 2 / 200 for count in pairs.values())
    assert chi_square < 27 + 5 * math.sqrt(2 * 27)
    first = [chosen(0.5, step) for step in range(40)]
    assert first == [chosen(Draw(0.5), step) for step in range(40)]
    for other in (dict(seed=4), dict(group=1)):
        assert first != [chosen(0.5, step, **other) for step in range(40)]
    assert len({chosen(0.5, 2**64 - 1, seed=2**64 - 1), chosen(0.5, 0, seed=2**64 - 1)}) == 2


def test_draws_of_today():
    """Journals know what moved, but a run that is resumed draws again: the draws must stay."""
    found = [chosen(0.5, step, seed=7).positions for step in range(3)]
    assert found == [(0, 1, 2, 4), (1, 3, 4, 5), (2, 4, 6, 7)]


def test_draws_by_layer():
    units = [{0, 1}, {2, 3}, {4, 5}, {6}, {7}]
    seen = Counter()
    for step in range(400):
        positions, scale = chosen(Draw(0.4, by="layer"), step)
        assert scale == 5 / 2
        inside = [unit for unit in units if unit <= set(positions)]
        assert set().union(*inside) == set(positions)
        seen.update(min(unit) for unit in inside)
    assert set(seen) == {0, 2, 4, 6, 7}
    assert all(abs(count - 160) < 5 * math.sqrt(400 * 0.4 * 0.6) for count in seen.values())


def test_turns():
    turns = Cycle([r"layers\.0", [r"layers\.1", "norm"], "*head*"], every=2)
    found = [chosen(turns, step) for step in range(7)]
    assert [positions for positions, _ in found] == [(0, 1)] * 2 + [(2, 3, 6)] * 2 + [(7,)] * 2 + [
        (0, 1)
    ]
    assert {scale for _, scale in found} == {1.0}
    assert chosen(["UP", "b$"]) == ((0, 2, 4, 7), 1.0)


@pytest.mark.parametrize(
    ("active", "error", "message"),
    [
        (0.0, ValueError, "active must be in (0, 1]"),
        (1.5, ValueError, "active must be in (0, 1]"),
        (float("nan"), ValueError, "active must be in (0, 1]"),
        (True, TypeError, "active must be None, a fraction"),
        ([], ValueError, "active must have at least one pattern"),
        ([1], TypeError, "active must be a string or a sequence of strings"),
        ({"layers"}, TypeError, "active must be None, a fraction"),
        ("nowhere", ValueError, "'nowhere', which matches none"),
    ],
)
def test_what_cannot_be(active, error, message):
    params = [(name, Parameter(torch.ones(2), False)) for name in NAMES]
    with pytest.raises(error) as raised:
        HybridZOFO(params, mode="zo", lr=1e-3, active=active)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Draw("0.5"), TypeError, "fraction must be a number in (0, 1], got '0.5'"),
        (lambda: Draw(-1), ValueError, "fraction must be in (0, 1], got -1"),
        (lambda: Draw(0.5, by="block"), ValueError, "by must be one of ('tensor', 'layer')"),
        (lambda: Cycle("layers"), TypeError, "parts must be a sequence of patterns"),
        (lambda: Cycle([]), ValueError, "parts must have patterns each"),
        (lambda: Cycle([["a"], []]), ValueError, "parts must have patterns each"),
        (lambda: Cycle(["a"], every=0), ValueError, "every must be an int >= 1, got 0"),
    ],
)
def test_draws_and_turns_that_cannot_be(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


def test_names_are_needed_by_patterns_and_layers():
    for active in ("layers", Draw(0.5, by="layer"), Cycle(["a", "b"])):
        with pytest.raises(ValueError, match="where parameters have no names"):
            HybridZOFO([Parameter(torch.ones(2), False)], mode="zo", lr=1e-3, active=active)


def test_a_captured_step_must_not_change_what_moves():
    for active in (0.5, Cycle(["a", "b"])):
        with pytest.raises(ValueError, match="patterns where capturable=True"):
            HybridZOFO(
                [("a", Parameter(torch.ones(2), False))],
                mode="zo",
                lr=1e-3,
                active=active,
                capturable=True,
            )


# ---- steps -------------------------------------------------------------------------------------


def job(**options):
    """Four frozen layers, of which the second is in a group of its own."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    model = nn.Sequential(*layers).double().requires_grad_(False)
    x = torch.randn(5, 6, dtype=torch.float64)
    own = list(model[1].named_parameters("1"))
    others = [(n, p) for n, p in model.named_parameters() if n[0] != "1"]
    groups = [dict(params=part, mode="zo", lr=1e-2, weight_decay=0.1) for part in (others, own)]
    optimizer = HybridZOFO(groups, seed=5, **options)
    return model, optimizer, lambda: model(x).square().mean()


def moved(model, before):
    return {n for n, p in model.named_parameters() if not same_bits(p.detach(), before[n])}


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("structure", ["full", "low_rank"])
@pytest.mark.parametrize("active", [0.3, Draw(0.5, by="layer"), "weight$", Cycle(["0", "[13]"])])
def test_only_what_is_active_is_touched(perturbation, structure, active):
    """Neither moved on the way, nor decayed; and what moves is what the optimizer names."""
    model, optimizer, loss = job(perturbation=perturbation, structure=structure, active=active)
    ever, at_once = set(), set()
    everything = {n for n, _ in model.named_parameters()}
    verifies = perturbation == "streamed" and active != "weight$"  # all that ever move
    for step in range(12):
        before = {n: p.clone() for n, p in model.named_parameters()}
        names = {name for group in optimizer.active_groups() for name in group.names}

        def closure(before=before, may=everything if verifies and step == 0 else names):
            with torch._C.DisableTorchFunction():
                assert moved(model, before) <= may
            return loss()

        optimizer.step(closure)
        assert moved(model, before) == names
        ever |= names
        at_once.add(frozenset(names))
    if active == "weight$":
        assert at_once == {frozenset(n for n in everything if n.endswith("weight"))}
    elif isinstance(active, Cycle):
        assert len(at_once) == 2
        assert ever == {n for n in everything if n[0] != "2"}
    else:
        assert len(at_once) > 2
        assert ever == everything


@pytest.mark.parametrize("samples", [1, 3])
def test_the_mean_estimate_is_the_gradient(samples):
    """E ghat = g, and E|ghat - g|^2 = (d - 1)|g|^2 / q for +-1 and tensors of one size.

    Of a linear loss, with k of N tensors of m elements: the square of N / k (g_A . z) z_A is
    (N / k)^2 |g_A|^2 k m, of mean N m |g|^2, with d = N m. 800 estimates of d = 8 elements.
    """
    count, draws = 8, 800
    gradient = torch.linspace(-1, 1, count, dtype=torch.float64).view(4, 2)
    params = [Parameter(torch.zeros(2, dtype=torch.float64), False) for _ in range(4)]

    def estimate(seed):
        options = dict(active=0.5, distribution="rademacher", num_samples=samples)
        optimizer = HybridZOFO(params, mode="zo", lr=1.0, seed=seed, **options)
        before = torch.stack(params)
        optimizer.step(lambda: (gradient * torch.stack(params)).sum())
        return before - torch.stack(params)

    estimates = torch.stack([estimate(seed) for seed in range(draws)])
    norm = gradient.norm().item()
    # 5 standard errors: an element's deviation is at most sqrt(d)|g|
    assert (estimates.mean(0) - gradient).abs().max() < 5 * norm * math.sqrt(count / draws)
    squares = (estimates - gradient).square().sum((1, 2))
    # samples of a step share what is drawn, so only the rest of the variance is divided
    shared = 4 / 2 - 1
    wanted = ((count - 1 - shared) / samples + shared) * norm**2
    assert abs(squares.mean() - wanted) < 5 * squares.std() / math.sqrt(draws) + 0.02 * wanted


def test_decay_is_that_of_all_on_average():
    """Near exp(-lr decay steps), as without draws: each moves half as often, by twice as much."""
    params = [Parameter(torch.ones(3, dtype=torch.float64), False) for _ in range(4)]
    options = dict(mode="zo", lr=1e-3, weight_decay=1.0, active=0.5)
    optimizer = HybridZOFO(params, **options)
    for _ in range(400):
        optimizer.step(lambda: sum(p.sum() for p in params) * 0)
    assert torch.stack(params).mean().item() == pytest.approx(math.exp(-0.4), rel=0.02)


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_each_parameter_is_verified_once(perturbation):
    _, optimizer, loss = job(perturbation=perturbation, active=Cycle(["[01]", "[12]", "[03]"]))
    calls = []

    def closure():
        calls.append(1)
        return loss()

    counts = []
    for _ in range(6):
        del calls[:]
        optimizer.step(closure)
        counts.append(len(calls))
    plain = 2
    if perturbation == "streamed":  # which also verifies what does not move yet
        assert counts[0] > plain
        assert counts[1:] == [plain] * 5
    else:
        assert all(count > plain for count in counts[:3])
        assert counts[3:] == [plain] * 3


def test_a_run_that_has_diverged_costs_no_more():
    _, optimizer, _ = job(perturbation="streamed", active=0.5)
    calls = []

    def closure():
        calls.append(1)
        return torch.tensor(math.nan)

    for _ in range(3):
        optimizer.step(closure)
    assert len(calls) == 3 * 2


def test_what_does_not_move_yet_is_verified_too():
    """A parameter that a view made earlier reads; its turn comes later."""
    params = [(str(i), Parameter(torch.ones(3), False)) for i in range(2)]
    view = params[1][1].detach()
    group = dict(params=params, mode="zo", lr=0.1)
    optimizer = HybridZOFO([group], perturbation="streamed", active=Cycle(["0", "1"]))
    with pytest.raises(RuntimeError, match=r"reach the loss in another way.*: 1;"):
        optimizer.step(lambda: params[0][1].sum() + view.square().sum())
    assert params[0][1].eq(1).all()


def test_micro_batches_move_the_same_parameters():
    whole, optimizer, loss = job(active=0.4)
    parts, other, other_loss = job(active=0.4)
    for _ in range(4):
        optimizer.step(loss)
        for _ in range(2):
            other.backward(lambda: other_loss() / 2)
        other.step()
    torch.testing.assert_close(
        dict(whole.state_dict()), dict(parts.state_dict()), rtol=1e-9, atol=0
    )


def test_a_state_dict_goes_on_along_the_same_path():
    model, optimizer, loss = job(active=Draw(0.4))
    for _ in range(3):
        optimizer.step(loss)
    other, resumed, other_loss = job(active=0.4)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        optimizer.step(loss)
        resumed.step(other_loss)
    assert all(map(same_bits, model.state_dict().values(), other.state_dict().values()))
    _, everything, _ = job()
    with pytest.warns(UserWarning, match=r"active=0\.4 \(here None\)"):
        everything.load_state_dict(optimizer.state_dict())


def test_weights_report_the_size_of_what_moved():
    _, optimizer, loss = job(active=r"0\.bias")
    optimizer.step(loss)
    small = float(optimizer.report().split("update ")[1].split()[0])
    _, whole, loss = job()
    whole.step(loss)
    assert 0 < small < float(whole.report().split("update ")[1].split()[0])


# ---- hybrid_param_groups names what it groups ---------------------------------------------------


def test_beside_an_adapter():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[:2].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    groups = hybrid_param_groups(model, dict(lr=1e-2), dict(lr=1e-2), verbose=False)
    optimizer = HybridZOFO(groups, active=Cycle(["0", "1"]))
    optimizer.step(lambda: model(torch.ones(2, 3)).square().mean())
    changed = {n for n, p in model.state_dict().items() if not same_bits(p, before[n])}
    assert changed == {"0.weight", "0.bias", "2.weight", "2.bias"}


# ---- journals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [0.5, Cycle(["0", "weight", "."], every=2)], ids=str)
def test_replays_are_the_trained_weights(tmp_path, perturbation, dtype, active):
    run = Job(dtype, perturbation=perturbation, active=active)
    with Journal(tmp_path / "run.zofo").attach(run.optimizer):
        for step in range(7):
            run.step(step)
        run.optimizer.backward(lambda: run.loss(7))  # moves that no update follows
    base = {name: run.base[name].clone() for name in run.weights()}
    replayed = replay(base, tmp_path / "run.zofo")
    assert replayed.verified
    assert all(same_bits(base[name], p.detach()) for name, p in run.weights().items())
    whole = read(tmp_path / "run.zofo")
    sizes = {len(parts[0].active or (0, 1, 2, 3)) for parts in whole.steps}
    assert sizes == ({2} if active == 0.5 else {2, 4})
    assert "active" in whole.header


def test_a_journal_goes_on_with_the_same_parts_only(tmp_path):
    run = Job(active=0.5)
    with Journal(tmp_path / "run.zofo").attach(run.optimizer):
        run.step(0)
    other = Job()
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.param_groups[0]["zo_step"] = 1
    journal = Journal(tmp_path / "run.zofo", resume=True)
    with pytest.raises(JournalError, match=r"active=0\.5, the optimizer has None"):
        journal.attach(other.optimizer)


def test_a_record_has_a_bit_for_each_parameter(tmp_path):
    sizes = {}
    for active in (None, 0.5):
        run = Job(active=active, perturbation="streamed")
        journal = Journal(tmp_path / f"{active}.zofo").attach(run.optimizer)
        run.step(0)
        before = journal.path.stat().st_size
        for step in range(1, 11):
            run.step(step)
        sizes[active] = journal.path.stat().st_size - before
        journal.close()
    assert 0 < sizes[0.5] - sizes[None] <= 10
