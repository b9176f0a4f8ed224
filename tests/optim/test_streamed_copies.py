"""perturbation="streamed": how many copies are made, how long they live, and rows of embeddings."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from streamed_models import (
    MU,
    SEED,
    Around,
    Call,
    assert_matches,
    assert_same,
    contents,
    frozen,
    randn,
    score,
    tokens,
    trained,
)
from torch import nn
from torch.nn import Parameter

from zofo_kernels import DISTRIBUTIONS, DTYPES, Direction, perturbed, unavailable_reason
from zofo_optim.perturbation import streaming

# ---- copies -----------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch):
    """Weak references to all copies that were made, with how many lived when each was made."""
    made, alive = [], []
    original = streaming.Streaming._copy

    def counting(self, *args):
        alive.append(sum(reference() is not None for reference in made))
        copy = original(self, *args)
        made.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(streaming.Streaming, "_copy", counting)
    return made, alive


@pytest.mark.parametrize("bias", [False, True])
def test_a_copy_lives_as_long_as_its_call(copies, bias):
    made, alive = copies
    layers = [layer for _ in range(4) for layer in (nn.Linear(4, 4, bias=bias), nn.Tanh())]
    model = frozen(Around(nn.Sequential(*layers), randn(5, 4)))
    gc.disable()
    try:
        trained(model).step(model)
    finally:
        gc.enable()
    number = len(list(model.parameters()))
    assert len(made) == number * (2 + 1 + number)
    assert max(alive) == bias  # the weight of the same call
    assert all(reference() is None for reference in made)


def test_one_copy_a_call_for_a_weight_that_it_takes_twice(copies):
    made, _ = copies
    model = frozen(
        Call(lambda w: torch.cat([w, w]) + torch.addmm(w, w, w).repeat(2, 1), w=randn(3, 3))
    )
    optimizer = trained(model)
    optimizer.step(model)
    made.clear()
    optimizer.step(model)
    assert len(made) == 2 * 2


def test_metadata_makes_no_copies(copies):
    made, _ = copies
    model = frozen(Call(None, w=randn(3, 4), v=torch.ones(1)))

    def closure():
        w = model.w
        facts = [w.shape, w.dtype, w.device, w.ndim, w.layout, w.requires_grad, w.is_leaf, w.grad]
        facts += [w.size(), w.size(0), w.dim(), w.numel(), w.stride(), w.storage_offset(), len(w)]
        facts += [w.is_contiguous(), w.is_floating_point(), w.is_complex(), w.element_size()]
        facts += [torch.is_floating_point(w), torch.numel(w), w.nbytes, w.itemsize, hash(w)]
        facts += [w.is_cuda, w.is_sparse, w.is_quantized, w.is_meta, w.data_ptr(), w.get_device()]
        facts += [w.name, w._version, w.grad_fn, w.is_inference(), w.untyped_storage()]
        facts += [torch.empty_like(w), torch.zeros_like(w), w.new_zeros(2), w.new_empty(3)]
        w.requires_grad_(False)
        w.requires_grad = False
        w.grad = None
        assert isinstance(w, Parameter)
        return model.v.sum()

    optimizer = trained(model)
    optimizer.backward(closure)
    made.clear()
    optimizer.backward(closure)
    assert len(made) == 2


def test_nothing_is_streamed_outside_evaluations():
    model = frozen(Call(lambda w: w, w=randn(3)))
    optimizer = trained(model, estimator="one_sided")
    points = []
    optimizer.backward(lambda: points.append(model.w.clone()) or model())
    assert torch.equal(points[0], model.w)
    assert all(torch.equal(p, points[1]) for p in points[1:])
    assert not torch.equal(points[0], points[1])
    z = (points[1] - points[0]) / MU
    torch.testing.assert_close(z.abs(), torch.ones(3), rtol=0, atol=1e-4)


# ---- rows of embeddings -----------------------------------------------------------------------


WIDE = (600, 64)  # six rows cost less than a copy


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 130])
def test_rows_are_those_of_the_whole(width, dtype, distribution, backend):
    if unavailable_reason(backend):
        pytest.skip(unavailable_reason(backend))
    direction = Direction(SEED, 3, 1, distribution)
    dense = randn(50, width, dtype=dtype)
    layouts = [dense, dense.t().contiguous().t(), randn(100, 2 * width, dtype=dtype)[::2, ::2]]
    layouts.append(torch.complex(dense.double(), dense.double()).conj().imag)
    for w in layouts[: None if dtype == torch.float64 else 3]:
        before = w.clone()
        options = {"index": 2, "offset": 11, "backend": backend}
        whole = perturbed(w, direction, 0.25, **options)
        for ids in (tokens(3, 4, high=50), tokens(high=50), tokens(0), tokens(9, high=50)[::2]):
            for kind in (torch.int64, torch.int32):
                found = perturbed(w, direction, 0.25, rows=ids.to(kind), **options)
                assert same_bits(found, F.embedding(ids, whole))
        assert same_bits(w, before)


class Embedded(nn.Module):
    """The embedding's output, and with ``tied`` the loss of a head of the same weight."""

    def __init__(self, ids, tied=False, **options):
        super().__init__()
        self.embedding = nn.Embedding(*WIDE, **options)
        self.ids, self.tied = ids, tied

    def forward(self):
        x = self.embedding(self.ids)
        if not self.tied:
            return score(x)
        scores = F.linear(x.flatten(0, -2), self.embedding.weight)
        return F.cross_entropy(scores.float(), self.ids.flatten())


EMBEDDINGS = {
    "plain": {},
    "padding_idx": {"padding_idx": 3},
    "sparse": {"sparse": True},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "tied": {"tied": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_few_rows_of_an_embedding_are_perturbed_alone(case, distribution, dtype, copies):
    made, _ = copies
    model = frozen(Embedded(torch.tensor([[3, 5, 599], [0, 5, 3]]), **EMBEDDINGS[case]), dtype)
    optimizer = assert_matches(model, distribution=distribution)
    made.clear()
    optimizer.step(model)
    assert len(made) == 2 * (case == "tied")


@pytest.mark.parametrize("inner", [torch.enable_grad, torch.inference_mode])
def test_rows_in_gradient_modes_inside_the_closure(inner, copies):
    made, _ = copies
    model = frozen(Embedded(tokens(6, high=600).int()))

    def loss(model):
        with inner():
            value = model().clone()
        return value.clone()

    optimizer = assert_matches(model, loss)
    made.clear()
    optimizer.step(lambda: loss(model))
    assert not made


def test_rows_may_be_changed_by_the_closure():
    model = frozen(
        Call(lambda w: F.embedding(tokens(6, high=600), w).mul_(2).relu_(), w=randn(*WIDE))
    )
    assert_matches(model)


WHOLE = {
    "many rows": lambda w: F.embedding(tokens(40, high=600), w),
    "bag": lambda w: F.embedding_bag(tokens(2, 3, high=600), w),
    "torch.embedding": lambda w: torch.embedding(w, tokens(6, high=600)),
    "indexing": lambda w: w[tokens(6, high=600)],
    "vmap": lambda w: torch.vmap(lambda ids: F.embedding(ids, w))(tokens(2, 3, high=600)),
    "functorch": lambda w: torch.func.grad(
        lambda x: (F.embedding(tokens(6, high=600), w) * x).sum().sin()
    )(torch.ones(64)),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_embeddings_elsewhere(case, copies):
    made, _ = copies
    model = frozen(Call(WHOLE[case], w=randn(*WIDE)))
    optimizer = assert_matches(model)
    made.clear()
    optimizer.step(model)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"input": [600]}, IndexError, "out of range"),
        ({"input": [-1]}, IndexError, "out of range"),
        ({"input": [1], "padding_idx": 600}, AssertionError, "Padding_idx"),
        ({"input": [1.0]}, RuntimeError, "indices"),
        ({"input": [1], "max_norm": 1e-3}, RuntimeError, "must not write"),
    ],
)
def test_errors_of_embeddings_are_torchs_own(arguments, error, match):
    ids = torch.tensor(arguments.pop("input"))
    model = frozen(Call(lambda w: F.embedding(ids, weight=w, **arguments), w=randn(*WIDE)))
    before = contents(model)
    with pytest.raises(error, match=match):
        trained(model).step(model)
    assert_same(model, before)


def test_an_embedding_that_is_hidden_too_is_named():
    model = frozen(Embedded(tokens(6, high=600)))
    view = model.embedding.weight.view(-1)
    with pytest.raises(RuntimeError, match=r": embedding\.weight; use"):
        trained(model).step(lambda: model() + view.sum())
