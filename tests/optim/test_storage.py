"""Zeroth-order weights whose memory is gone, or shared, or not contiguous."""

import pytest
import torch

from zofo_optim import HybridZOFO


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
