"""The compiled Triton kernels on a GPU: what comes from integers has the bits of the CPU.

That is signs, rounding bits, and all arithmetic on signs. The first run compiles some hundred
variants.
"""

import importlib
import math
import random

import pytest
import torch
from arranged import NARROW, PIECE, RADEMACHER, RUNS, TENSORS, Arranged, alike, of_each
from conftest import same_bits, weights
from hypothesis import given
from hypothesis import strategies as st
from on_gpu import DEVICE, ON_GPU, SIGNS, to_gpu

from zofo_kernels import (
    DISTRIBUTIONS,
    DTYPES,
    Direction,
    Shift,
    Weights,
    noise,
    perturb_,
    perturbed,
    update_,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def kernels():
    module = importlib.import_module("zofo_kernels.triton")
    assert not module.INTERPRETED
    return module


@given(TENSORS, SIGNS, SIGNS, st.sampled_from(["perturb", "both", "recover"]))
def test_perturbing_along_signs_has_the_bits_of_the_cpu(tensors, direction, other, mode):
    """NaN and infinite weights too; nothing beside the tensors is written."""
    before = [weights((t["size"],), t["dtype"], i) for i, t in enumerate(tensors)]
    for w in before:
        w[5::300] = torch.tensor(math.nan)
        w[6::300] = torch.tensor(math.inf)
        w[7::300] = torch.tensor(-math.inf)
    place = {"indices": of_each(tensors, "index"), "offsets": of_each(tensors, "offset")}
    arranged = Arranged(before, of_each(tensors, "shift"), DEVICE)
    for group in (arranged.tensors, before):
        recover = None if mode == "perturb" else Shift(other, 0.25)
        added = None if mode == "recover" else direction
        perturb_(group, added, -0.37, recover=recover, **place)
    assert all(alike(a.cpu(), b) for a, b in zip(arranged.tensors, before, strict=True))
    assert arranged.rest_is_untouched()


@given(
    TENSORS,
    st.lists(SIGNS, min_size=1, max_size=3),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(["nothing", "the same", "another"]),
    st.sampled_from(["nearest", "stochastic"]),
)
def test_updates_along_signs_have_the_bits_of_the_cpu(
    tensors, directions, weight_decay, carried, rounding
):
    """So the rounding bits are the same as well."""
    before = [weights((t["size"],), t["dtype"], i, 0.02) for i, t in enumerate(tensors)]
    place = {"indices": of_each(tensors, "index"), "offsets": of_each(tensors, "offset")}
    arranged = Arranged(before, of_each(tensors, "shift"), DEVICE)
    coefficients = weights((len(directions),), torch.float32, 5, 1.0)
    shift = Shift(RADEMACHER if carried == "another" else directions[0], 1e-3)
    for group in (arranged.tensors, before):
        update_(
            group,
            directions,
            coefficients,
            1e-3,
            weight_decay=weight_decay,
            recover=None if carried == "nothing" else shift,
            rounding=rounding,
            **place,
        )
    assert all(same_bits(a.cpu(), b) for a, b in zip(arranged.tensors, before, strict=True))
    assert arranged.rest_is_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 77, 2**31 - 640, 2**39 - 1000, 2**62])
def test_signs_are_those_of_the_cpu(dtype, offset):
    for index, direction in ((0, RADEMACHER), (2**32 - 1, Direction(9, 2**63, 4, "rademacher"))):
        place = {"index": index, "offset": offset, "dtype": dtype}
        z = noise((3, 333_347), direction, **place, **ON_GPU)
        assert z.device.type == DEVICE
        assert same_bits(z.cpu(), noise((3, 333_347), direction, **place))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_16_bit_weight_has_the_bits_of_the_cpu(dtype):
    """Subnormal, on a tie, infinite; shifted and moved by nothing, by little and by much."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).repeat(4)
    for scale in (0.0, 1e-40, 2.0**-24, 2.0**-12, 1e-3, 0.3, 3e4, 3e38):
        shifted = perturbed(w.to(DEVICE), RADEMACHER, scale, backend="triton").cpu()
        assert alike(shifted, perturbed(w, RADEMACHER, scale))
        for rounding in ("nearest", "stochastic"):
            results = []
            for group in (to_gpu([w]), [w.clone()]):
                one = torch.ones(1)
                update_(group, [RADEMACHER], one, scale, weight_decay=0.1, rounding=rounding)
                results.append(group[0].cpu())
            assert alike(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_and_huge_wide_weights_have_the_bits_of_the_cpu(dtype):
    limits = torch.finfo(dtype)
    values = [limits.tiny, limits.tiny / 3, limits.tiny * limits.eps, limits.max, 1.0, 0.0]
    w = torch.tensor([v for x in values for v in (x, -x)], dtype=torch.float64).to(dtype)
    w = w.repeat(100)
    for scale in (0.0, 1e-40, limits.tiny if dtype == torch.float32 else 1e-38, 1.0, 3e38):
        results = []
        for group in (to_gpu([w]), [w.clone()]):
            perturb_(group, RADEMACHER, scale)
            update_(group, [RADEMACHER], torch.ones(1), scale, recover=Shift(RADEMACHER, 1e-39))
            results.append(group[0].cpu())
        assert alike(*results)


@given(RUNS)
def test_keys_made_on_the_device(kernels, runs):
    directions = [
        Direction(seed, step, sample + i, distribution)
        for seed, step, sample, distribution, count in runs
        for step in [step.to(DEVICE) if isinstance(step, torch.Tensor) else step]
        for i in range(count)
    ]
    keys = kernels._device_keys(directions, torch.device(DEVICE)).cpu()
    low, high, kind, _ = (keys.long() & 0xFFFFFFFF).T.tolist()
    assert list(zip(low, high, strict=True)) == [d.key() for d in directions]
    assert kind == [DISTRIBUTIONS.index(d.distribution) for d in directions]


@pytest.mark.parametrize("samples", [1, 2, 70])
def test_updates_along_many_directions(samples):
    directions = [RADEMACHER._replace(sample=s) for s in range(samples)]
    coefficients, results = weights((samples,), torch.float32, 5, 1.0), []
    for device in (DEVICE, "cpu"):
        w = [weights((n,), dtype, n).to(device) for n in (9000, 131) for dtype in DTYPES]
        update_(w, directions, coefficients.to(device), 0.01, recover=Shift(directions[-1], 0.1))
        results.append([x.cpu() for x in w])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_coefficients_and_lr_of_every_dtype_layout_and_place(dtype, samples):
    directions = [RADEMACHER._replace(sample=s) for s in range(samples)]
    for kind in DTYPES:
        dense = torch.tensor([0.7, -0.2, 1 / 3])[:samples].to(kind)
        strided = dense.repeat_interleave(2)[::2]
        rate = torch.tensor([0.1], dtype=kind)
        for coefficients, lr in (
            (dense, 0.1),
            (strided, rate),
            (dense.to(DEVICE), torch.tensor(2, device=DEVICE)),
            (dense.to(DEVICE).repeat_interleave(2)[::2], rate.to(DEVICE)),
        ):
            w = weights((200,), dtype)
            on_gpu = w.to(DEVICE)
            update_([on_gpu], directions, coefficients, lr, backend="triton")
            lr = lr.cpu() if isinstance(lr, torch.Tensor) else lr
            update_([w], directions, coefficients.cpu(), lr)
            assert same_bits(on_gpu.cpu(), w)


def test_a_thousand_tensors_in_one_call():
    generator = random.Random(0)
    tensors, offsets = [], []
    for i in range(1000):
        size = generator.choice([1, 8, 64, 100, 768, PIECE, 3 * PIECE + 1])
        tensors.append(weights((size,), generator.choice(DTYPES), i))
        offsets.append(generator.choice([0, 128, 7, 2**40]))
    on_gpu = to_gpu(tensors)
    for group in (on_gpu, tensors):
        kept = Weights(group, offsets=offsets)
        perturb_(kept, RADEMACHER, 1e-3)
        perturb_(kept, RADEMACHER, -1e-3, recover=Shift(RADEMACHER, 1e-3))
        update_(kept, [RADEMACHER], torch.ones(1), 1e-4, recover=Shift(RADEMACHER, -1e-3))
    assert all(same_bits(a.cpu(), b) for a, b in zip(on_gpu, tensors, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    w = weights((65, 129, 3), dtype)
    results = []
    for base in (w.to(DEVICE), w.clone()):
        views = [base[..., 0].t(), base[:33, ::2, 1], base[40:, 5, 1], base[33:40, 1:70, 1:]]
        kept = Weights(views)
        for step in range(2):  # copies must not be kept
            direction = Direction(1, step, 0, "rademacher")
            perturb_(kept, direction, 0.1)
            update_(kept, [direction], torch.ones(1), 1e-2, recover=Shift(direction, 0.1))
            base.mul_(2)
        copies = [perturbed(view, RADEMACHER, 0.25) for view in views]
        assert all(copy.is_contiguous() for copy in copies)
        results.append([base.cpu(), *(copy.cpu() for copy in copies)])
    assert all(map(same_bits, *results))
