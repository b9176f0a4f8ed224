"""Which noise version an optimizer works by, and what that does to its 16-bit weights."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import same_bits
from torch.nn import Parameter

from zofo_kernels import NOISE_VERSION, noise
from zofo_optim import HybridZOFO, Journal, replay
from zofo_optim.journal import JournalError

MU = 1e-3


def norm(dtype=torch.bfloat16):
    """A weight as layer norms have it, where bfloat16's numbers are up to 8 mu apart."""
    return Parameter(torch.linspace(0.9, 1.9, 2000).to(dtype), requires_grad=False)


def optimizer_of(weight, **options):
    group = {"params": [weight], "param_names": ["norm"], "mode": "zo", "lr": 1e-4, "mu": MU}
    return HybridZOFO([group], **{"distribution": "rademacher", **options})


def closure_of(weight):
    return lambda: (weight.float() * torch.arange(2000) / 2000).sum()


def train(weight, steps=3, **options):
    optimizer = optimizer_of(weight, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(closure_of(weight))
    return optimizer


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_estimates_of_coarse_weights_are_unbiased(perturbation, distribution):
    """The slope along v of a linear loss is v's product with its gradient; version 1 loses it."""
    gradient = torch.arange(2000, dtype=torch.float64) / 2000

    def shares(version):
        weight = norm()
        optimizer = optimizer_of(
            weight, perturbation=perturbation, noise_version=version, distribution=distribution
        )
        for _ in range(200):
            optimizer.zero_grad()
            optimizer.backward(lambda: (weight.double() * gradient).sum())
            optimizer.param_groups[0]["zo_step"] += 1
            yield optimizer.projected_grads.item(), optimizer.zo_groups()[0]

    def share(version):
        found = wanted = size = 0.0
        for slope, group in shares(version):
            direction = group.direction(0)._replace(step=group.options["zo_step"] - 1)
            v = (noise((2000,), direction).double() * gradient).sum().item()
            found, wanted, size = found + slope * v, wanted + v * v, size + 1
        return found / wanted

    assert abs(share(2) - 1) < 0.25
    assert share(1) < 0.25


def test_wide_weights_train_alike():
    one, two = norm(torch.float32), norm(torch.float32)
    train(one, noise_version=1), train(two, noise_version=2)
    assert same_bits(one.detach(), two.detach())


def test_narrow_weights_do_not():
    one, two = norm(), norm()
    train(one, noise_version=1), train(two)
    assert not same_bits(one.detach(), two.detach())


@pytest.mark.parametrize("version", [0, 3, True, 2.0, "2", None])
def test_unknown_versions_are_refused(version):
    with pytest.raises(ValueError, match=r"noise_version must be one of \(1, 2\), got"):
        optimizer_of(norm(), noise_version=version)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_it(copied):
    assert copied(optimizer_of(norm(), noise_version=1)).settings.noise_version == 1
    assert optimizer_of(norm()).settings.noise_version == NOISE_VERSION


def old_state(weight):
    """As the first version of the library saved it: it did not say its noise version."""
    state = train(weight, noise_version=1).state_dict()
    del state["param_groups"][0]["zo_settings"]["noise_version"]
    return state


def test_an_old_state_of_narrow_weights_asks_for_the_old_version():
    weight = norm()
    state = old_state(weight)
    with pytest.warns(UserWarning, match=r"noise_version=1 \(here 2\)"):
        optimizer_of(weight).load_state_dict(copy.deepcopy(state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_of(weight, noise_version=1).load_state_dict(copy.deepcopy(state))


def test_an_old_state_of_wide_weights_goes_on():
    weight = norm(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_of(weight).load_state_dict(old_state(weight))


@pytest.mark.parametrize("version", [1, 2])
def test_journals_replay_by_their_own(version, tmp_path):
    weight = norm()
    start = weight.detach().clone()
    optimizer = optimizer_of(weight, noise_version=version)
    with Journal(tmp_path / "run.zofo").attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(closure_of(weight))
    assert replay({"norm": start}, tmp_path / "run.zofo").verified
    assert same_bits(start, weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_journal_goes_on_by_its_own(dtype, tmp_path):
    """Of wide weights by any."""
    weight = norm(dtype)
    optimizer = optimizer_of(weight, noise_version=1)
    with Journal(tmp_path / "run.zofo").attach(optimizer):
        optimizer.step(closure_of(weight))
    later = optimizer_of(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        later.load_state_dict(optimizer.state_dict())
    journal = Journal(tmp_path / "run.zofo", resume=True)
    if dtype == torch.bfloat16:
        with pytest.raises(JournalError, match="noise_version=1, the optimizer has 2"):
            journal.attach(later)
    else:
        with journal.attach(later):
            later.step(closure_of(weight))
        start = {"norm": norm(dtype).detach().clone()}
        assert replay(start, tmp_path / "run.zofo").verified
