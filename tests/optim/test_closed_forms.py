"""Closed forms of low-rank directions: what torch functions give where weights are displaced."""

import functools

import pytest
import torch
import torch.nn.functional as F
from low_rank import PER_EXAMPLE, Seen, copies, named, optimizer_of, randn, wanted

from zofo_optim.perturbation import closed_forms

B = 3
IDS = torch.tensor([[0, 4, 2, 2], [5, 2, 1, 0], [3, 3, 5, 1]])


def x_of(*shape, seed=50):
    return randn(*shape, seed=seed)


def weight(*shape, seed=1):
    return randn(*shape, seed=seed)


def like(w):
    """An input in the dtype of a weight."""
    return lambda *shape, seed=50: x_of(*shape, seed=seed).to(w.dtype)


W, V, BIAS, N = weight(4, 5), weight(5, 4, seed=2), weight(4, seed=3), weight(5, seed=4)
SHARED = {
    "linear": (lambda w, b: F.linear(like(w)(B, 5), w, b), dict(w=W, b=BIAS)),
    "linear without bias": (lambda w: F.linear(like(w)(B, 5), w), dict(w=W)),
    "linear by keywords": (
        lambda w, b: F.linear(input=like(w)(B, 5), weight=w, bias=b),
        dict(w=W, b=BIAS),
    ),
    "linear of 3 dimensions": (lambda w, b: F.linear(like(w)(B, 2, 5), w, b), dict(w=W, b=BIAS)),
    "linear of 4 dimensions": (lambda w: F.linear(like(w)(B, 2, 3, 5), w), dict(w=W)),
    "linear of flattened rows": (
        lambda w, b: F.linear(like(w)(B * 4, 5), w, b).view(B, 4, 4),
        dict(w=W, b=BIAS),
    ),
    "linear of strided inputs": (
        lambda w, b: F.linear(like(w)(B, 5, 2).transpose(1, 2), w, b),
        dict(w=W, b=BIAS),
    ),
    "linear with a fixed bias": (lambda w: F.linear(like(w)(B, 5), w, BIAS.to(w.dtype)), dict(w=W)),
    "linear of a strided weight": (lambda w: F.linear(like(w)(B, 5), w), dict(w=V.t())),
    "a tied head": (
        lambda w: F.linear(F.embedding(IDS, w).tanh(), w),
        dict(w=weight(6, 5)),
    ),
    "addmm": (lambda b, v: torch.addmm(b, like(v)(B * 2, 5), v).view(B, 8), dict(b=BIAS, v=V)),
    "addmm with a fixed bias": (
        lambda v: torch.addmm(BIAS.to(v.dtype), like(v)(B * 2, 5), v).view(B, 8),
        dict(v=V),
    ),
    "matmul": (lambda v: torch.matmul(like(v)(B, 2, 5), v), dict(v=V)),
    "matmul method": (lambda v: like(v)(B, 2, 5).matmul(v), dict(v=V)),
    "@": (lambda v: like(v)(B, 5) @ v, dict(v=V)),
    "mm": (lambda v: torch.mm(like(v)(B, 5), v), dict(v=V)),
    "@ .T": (lambda w: like(w)(B, 2, 5) @ w.T, dict(w=W)),
    "mm with .t()": (lambda w: torch.mm(like(w)(B, 5), w.t()), dict(w=W)),
    "matmul with .mT": (lambda w: like(w)(B, 2, 5).matmul(w.mT), dict(w=W)),
    "addmm with transpose": (
        lambda b, w: torch.addmm(b, like(w)(B, 5), w.transpose(0, 1)),
        dict(b=BIAS, w=W),
    ),
    "linear with swapaxes": (lambda v: F.linear(like(v)(B, 5), v.swapaxes(-1, -2)), dict(v=V)),
    "a tied head by .T": (
        lambda w: F.embedding(IDS, w).tanh() @ torch.t(w),
        dict(w=weight(6, 5)),
    ),
    "embedding": (lambda w: F.embedding(IDS, w), dict(w=weight(6, 5))),
    "embedding with padding": (
        lambda w: F.embedding(IDS, w, padding_idx=0),
        dict(w=weight(6, 5)),
    ),
    "embedding of an id an example": (lambda w: F.embedding(IDS[:, 0], w), dict(w=weight(6, 5))),
    "embedding of int32": (lambda w: F.embedding(IDS.int(), w), dict(w=weight(6, 5))),
}
CONVOLUTIONS = {
    "conv2d": (
        lambda w, b: F.conv2d(like(w)(B, 2, 6, 5), w, b, stride=2, padding=1),
        dict(w=weight(4, 2, 3, 2), b=BIAS),
    ),
    "conv2d without bias": (
        lambda w: F.conv2d(like(w)(B, 2, 6, 5), w, None, (1, 2), "valid", dilation=2),
        dict(w=weight(4, 2, 3, 2)),
    ),
    "conv2d of one image": (
        lambda w: F.conv2d(like(w)(2, 6, 5), w, padding="same"),
        dict(w=weight(4, 2, 3, 2)),
    ),
    "conv3d": (
        lambda w, b: F.conv3d(like(w)(B, 2, 4, 4, 3), w, b, padding=1),
        dict(w=weight(4, 2, 2, 3, 2), b=BIAS),
    ),
}
VECTORS = {
    "addmm with a bias alone": (
        lambda c: torch.addmm(c, like(c)(B * 2, 4), W.to(c.dtype)).view(B, 2, 5),
        dict(c=N),
    ),
    "layer norm": (
        lambda n, c: F.layer_norm(like(n)(B, 2, 5), (5,), n, c, eps=1e-3),
        dict(n=N, c=weight(5, seed=9)),
    ),
    "layer norm without bias": (lambda n: F.layer_norm(like(n)(B, 2, 5), (5,), n), dict(n=N)),
    "layer norm with a bias alone": (
        lambda c: F.layer_norm(like(c)(B, 5), (5,), None, c),
        dict(c=N),
    ),
    "rms norm": (lambda n: F.rms_norm(like(n)(B, 2, 5), (5,), n, eps=1e-3), dict(n=N)),
    "weight times": (lambda n: n * like(n)(B, 2, 5), dict(n=N)),
    "times weight": (lambda n: torch.mul(like(n)(B, 2, 5), n), dict(n=N)),
    "mul method": (lambda n: like(n)(B, 5).mul(n), dict(n=N)),
    "add": (lambda n: like(n)(B, 2, 5) + n, dict(n=N)),
    "weight plus": (lambda n: torch.add(n, like(n)(B, 5)), dict(n=N)),
    "a bias alone": (lambda b: F.linear(like(b)(B, 5), W.to(b.dtype), b), dict(b=BIAS)),
    "a single output": (
        lambda w, b: F.linear(like(w)(B, 2, 5), w, b),
        dict(w=weight(1, 5), b=weight(1)),
    ),
    "a single input": (lambda w: F.linear(like(w)(B, 1), w), dict(w=weight(4, 1))),
}
ROOM = {torch.float64: 1e-12, torch.float32: 1e-5}


def check(patch, function, parts, dtype, rows, **options):
    """Every output of a step; and that no copy of a matrix was made."""
    params = named({name: part.to(dtype) for name, part in parts.items()})
    seen = Seen(function, params, rows)
    optimizer = optimizer_of(params, **options)
    optimizer.backward(seen)  # and verify
    optimizer.zero_grad()
    seen.outputs.clear()
    with copies(patch) as copied:
        optimizer.backward(seen)
    assert copied == []
    signs = (1, -1) if rows is None else (0, 1)
    for sign, found in zip(signs, seen.outputs, strict=True):
        target = wanted(function, params, optimizer, sign, rows)
        torch.testing.assert_close(found, target, rtol=ROOM[dtype], atol=ROOM[dtype])
        assert sign == 0 or (found - function(**dict(params))).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [*SHARED, *CONVOLUTIONS, *VECTORS])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_shared_direction(monkeypatch, name, rank):
    function, parts = {**SHARED, **CONVOLUTIONS, **VECTORS}[name]
    for dtype in ROOM:
        check(monkeypatch, function, parts, dtype, None, rank=rank)


@pytest.mark.parametrize("name", [*SHARED, *VECTORS])
@pytest.mark.parametrize("rank", [1, 2])
def test_one_direction_an_example(monkeypatch, name, rank):
    function, parts = {**SHARED, **VECTORS}[name]
    options = dict(PER_EXAMPLE, estimator="one_sided")  # which knows how many examples there are
    for dtype in ROOM:
        check(monkeypatch, function, parts, dtype, B, rank=rank, **options)


def test_the_cases_use_every_form():
    """Of the functions that take a matrix, and of those that take vectors for each example."""
    used = set()

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            used.add(func)
            return func(*args, **(kwargs or {}))

    for function, parts in {**SHARED, **CONVOLUTIONS, **VECTORS}.values():
        params = dict(named(parts))
        with Functions():
            function(**params)
    forms = {closed_forms._FORMS[func] for func in used if func in closed_forms._FORMS}
    assert forms == set(closed_forms._FORMS.values())


# ---- what has no closed form -------------------------------------------------------------------


def packed_attention(w, b):
    """The weight of queries, keys and values in one."""
    x = like(w)(B, 2, 4).transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        *(x, x, x, 4, 2, w, b, None, None, False, 0.0, torch.eye(4, dtype=w.dtype), None),
        need_weights=False,
    )
    return out.transpose(0, 1)


COPIED = {
    "transposed": (lambda w: (w.t() @ like(w)(4, B)).t(), dict(w=W)),
    "transposed, then as it is": (lambda w: like(w)(B, 5) @ w.T.contiguous(), dict(w=W)),
    "transposed twice": (lambda w: F.linear(like(w)(B, 5), w.T.T), dict(w=W)),
    "transposed by keywords": (
        lambda w: like(w)(B, 5) @ w.transpose(dim0=0, dim1=1),
        dict(w=W),
    ),
    "einsum of a transposed": (
        lambda w: torch.einsum("bi,io->bo", like(w)(B, 5), w.T),
        dict(w=W),
    ),
    "scaled addmm of a transposed": (
        lambda b, w: torch.addmm(b, like(w)(B, 5), w.T, beta=2, alpha=0.5),
        dict(b=BIAS, w=W),
    ),
    "transposed with itself": (lambda v: like(v)(B, 5) @ (v @ v.T), dict(v=V)),
    "packed attention": (packed_attention, dict(w=weight(12, 4), b=weight(12, seed=6))),
    "mm by other keywords": (lambda v: torch.mm(like(v)(B, 5), mat2=v), dict(v=V)),
    "scaled addmm": (
        lambda b, v: torch.addmm(b, like(v)(B, 5), v, beta=2, alpha=0.5),
        dict(b=BIAS, v=V),
    ),
    "of another weight": (lambda p, w: F.linear(p, w), dict(p=weight(B, 5, seed=7), w=W)),
    "convolution of another weight": (
        lambda p, w: F.conv2d(p, w),
        dict(p=weight(B, 2, 4, 4, seed=7), w=weight(4, 2, 3, 2)),
    ),
    "grouped convolution": (
        lambda w: F.conv2d(like(w)(B, 4, 4, 4), w, groups=2),
        dict(w=weight(4, 2, 3, 2)),
    ),
    "a stack": (lambda w: torch.bmm(like(w)(B, 2, 4), w), dict(w=weight(B, 4, 5))),
    "out": (lambda v: torch.mm(like(v)(B, 5), v, out=torch.empty(B, 4, dtype=v.dtype)), dict(v=V)),
    "a sparse input": (lambda v: torch.mm(like(v)(B, 5).to_sparse(), v), dict(v=V)),
    "a nested input": (
        lambda w: F.linear(
            torch.nested.as_nested_tensor(list(like(w)(B, 2, 5))), w
        ).to_padded_tensor(0.0),
        dict(w=W),
    ),
    "a product with a vector": (lambda v: v @ like(v)(4), dict(v=V)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", COPIED)
def test_a_shared_direction_falls_back_to_a_copy(monkeypatch, name):
    function, parts = COPIED[name]
    params = named(parts)
    seen = Seen(function, params)
    optimizer = optimizer_of(params, rank=2)
    optimizer.backward(seen)
    seen.outputs.clear()
    with copies(monkeypatch) as copied:
        optimizer.backward(seen)
    assert copied
    for sign, found in zip((1, -1), seen.outputs, strict=True):
        target = wanted(function, params, optimizer, sign)
        torch.testing.assert_close(found, target, rtol=1e-12, atol=1e-12)


def test_writing_to_a_transposed_matrix_is_refused():
    params = named(dict(w=W))
    optimizer = optimizer_of(params)
    with pytest.raises(RuntimeError, match=r"must not write to .*'w'"):
        optimizer.step(lambda: params[0][1].T.mul_(2).sum())


def test_a_matrix_has_one_transposed_view():
    params = named(dict(w=W))
    seen = []

    def closure():
        seen[:] = [params[0][1].T, params[0][1].t()]
        return (like(W)(B, 5) @ seen[0]).sum()

    optimizer = optimizer_of(params)
    optimizer.step(closure)
    assert seen[0] is seen[1]


def test_what_is_known_of_a_transposed_matrix_takes_no_copy(monkeypatch):
    params = named(dict(w=W))

    def closure():
        w = params[0][1].T
        assert (w.shape, w.dtype, w.dim(), w.is_contiguous()) == ((5, 4), W.dtype, 2, False)
        return (like(w)(B, 5) @ w).sum()

    optimizer = optimizer_of(params)
    optimizer.step(closure)
    with copies(monkeypatch) as copied:
        optimizer.step(closure)
    assert copied == []


NO_FORM = {
    **{name: COPIED[name] for name in COPIED if name not in ("a product with a vector",)},
    "convolution": CONVOLUTIONS["conv2d"],
    "a vector's product": (lambda w: F.linear(like(w)(5), w).expand(B, 4), dict(w=W)),
    "a vector's product, unlike": (
        lambda w: F.linear(like(w)(6), w).expand(B, 4),
        dict(w=weight(4, 6)),
    ),
    "a number": (lambda w: F.embedding(torch.tensor(2), w).expand(B, 5), dict(w=W)),
    "positions": (lambda w: F.embedding(torch.arange(4)[None], w).expand(B, 4, 5), dict(w=W)),
    "a layer norm of the weight": (
        lambda w, n: F.linear(like(w)(B, 5), F.layer_norm(w, (5,), n)),
        dict(w=W, n=N),
    ),
    "a norm over two dimensions": (
        lambda n: F.layer_norm(like(n)(B, 2, 5), (2, 5), n),
        dict(n=weight(2, 5)),
    ),
    "minus": (lambda n: like(n)(B, 5) - n, dict(n=N)),
    "in place": (lambda n: like(n)(B, 5).mul_(n), dict(n=N)),
    "a batch's own position": (
        lambda w: F.linear(like(w)(2, B, 5), w).transpose(0, 1),
        dict(w=W),
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("name", NO_FORM)
def test_an_example_must_own_what_it_sees(name, estimator):
    """Named; and all is as it was, so that the same closure without it goes on."""
    function, parts = NO_FORM[name]
    params = named(parts)
    before = [p.detach().clone() for _, p in params]
    optimizer = optimizer_of(params, estimator=estimator, **PER_EXAMPLE)
    with pytest.raises(closed_forms.NoOwner) as found:
        optimizer.backward(Seen(function, params, B))
    assert any(f"{name!r} cannot have a direction for each" in str(found.value) for name in parts)
    assert "directions='shared'" in str(found.value)
    assert optimizer.accumulated is None
    for (_, p), old in zip(params, before, strict=True):
        assert torch.equal(p, old)


# ---- several steps, several groups, weights that change --------------------------------------


def test_factors_follow_the_step_on_the_device():
    """Its counter is one tensor that changes: directions that hold it look the same."""
    found = []
    for capturable in (False, True):
        params = named(dict(w=W.clone(), b=BIAS.clone()))
        seen = Seen(SHARED["linear"][0], params)
        optimizer = optimizer_of(params, capturable=capturable, lr=1e-3)
        state = optimizer.state_dict()
        state["param_groups"][0]["zo_step"] = 7
        for _ in range(2):
            optimizer.step(seen)
        optimizer.backward(seen)
        optimizer.load_state_dict(state)  # with another step, and no update between
        optimizer.backward(seen)
        found.append(([y.tolist() for y in seen.outputs], params[0][1].tolist()))
    assert found[0] == found[1]


def test_weights_of_another_dtype():
    """The same parameter, converted between two steps: memory is made anew."""
    function, parts = SHARED["linear"]
    params = named({name: part.float() for name, part in parts.items()})
    seen = Seen(function, params)
    optimizer = optimizer_of(params)
    optimizer.backward(seen)
    for _, p in params:
        p.data = p.data.double()
    seen.outputs.clear()
    optimizer.backward(seen)
    for sign, found in zip((1, -1), seen.outputs[:2], strict=True):
        target = wanted(function, params, optimizer, sign)
        torch.testing.assert_close(found, target, rtol=1e-12, atol=1e-12)


# ---- verification -----------------------------------------------------------------------------


def wrong(form):
    """The form, whose result is off by 1 %."""

    @functools.wraps(form)
    def off(*args, **kwargs):
        y = form(*args, **kwargs)
        return None if y is None else y * 1.01

    return off


def two_layers(w, b, v, c):
    return F.linear(F.linear(like(w)(B, 5), w, b).tanh() @ v, w, c)


LAYERS = dict(w=W, b=BIAS, v=weight(4, 5, seed=8), c=weight(4, seed=9))


@pytest.mark.parametrize(("func", "names"), [(F.linear, ["w"]), (torch.Tensor.matmul, ["v"])])
def test_a_wrong_closed_form_is_found(monkeypatch, func, names):
    """By its weights: biases, which are added there too, are not to blame."""
    monkeypatch.setitem(closed_forms._FORMS, func, wrong(closed_forms._FORMS[func]))
    monkeypatch.setitem(closed_forms._FORMS, torch.Tensor.__matmul__, closed_forms._FORMS[func])
    params = named(LAYERS)
    with pytest.raises(RuntimeError, match="by closed forms of low-rank directions") as found:
        optimizer_of(params).backward(Seen(two_layers, params))
    told = str(found.value).rpartition("product with them: ")[2].partition(";")[0]
    assert told.split(", ") == names


def test_a_wrong_closed_form_of_examples_is_found(monkeypatch):
    monkeypatch.setitem(closed_forms._FORMS, F.linear, wrong(closed_forms._FORMS[F.linear]))
    params = named(LAYERS)
    with pytest.raises(RuntimeError, match="example 2 has the loss"):
        optimizer_of(params, **PER_EXAMPLE).backward(Seen(two_layers, params, B))


@pytest.mark.parametrize("rows", [None, B])
@pytest.mark.parametrize("how", ["a view made before", "numpy"])
def test_uses_that_torch_functions_do_not_see_are_named(rows, how):
    params = named(LAYERS)
    v = dict(params)["v"]
    hidden, memory = v.detach(), v.detach().numpy()

    def function(w, b, v, c):
        weight = hidden if how == "a view made before" else torch.from_numpy(memory.copy())
        return two_layers(w, b, v, c) + 0.1 * (like(w)(B, 4, seed=60) @ weight)[:, :4]

    options = {} if rows is None else PER_EXAMPLE
    with pytest.raises(RuntimeError, match=r"reach the loss in another way .*: v; use"):
        optimizer_of(params, **options).backward(Seen(function, params, rows))


@pytest.mark.parametrize("rows", [None, B])
def test_verification_happens_once(rows):
    params = named(LAYERS)
    seen = Seen(two_layers, params, rows)
    options = {} if rows is None else PER_EXAMPLE
    optimizer = optimizer_of(params, estimator="one_sided", **options)
    optimizer.step(seen)
    first = len(seen.outputs)
    # once more; by copies (two in all for examples: at rest, alone); and each weight in turn
    assert first > 2 + 2
    for _ in range(3):
        optimizer.step(seen)
    assert len(seen.outputs) == first + 3 * 2
