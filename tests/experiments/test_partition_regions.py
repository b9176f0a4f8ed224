"""Where hybrids are best: regions of what is spent, and what is said of them."""

import math
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import quick_collections

from experiments.partition import comparisons, plots
from experiments.partition.regions import ALONE, LOSES, TIES, WINS, Point, regions, verdict

__all__ = ["quick_collections"]


def point(name, hybrid, spent, mean, spread=0.1):
    """Of two seeds, whose sample deviation is the spread."""
    half = spread / math.sqrt(2)
    return Point(name, hybrid, spent, (mean - half, mean + half))


def test_a_point_has_a_mean_and_the_larger_of_two_spreads():
    one = point("one", True, 1.0, 2.0, 0.3)
    assert one.mean == pytest.approx(2.0)
    assert one.spread == pytest.approx(0.3)
    assert Point("one", True, 1.0, (1.0, 1.2), error=0.5).spread == 0.5
    assert Point("one", True, 1.0, (1.0,)).spread == 0.0
    assert Point("one", True, 1.0, (1.0, math.nan)).mean == math.inf


def test_verdicts_need_more_than_the_larger_spread():
    other = point("b", False, 1.0, 1.0, 0.05)
    assert verdict(point("a", True, 1.0, 0.8, 0.1), other) == WINS
    assert verdict(point("a", True, 1.0, 0.92, 0.1), other) == TIES
    assert verdict(point("a", True, 1.0, 1.2, 0.1), other) == LOSES
    assert verdict(point("a", True, 1.0, 0.92, 0.0), other) == WINS
    assert verdict(point("a", True, 1.0, 1.0), None) == ALONE
    assert verdict(None, other) == LOSES
    diverged = Point("a", True, 1.0, (math.nan, 1.0))
    assert verdict(diverged, other) == LOSES
    assert verdict(diverged, Point("b", False, 1.0, (math.nan, 1.0))) == TIES
    with pytest.raises(ValueError, match="hybrid or other must be there"):
        verdict(None, None)


def test_regions_follow_what_there_is_to_spend():
    made = [
        point("head", False, 10, 1.0),
        point("head + ZO", True, 10, 0.5),
        point("LoRA", False, 20, 0.45),
        point("half + ZO", True, 30, 0.44),
        point("full", False, 40, 0.2),
    ]
    found = regions(made)
    assert [(part.least, part.below, part.verdict) for part in found] == [
        (10, 20, WINS),
        (20, 30, TIES),
        (30, 40, TIES),
        (40, math.inf, LOSES),
    ]
    assert [part.hybrid.name for part in found] == [*["head + ZO"] * 2, *["half + ZO"] * 2]
    assert [part.other.name for part in found] == ["head", "LoRA", "LoRA", "full"]
    text = comparisons.where(made, "test loss", "seconds")
    assert text.startswith(
        "By test loss, a hybrid is best by more than the spread from 10 to 20 s, and nowhere "
        "from 20 s on."
    )
    assert (
        "| from 10 to 20 s | head + ZO | 0.500 ± 0.100 | head | 1.000 ± 0.100 | **hybrid** |"
        in text
    )
    text = comparisons.where(made[2:], "test loss", "seconds")
    assert "no hybrid is best by more than the spread, whatever the seconds" in text
    assert comparisons.where(made[:1], "test loss", "seconds") == ""
    assert comparisons.where(made[1:2], "test loss", "seconds") == ""


spent = st.integers(1, 6).map(float)
losses = st.tuples(*[st.integers(0, 8).map(lambda i: i / 4)] * 2)
some = st.lists(
    st.builds(Point, st.text("abc", max_size=2), st.booleans(), spent, losses), min_size=1
)


@given(some)
def test_regions_agree_with_a_look_at_every_amount(made):
    found = regions(made)
    assert found[-1].below == math.inf
    assert [part.below for part in found[:-1]] == [part.least for part in found[1:]]
    assert all(before[2:] != after[2:] for before, after in pairwise(found))
    for amount in range(8):
        best = {}
        for p in made:
            if p.spent <= amount:
                best[p.hybrid] = min(best.get(p.hybrid, math.inf), statistics.fmean(p.losses))
        region = next((part for part in found if part.least <= amount < part.below), None)
        assert (region is None) == (not best)
        if region is not None:
            own = {True: region.hybrid, False: region.other}
            assert best == {which: p.mean for which, p in own.items() if p is not None}


@given(some)
def test_a_front_falls_and_is_below_no_point(made):
    found = plots.front(made)
    assert found == sorted(found)
    means = [mean for _, mean in found]
    assert means == sorted(means, reverse=True)
    for p in made:
        assert min(mean for amount, mean in found if amount <= p.spent) <= p.mean
