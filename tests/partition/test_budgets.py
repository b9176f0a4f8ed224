"""Budgets as users write them."""

import numpy as np
import pytest

from zofo_optim.partition.budgets import Budget, kind_of, parse_budget, shown
from zofo_optim.partition.presets import hi_zfo


@pytest.mark.parametrize(
    ("budget", "of", "expected"),
    [
        (0.6, "flops", Budget(0.6, None)),
        (1, "flops", Budget(1.0, None)),
        ("60%", "flops", Budget(0.6, None)),
        (" 0.6 ", "memory", Budget(0.6, None)),
        (np.float32(0.5), "memory", Budget(0.5, None)),
        ("12GB", "memory", Budget(None, 12 * 10**9)),
        ("1.5 gb", "memory", Budget(None, 15 * 10**8)),
        ("800MiB", "memory", Budget(None, 800 * 2**20)),
        ("2e3kB", "memory", Budget(None, 2 * 10**6)),
        (12345, "memory", Budget(None, 12345)),
        (np.int64(12345), "memory", Budget(None, 12345)),
    ],
)
def test_forms(budget, of, expected):
    assert parse_budget(budget, of) == expected


@pytest.mark.parametrize(
    ("budget", "of", "error", "message"),
    [
        (0.0, "flops", ValueError, r"share in \(0, 1\].* where of='flops', got 0.0"),
        (1.2, "memory", ValueError, r"share in \(0, 1\].*or bytes.*, got 1.2"),
        (float("nan"), "flops", ValueError, "got nan"),
        (2, "flops", ValueError, "got 2"),
        (-5, "memory", ValueError, "got -5"),
        ("120%", "flops", ValueError, "got '120%'"),
        ("12GB", "flops", ValueError, "where of='flops', got '12GB'"),
        ("12 parsecs", "memory", ValueError, "got '12 parsecs'"),
        ("much", "memory", ValueError, "got 'much'"),
        ("0.1B", "memory", ValueError, "got '0.1B'"),
        (None, "flops", TypeError, "got None"),
        (True, "flops", TypeError, "got True"),
        (0.5, "time", ValueError, r"of must be one of \('flops', 'memory'\), got 'time'"),
    ],
)
def test_refusals(budget, of, error, message):
    with pytest.raises(error, match=message):
        parse_budget(budget, of)


def test_numbers_for_people():
    assert shown(1234, "B") == "1.23 kB"
    assert shown(999_999, "B") == "1 MB"
    assert shown(5, "B") == "5 B"
    assert shown(0) == "0"
    assert shown(2.5e13, "FLOPs") == "25 TFLOPs"


@pytest.mark.parametrize(
    ("budget", "of"),
    [
        (0.6, "flops"),
        ("60%", "flops"),
        ("0.6", "flops"),
        (1, "flops"),
        ("12GB", "memory"),
        ("800 MiB", "memory"),
        (10**9, "memory"),
    ],
)
def test_a_unit_tells_what_is_limited(budget, of):
    assert kind_of(budget) == of
    preset = hi_zfo(budget)
    assert preset.partition["of"] == preset.trainer["of"] == of


@pytest.mark.parametrize("budget", [1.2, "12 parsecs", 0])
def test_presets_refuse_at_once(budget):
    with pytest.raises(ValueError, match="budget must be a share"):
        hi_zfo(budget)


def test_a_preset_tells_the_partition_which_optimizer_trains():
    preset = hi_zfo()
    for name in ("fo_optimizer", "coupling"):
        assert preset.partition[name] == preset.hybrid[name]
    assert "fo_optimizer" not in preset.trainer
