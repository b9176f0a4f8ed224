"""Accuracy and F1, from their definitions."""

import pytest
import torch

from experiments.scores import scores


@pytest.mark.parametrize("seed", range(5))
def test_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    labels, chosen = torch.randint(0, 2 + seed % 2, (2, 30), generator=generator).tolist()
    if seed == 4:
        chosen = [0] * 30
    found = scores(chosen, labels, 0.5)
    pairs = list(zip(chosen, labels, strict=True))
    assert found.loss == 0.5
    assert found.accuracy == pytest.approx(sum(a == b for a, b in pairs) / 30)
    each = []
    for label in {*chosen, *labels}:
        right = sum(a == b == label for a, b in pairs)
        each.append(2 * right / (chosen.count(label) + labels.count(label)))
    assert found.f1 == pytest.approx(sum(each) / len(each))


def test_known_scores():
    found = scores([0, 0, 1, 2], [0, 1, 1, 1], 0.0)
    assert found.accuracy == 0.5
    # F1 of the labels: 2/3 of 0, 2/4 of 1, 0 of 2
    assert found.f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
