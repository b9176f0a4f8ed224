"""Zeroth-order weights whose memory is gone, or shared, or not contiguous."""

import pytest
import torch

from zofo_optim import HybridZOFO, checks


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_freed_weights_are_refused_and_train_on_when_they_are_back(perturbation):
    weight, other = torch.ones(64), torch.ones(4)
    optimizer = HybridZOFO([other, weight], mode="zo", lr=1e-3, perturbation=perturbation)

    def loss():
        return (weight * weight).sum() + other.sum()

    optimizer.step(loss)
    before, size = other.clone(), weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"must hold data, got a storage of 0 bytes"):
        optimizer.step(lambda: other.sum())
    assert torch.equal(other, before)
    weight.untyped_storage().resize_(size)
    weight.fill_(1)
    optimizer.step(loss)
    assert not torch.equal(other, before)


def test_freed_weights_are_refused_at_construction():
    weight = torch.ones(64)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"zeroth-order parameter .* must hold data"):
        HybridZOFO([weight], mode="zo", lr=1e-3)


def parts(*slices, size=12):
    base = torch.ones(size)
    return [base[at] for at in slices]


def test_overlapping_weights_are_refused():
    a, b = parts(slice(0, 8), slice(4, 12))
    message = "zeroth-order parameters 'a' and 'b' share memory"
    for given in (
        [("a", a), ("b", b)],
        [{"params": [("a", a)]}, {"params": [("b", b)]}],
    ):
        with pytest.raises(ValueError, match=message):
            HybridZOFO(given, mode="zo", lr=1e-3)
    optimizer = HybridZOFO([("a", a)], mode="zo", lr=1e-3)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("b", b)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("zo_first", [True, False])
def test_zeroth_and_first_order_parameters_that_share_memory_are_refused(zo_first):
    a, b = parts(slice(0, 8), slice(4, 12))
    zo = {"params": [("a", a)], "mode": "zo", "lr": 1e-3}
    fo = {"params": [("b", b.requires_grad_())], "mode": "fo"}
    groups = [zo, fo] if zo_first else [fo, zo]
    message = r"'a' shares memory with a first-order parameter of shape \(8,\)"
    with pytest.raises(ValueError, match=message):
        HybridZOFO([dict(g) for g in groups])
    optimizer = HybridZOFO([dict(groups[0])])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(dict(groups[1]))
    assert len(optimizer.param_groups) == 1


def test_neighbours_and_columns_train():
    matrix = torch.ones(4, 6)
    columns = [matrix[:, 0:2], matrix[:, 2:3], matrix[:, 3:6]]
    optimizer = HybridZOFO(columns[:2], mode="zo", lr=1e-3)
    optimizer.add_param_group({"params": [columns[2].requires_grad_()], "mode": "fo"})
    optimizer.step(lambda: (columns[2] * matrix[:, :3]).sum())
    assert matrix.ne(1).all()


def test_first_order_parameters_may_share_and_need_no_memory():
    a, b = (p.requires_grad_() for p in parts(slice(0, 8), slice(4, 12)))
    gone = torch.ones(4, requires_grad=True)
    gone.untyped_storage().resize_(0)
    meta = torch.ones(4, device="meta", requires_grad=True)
    zo = {"params": [torch.ones(4)], "mode": "zo", "lr": 1e-3}
    HybridZOFO([zo, {"params": [a, b, gone, meta]}])


def test_parameters_are_checked_once_however_many_groups(monkeypatch):
    checked = []
    monkeypatch.setattr(checks, "check_weight", lambda p, name: checked.append(name))
    groups = [{"params": [(f"p{i}", torch.ones(4))]} for i in range(100)]
    optimizer = HybridZOFO(groups, mode="zo", lr=1e-3)
    assert checked == [f"zeroth-order parameter 'p{i}'" for i in range(100)]
    del checked[:]
    optimizer.add_param_group({"params": [("last", torch.ones(4))]})
    assert len(checked) == 101


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_transposed_weights_train_as_contiguous_ones(perturbation):
    results = []
    for layout in (torch.Tensor.clone, lambda w: w.T.contiguous().T):
        weight = layout(torch.linspace(-1, 1, 35).double().view(5, 7))
        options = {"lr": 1e-2, "distribution": "rademacher", "perturbation": perturbation}
        optimizer = HybridZOFO([weight], mode="zo", **options)
        for _ in range(3):
            optimizer.step(lambda w=weight: w.contiguous().square().sum())
        results.append(weight.clone(memory_format=torch.contiguous_format))
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.linspace(-1, 1, 35).double().view(5, 7))
