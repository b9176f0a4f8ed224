"""perturbation="streamed": parts of a weight, as one expert of a stack, are perturbed alone."""

import pytest
import torch
import torch.nn.functional as F
from streamed_models import Call, assert_matches, frozen, randn, score, trained

from zofo_kernels import DISTRIBUTIONS, DTYPES
from zofo_optim.perturbation import streaming

EXPERTS, SIZE = 5, (6, 7)


@pytest.fixture
def perturbed(monkeypatch):
    """Lists the elements of each perturbed copy."""
    sizes, original = [], streaming.perturbed

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(streaming, "perturbed", counting)
    return sizes


def of_a_step(model, perturbed, loss=lambda model: model()):
    """What one step perturbs, after steps that match weights that are really perturbed."""
    optimizer = assert_matches(model, loss)
    del perturbed[:]
    optimizer.step(lambda: loss(model))
    return perturbed


def mixture(w, b):
    """Every other expert, as transformers' mixtures of experts take those that are hit."""
    x = randn(3, 7, seed=9).to(w.dtype)
    hit = torch.arange(0, EXPERTS, 2)
    return sum(F.linear(x, w[one]) + b[one] for one in hit)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_of_a_stack_are_perturbed_alone(dtype, distribution, perturbed):
    model = frozen(Call(mixture, w=randn(EXPERTS, *SIZE), b=randn(EXPERTS, 6)), dtype)
    optimizer = assert_matches(model, distribution=distribution)
    del perturbed[:]
    optimizer.step(model)
    assert perturbed == 2 * 3 * [42, 6]


ALONE = {
    "a number": (lambda w: w[3], 42),
    "from the end": (lambda w: w[-1], 42),
    "a tensor": (lambda w: w[torch.tensor(2)], 42),
    "a short tensor": (lambda w: w[torch.tensor(2, dtype=torch.int16)], 42),
    "a row of one": (lambda w: w[1, 4], 7),
    "an element": (lambda w: w[1, 4, torch.tensor(2)], 1),
    "some": (lambda w: w[1:4], 3 * 42),
    "rows of one": (lambda w: w[2, 1:3], 14),
    "an ellipsis": (lambda w: w[2, ...], 42),
    "all": (lambda w: w[...], 210),
    "none": (lambda w: w[4:4], 0),
    "select": (lambda w: w.select(0, 2), 42),
    "torch.select": (lambda w: torch.select(w, 0, index=-2), 42),
    "narrow": (lambda w: w.narrow(0, 1, 2), 84),
    "torch.narrow": (lambda w: torch.narrow(w, dim=0, start=1, length=2), 84),
    "a part of a part": (lambda w: w[1][2], 42),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_one_run_of_elements_is(case, perturbed):
    take, size = ALONE[case]
    model = frozen(
        Call(
            lambda w: torch.cat([take(w).flatten(), w.square().sum().reshape(1)]),
            w=randn(EXPERTS, *SIZE),
        )
    )
    assert of_a_step(model, perturbed) == 2 * [size, 210]


WHOLE = {
    "columns": lambda w: w[:, 2],
    "a step": lambda w: w[::2],
    "several": lambda w: w[torch.tensor([1, 3])],
    "a mask": lambda w: w[torch.tensor([True, False, True, False, True])],
    "a new dimension": lambda w: w[None],
    "True": lambda w: w[True],
    "a list": lambda w: w[[1, 2]],
    "another dimension": lambda w: w.select(1, 2),
    "functorch": lambda w: torch.func.grad(lambda x: (w[2] * x).sum().sin())(torch.ones(7)),
    "iterated": lambda w: torch.stack([*w]),
}


@pytest.mark.parametrize("case", WHOLE)
def test_other_parts_are_taken_from_a_whole_copy(case, perturbed):
    model = frozen(Call(WHOLE[case], w=randn(EXPERTS, *SIZE)))
    assert of_a_step(model, perturbed) == 2 * [210]


def test_parts_of_strided_weights_are_taken_from_a_whole_copy(perturbed):
    model = frozen(Call(lambda w: w[1], w=randn(7, 6, 5).permute(2, 1, 0)))
    assert not model.w.is_contiguous()
    assert of_a_step(model, perturbed) == 2 * [210]


@pytest.mark.parametrize("offset", [1, 3])
def test_parts_of_a_weight_within_a_larger_memory(offset, perturbed):
    weight = torch.zeros(300)[offset : offset + 210].view(EXPERTS, *SIZE)
    model = frozen(Call(lambda w: w[3] * 2, w=weight))
    assert model.w.storage_offset() == offset
    assert of_a_step(model, perturbed) == 2 * [42]


@pytest.mark.parametrize("inner", [torch.enable_grad, torch.inference_mode])
def test_parts_in_gradient_modes_inside_the_closure(inner, perturbed):
    def loss(model):
        with inner():
            value = model().clone()
        return value.clone()

    model = frozen(Call(lambda w: w[2], w=randn(EXPERTS, *SIZE)))
    assert of_a_step(model, perturbed, loss) == 2 * [42]


def test_a_weight_that_is_also_used_in_another_way_is_named():
    model = frozen(Call(lambda w: w[2], w=randn(EXPERTS, *SIZE)))
    view = model.w.view(-1)
    with pytest.raises(RuntimeError, match=r": w; use"):
        trained(model).step(lambda: model() + score(view))


def test_errors_are_torchs_own():
    model = frozen(Call(lambda w: w[EXPERTS], w=randn(EXPERTS, *SIZE)))
    with pytest.raises(IndexError, match="out of bounds"):
        trained(model).step(model)
