"""On a GPU the same directions are drawn, and give what the CPU gives."""

import pytest
from hessians import logistic

from zofo_optim.smoothness import measure_smoothness


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["finite_difference", "exact"])
def test_it_is_what_the_cpu_measures(method):
    here, there = (
        measure_smoothness(*logistic(device), directions=5, method=method)
        for device in ("cpu", "cuda")
    )
    for name, block in here.items():
        assert there[name].trace == pytest.approx(block.trace, rel=1e-4)
        assert there[name].frobenius == pytest.approx(block.frobenius, rel=1e-4)
        assert there[name].largest == pytest.approx(block.largest, rel=1e-3)
