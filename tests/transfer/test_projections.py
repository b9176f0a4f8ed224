"""Maps between activations: exact where one exists, the best of their kind elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_optim.transfer.projections import RIDGES, Projection, Rows, fit, selection

WIDTHS = st.integers(1, 7)
SEEDS = st.integers(0, 2**20)
OFFSETS = st.sampled_from(["none", "centred", "affine"])


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def rows(tensor, held=10):
    return Rows(tensor[held:], tensor[:held])


def linear_pair(seed, narrow, wide, offset):
    """Source, target, and the map and offset between them."""
    x, matrix, shift = drawn(seed, (50, narrow), (wide, narrow), (wide,))
    shift = shift * (offset != "none")
    return x + 1, (x + 1) @ matrix.T + shift, matrix, shift


@given(WIDTHS, WIDTHS, OFFSETS, SEEDS)
@settings(max_examples=40)
def test_least_squares_finds_a_linear_map(source, target, offset, seed):
    x, y, matrix, shift = linear_pair(seed, source, target, offset)
    found = fit(rows(x), rows(y), "least_squares", offset)
    torch.testing.assert_close(found.matrix, matrix, atol=1e-3, rtol=1e-3)
    assert found.error < 1e-3
    if offset == "affine":
        torch.testing.assert_close(found.offset, shift, atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(found(x), y, atol=5e-3, rtol=1e-3)
    else:
        assert found.offset is None


@given(WIDTHS, st.integers(1, 4), SEEDS)
@settings(max_examples=30)
def test_least_squares_within_a_subspace(narrow, more, seed):
    """A wide source that lives in a subspace: what tells the target is found there."""
    x, basis = drawn(seed, (50, narrow), (narrow + more, narrow))
    found = fit(rows(x @ basis.T), rows(x), "least_squares", "none")
    assert found.error < 1e-3


@given(WIDTHS, WIDTHS, OFFSETS, SEEDS)
@settings(max_examples=40)
def test_procrustes_is_semi_orthogonal_times_a_scale(source, target, offset, seed):
    x, y = drawn(seed, (50, source), (50, target))
    matrix = fit(rows(x), rows(y), "procrustes", offset).matrix
    assert matrix.shape == (target, source)
    gram = matrix.T @ matrix if source <= target else matrix @ matrix.T
    scale = gram.diagonal().mean()
    torch.testing.assert_close(gram, scale * torch.eye(len(gram)), atol=1e-5, rtol=1e-4)
    sizes = []
    for made in (fit(rows(x), rows(y), "procrustes", offset)(rows(x).fitted), rows(y).fitted):
        sizes.append(torch.linalg.vector_norm(made - made.mean(0) * (offset != "none")))
    torch.testing.assert_close(*sizes, atol=1e-4, rtol=1e-4)


@given(WIDTHS, WIDTHS, OFFSETS, st.sampled_from([0.5, 1.0, 3.0]), SEEDS)
@settings(max_examples=40)
def test_procrustes_finds_a_scaled_rotation(source, target, offset, scale, seed):
    """A narrowing one where the source lives in a subspace of the target's width."""
    wide, narrow = max(source, target), min(source, target)
    x, square = drawn(seed, (50, narrow), (wide, wide))
    basis = torch.linalg.qr(square)[0][:, :narrow]
    x, y = (x, scale * x @ basis.T) if source <= target else (x @ basis.T, scale * x)
    found = fit(rows(x), rows(y), "procrustes", offset)
    assert found.error < 1e-4
    assert fit(rows(x), rows(y), "least_squares", offset).error < 1e-3


@given(WIDTHS, st.integers(0, 4), SEEDS)
@settings(max_examples=30)
def test_procrustes_that_widens_is_the_best(narrow, more, seed):
    """Of its size, on the rows that it is fitted on; others are drawn near it and far from it."""
    x, y = drawn(seed, (50, narrow), (50, narrow + more))
    found = fit(rows(x), rows(y), "procrustes", "none").matrix

    def missed(matrix):
        return torch.linalg.vector_norm(rows(x).fitted @ matrix.T - rows(y).fitted)

    for spread in (0.01, 0.1, 1.0):
        (noise,) = drawn(seed + 1, found.shape)
        other = torch.linalg.qr(found + spread * noise)[0]
        for sign in (1, -1):
            size = torch.linalg.matrix_norm(found) / narrow**0.5
            assert missed(found) <= missed(sign * size * other) + 1e-4


@given(WIDTHS, WIDTHS, OFFSETS, SEEDS, st.integers(3, 60))
@settings(max_examples=40)
def test_the_ridge_is_the_best_on_held_rows(source, target, offset, seed, count):
    """Against the closed form for each, also where rows are too few, or tell nothing."""
    x, y = drawn(seed, (count + 10, source), (count + 10, target))
    found = fit(rows(x), rows(y), "least_squares", offset)
    a, b = rows(x).fitted.double(), rows(y).fitted.double()
    mean_a, mean_b = (m.mean(0) * (offset != "none") for m in (a, b))
    a, b, held, wanted = a - mean_a, b - mean_b, rows(x).held - mean_a, rows(y).held - mean_b
    for ridge in RIDGES[1:]:
        gram = a.T @ a
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(source, dtype=gram.dtype)
        matrix = torch.linalg.solve(gram, a.T @ b).T
        error = torch.linalg.vector_norm(held @ matrix.T - wanted)
        scale = torch.linalg.vector_norm(rows(y).held if offset == "affine" else wanted)
        assert found.error <= float(error / scale) * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("method", ["least_squares", "procrustes"])
@pytest.mark.parametrize("offset", ["none", "centred", "affine"])
def test_the_error_is_that_of_held_rows(method, offset):
    x, noise, matrix = drawn(0, (50, 3), (50, 5), (5, 3))
    source, target = rows(x), rows(x @ matrix.T + noise + 2)
    found = fit(source, target, method, offset)
    mapped, wanted = found(source.held), target.held
    if offset == "centred":
        mapped = mapped - found(source.fitted).mean(0)
        wanted = wanted - target.fitted.mean(0)
    expected = torch.linalg.vector_norm(mapped - wanted) / torch.linalg.vector_norm(wanted)
    assert found.error == pytest.approx(float(expected), rel=1e-4)


def test_selection():
    kept = selection(torch.tensor([3, 1]), of=4)
    assert isinstance(kept, Projection)
    assert kept(torch.arange(4.0)).tolist() == [3, 1]
    assert torch.equal(selection(None, of=3).matrix, torch.eye(3))
