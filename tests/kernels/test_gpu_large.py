"""Large tensors on a GPU: more elements than an int32 counts, and no memory beside them."""

import pytest
import torch
from arranged import GAUSSIAN, RADEMACHER
from conftest import same_bits
from on_gpu import DEVICE, memory_for

from zofo_kernels import Shift, Weights, perturb_, update_

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
def test_more_elements_than_an_int32_counts(shift):
    """Near its start and its end, and where numbers of elements or bytes reach 2^31."""
    size, offset, near = 2**31 + 4099, 2**35 - 2**20, 700
    memory_for(2 * (size + shift) + 2**29)
    whole = torch.zeros(size + shift, dtype=torch.bfloat16, device=DEVICE)
    kept = Weights([whole[shift:]], [5], [offset])
    starts = [0, 2**20 - near, 2**30 - near, 2**31 - near, 2**31 + 4096 - near, size - 2 * near]

    def at(start):
        return kept.tensors[0][start : start + 2 * near].cpu()

    def on_cpu(run, start, w, backend="auto"):
        run(Weights([w], [5], [offset + start]), backend)
        return w

    def signs(kept, backend):
        perturb_(kept, RADEMACHER, 0.3, backend=backend)
        shift = Shift(RADEMACHER, 0.3)
        perturb_(kept, RADEMACHER, -0.3, recover=shift, backend=backend)
        directions, shift = [RADEMACHER], Shift(RADEMACHER, -0.3)
        update_(kept, directions, torch.ones(1), 0.3, recover=shift, backend=backend)

    def normals(kept, backend):
        perturb_(kept, GAUSSIAN, 0.1, backend=backend)

    signs(kept, "triton")
    for start in starts:
        w = torch.zeros(at(start).numel(), dtype=torch.bfloat16)
        assert same_bits(at(start), on_cpu(signs, start, w))
    whole.zero_()
    normals(kept, "triton")
    for start in starts:
        w = torch.zeros(at(start).numel(), dtype=torch.bfloat16)
        expected = on_cpu(normals, start, w, "reference").double()
        assert ((at(start).double() - expected).abs() <= 2.0**-7 * expected.abs() + 5e-5).all()
    assert shift == 0 or whole[0] == 0


def test_passes_allocate_next_to_nothing():
    memory_for(2**30)
    kept = Weights([torch.zeros(2**27, dtype=torch.bfloat16, device=DEVICE)])
    coefficients = torch.ones(2, device=DEVICE)
    perturb_(kept, GAUSSIAN, 0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    perturb_(kept, GAUSSIAN, -0.1, recover=Shift(GAUSSIAN, 0.1))
    update_(kept, [GAUSSIAN, RADEMACHER], coefficients, 0.1, recover=Shift(GAUSSIAN, -0.1))
    assert torch.cuda.max_memory_allocated() - before < 2**16
