"""The device of the GPU tests, and what several of them hold against it."""

import pytest
import torch
from arranged import DIRECTIONS

DEVICE = "cuda"
ON_GPU = {"device": DEVICE, "backend": "triton"}
SIGNS = DIRECTIONS.map(lambda direction: direction._replace(distribution="rademacher"))
SECOND = 2 * 10**9  # cycles of a GPU, about


def to_gpu(tensors):
    return [w.to(DEVICE) for w in tensors]


def memory_for(count):
    """Skip where the device has no room for ``count`` bytes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < count:
        pytest.skip(f"needs {count / 2**30:.0f} GiB of device memory, {free / 2**30:.1f} are free")
