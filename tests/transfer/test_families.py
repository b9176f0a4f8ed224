"""The pairs that exact tests rest on are the same function, and a random adapter changes it."""

import families
import pytest
import torch
from families import logits

BATCH = families.texts(1)[0]

PAIRS = {
    "rotated": lambda: (families.llama(), families.rotated(families.llama())),
    "widened": lambda: (families.llama(), families.widened(families.llama())),
    "widened, rotated": lambda: (families.llama(), families.widened(families.llama(), seed=1)),
    "double units": lambda: (families.llama(), families.widened(families.llama(), units=True)),
    "padded": lambda: (families.llama(), families.padded(families.llama())),
    "deeper": lambda: (families.llama(), families.deeper(families.llama(), at=(0, 2, 3))[0]),
    "classifier": lambda: (families.llama(labels=3), families.rotated(families.llama(labels=3))),
    "permuted": lambda: (families.bert(), families.permuted(families.bert())),
    "doubled": lambda: (families.bert(), families.doubled(families.bert())),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_one_function(pair):
    small, large = PAIRS[pair]()
    assert any(
        a.shape != b.shape or not torch.allclose(a, b)
        for a, b in zip(small.parameters(), large.parameters(), strict=False)
    )
    torch.testing.assert_close(logits(large, BATCH), logits(small, BATCH), atol=1e-5, rtol=1e-4)


def test_the_map_of_a_deeper_model_is_true():
    small = families.llama(layers=3)
    large, true = families.deeper(small, at=(0, 2, 3))
    assert true == {1: 0, 4: 1, 5: 2}
    for i, j in true.items():
        for a, b in zip(
            large.model.layers[i].parameters(), small.model.layers[j].parameters(), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("make", [families.llama, families.bert, families.gpt2])
def test_a_random_adapter_matters(make):
    """By a tenth of the logits, where the exact tests allow for a thousandth."""
    model = make()
    before = logits(model, BATCH)
    tuned = families.with_lora(model, target_modules="all-linear", task=None)
    after = logits(tuned, BATCH)
    assert (after - before).norm() > 0.1 * before.norm()
    assert len(tuned.peft_config["default"].target_modules) > 3
