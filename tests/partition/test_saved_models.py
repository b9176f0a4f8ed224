"""save_hybrid and a saved partition: another process goes on along the same path."""

import pytest
import torch
from conftest import same_bits
from partitioned import KINDS, made

from zofo_optim import HybridZOFO, load_hybrid, save_hybrid
from zofo_optim.partition import Partition, importance_partition

RATES = dict(zo=dict(lr=1e-4, mu=1e-3), fo=dict(lr=1e-2))
CASES = [("llama", dict(budget=0.5)), ("lora_llama", dict(budget=0.6, policy="adapters"))]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_goes_on_where_it_was(kind, options, tmp_path):
    model, closure = made(kind)
    base, _ = made("llama")  # as it would be loaded elsewhere
    groups, partition = importance_partition(model, closure, **RATES, **options, verbose=False)
    optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW, estimator="one_sided")
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    save_hybrid(model, optimizer, tmp_path / "saved")
    partition.save(tmp_path / "saved" / "partition.json")

    other, state = load_hybrid(tmp_path / "saved", base=base)
    again = HybridZOFO(
        Partition.load(tmp_path / "saved" / "partition.json").groups(other, **RATES, verbose=False),
        fo_optimizer=torch.optim.AdamW,
        estimator="one_sided",
    )
    again.load_state_dict(state)
    other.eval()
    _, batch = KINDS[kind]()
    for one, loss in ((optimizer, closure), (again, lambda: other(**batch).loss)):
        one.zero_grad()
        one.step(loss)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in other.named_parameters()]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())
