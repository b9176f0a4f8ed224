"""Maps between activations: exact where one exists, the best of their kind elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo_optim.transfer.projections import RECENT, RIDGES, Fits, Projection, Rows, fit, selection

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


@pytest.mark.parametrize("offset", ["none", "centred", "affine"])
@pytest.mark.parametrize("method", ["least_squares", "procrustes"])
@pytest.mark.parametrize("wide", [3, 5])
def test_what_maps_share_is_computed_once(monkeypatch, method, offset, wide):
    """Of one source, for least squares; for procrustes, there and back. Maps are as before."""
    x, y, z = (rows(tensor) for tensor in drawn(0, (50, 3), (50, wide), (50, wide)))
    pairs = [(x, y), (y, x), (x, z), (z, x)]
    alone = [fit(*pair, method, offset) for pair in pairs]
    calls = []

    def counted(true):
        return lambda *args, **options: calls.append(1) or true(*args, **options)

    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, counted(getattr(torch.linalg, name)))
    fits = Fits()
    together = [fits.fit(*pair, method, offset) for pair in pairs]
    assert len(calls) == (3 if method == "least_squares" else 2)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.matrix, b.matrix)
        assert a.error == pytest.approx(b.error)


def test_sources_of_other_means_share_nothing():
    x, y, *_ = linear_pair(0, 3, 5, "none")
    (noise,), fits = drawn(1, y.shape), Fits()
    source, target = rows(x), rows(y + noise + 1)
    for method in ("least_squares", "procrustes"):
        found = [fits.fit(source, target, method, offset) for offset in ("none", "centred")]
        assert not torch.allclose(found[0].matrix, found[1].matrix)
        assert torch.equal(found[1].matrix, fit(source, target, method, "centred").matrix)


def test_few_are_kept():
    """Those asked for last: what is asked for again and again stays."""
    x, *others = (rows(tensor) for tensor in drawn(0, *[(50, 3)] * 9))
    fits = Fits()
    kept = []
    for other in others:
        fits.fit(x, other, "least_squares", "none")
        fits.fit(other, x, "least_squares", "none")
        kept.append(len(fits._recent))
        assert any(key[1] is x for key in fits._recent)
    assert max(kept) == RECENT


@pytest.mark.parametrize("method", ["least_squares", "procrustes"])
@pytest.mark.parametrize("which", [0, 1])
def test_activations_that_are_zero(method, which):
    """Have a map that is zero, not one that is infinite."""
    pair = [rows(tensor) for tensor in drawn(0, (50, 3), (50, 5))]
    pair[which] = Rows(*(0 * part for part in pair[which]))
    assert not fit(*pair, method, "none").matrix.any()
