"""perturbation="streamed": every way in which a function takes a weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from streamed_models import Around, Call, assert_matches, frozen, randn, score, tokens
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, grad * x


class ScaleWithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return w.mul(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, grad * x


def assigned(x, w):
    out = torch.zeros(4, 4)
    out[1:3] = w[1:3]
    out[0] += w[0]
    return out


def iterated(x, w):
    first, *rest = w
    return first * 2 + sum(rest)


def filled(x, w):
    out = torch.empty(4, 4)
    torch.mul(x, w, out=out)
    return out.addmm_(w, w.T).masked_fill_(w > 0.3, w[0, 0])


def through_grad(x, w):
    return torch.func.grad(lambda x: (x @ w).tanh().sum())(x)


def through_jacobian(x, w):
    return torch.func.jacfwd(lambda x: (w * x).sum(0))(x)


CALLS = {
    "x @ w": lambda x, w: x @ w,
    "w @ x": lambda x, w: w @ x,
    "w * x": lambda x, w: w * x,
    "x + w": lambda x, w: x + w,
    "1 / w": lambda x, w: 1 / (w + 9),
    "w ** 2": lambda x, w: w**2,
    "2 ** w": lambda x, w: 2**w,
    "-w, abs": lambda x, w: -w.abs(),
    "comparison": lambda x, w: torch.where(w > x, w, x) * (w != 0),
    "w.t()": lambda x, w: x @ w.t(),
    "w.T": lambda x, w: x @ w.T,
    "w.mT": lambda x, w: x @ w.mT,
    "w.H": lambda x, w: x @ w.H,
    "w.real": lambda x, w: x @ w.real,
    "w[...]": lambda x, w: x[1:] * w[1:] + w[..., 0] + w[torch.tensor([1])],
    "w[None]": lambda x, w: w[None] + w[:, None],
    "x[index] of w": lambda x, w: w[tokens(5, high=4)],
    "view": lambda x, w: w.view(2, 8) @ w.view(8, 2),
    "views of a view": lambda x, w: w.view(-1)[3:].reshape(-1).unfold(0, 2, 1),
    "as_strided": lambda x, w: torch.as_strided(w, (3, 3), w.stride()),
    "expand": lambda x, w: x * w[0].expand(4, 4),
    "einsum": lambda x, w: torch.einsum("ij,kj,kl->il", x, w, w),
    "einsum of a list": lambda x, w: torch.einsum("ij,jk->ik", [x, w]),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=1),
    "matmul by keyword": lambda x, w: torch.matmul(input=x, other=w),
    "linear by keyword": lambda x, w: F.linear(x, weight=w, bias=w[0]),
    "the same weight twice": lambda x, w: torch.addmm(w, w, w),
    "cat": lambda x, w: torch.cat([w, x, w]),
    "cat by keyword": lambda x, w: torch.cat(tensors=(x, w), dim=1),
    "stack of a tuple": lambda x, w: torch.stack((w, x)),
    "chain_matmul": lambda x, w: torch.linalg.multi_dot([x, w, w.t(), w]),
    "block_diag": lambda x, w: torch.block_diag(w, x),
    "meshgrid": lambda x, w: torch.meshgrid(w[0], x[0], indexing="ij")[0],
    "foreach": lambda x, w: torch.stack(torch._foreach_mul([x, w], [w, w])),
    "broadcast": lambda x, w: torch.broadcast_tensors(w, x[None])[0],
    "iteration": iterated,
    "assignment from w": assigned,
    "x.add_(w)": lambda x, w: x.clone().add_(w),
    "x += w": lambda x, w: torch.zeros(4, 4).__iadd__(w),
    "x.copy_(w)": lambda x, w: torch.empty(4, 4).copy_(w),
    "x.data = w": lambda x, w: setattr(out := torch.empty(4, 4), "data", w) or out,  # type: ignore[func-returns-value]
    "out=x": filled,
    ".to(dtype)": lambda x, w: x.bfloat16() @ w.to(torch.bfloat16),
    ".to(same)": lambda x, w: x @ w.to(w.device, w.dtype).contiguous(),
    ".type_as": lambda x, w: w.type_as(x.double()).float() + w.double().float(),
    ".half()": lambda x, w: w.half() * 3,
    ".data": lambda x, w: x @ w.data,
    ".data.T": lambda x, w: w.data.T @ x,
    ".detach()": lambda x, w: x @ w.detach().clone(),
    "a new Parameter of .data": lambda x, w: x @ Parameter(w.data),
    ".item()": lambda x, w: x * w[0, 0].item() + w.mean().item(),
    ".tolist()": lambda x, w: torch.tensor(w.tolist()),
    ".numpy()": lambda x, w: torch.from_numpy(w.numpy() * 2),
    "float()": lambda x, w: x * float(w.sum()),
    "norm": lambda x, w: w / w.norm(dim=0, keepdim=True),
    "softmax": lambda x, w: F.softmax(w, dim=-1) * w.logsumexp(0),
    "topk": lambda x, w: w.topk(2).values,
    "sdpa": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], (x @ w)[None]),
    "sdpa by keyword": lambda x, w: F.scaled_dot_product_attention(
        query=w[None], key=x[None], value=x[None], is_causal=True
    ),
    "embedding": lambda x, w: F.embedding(tokens(5, high=4), w, padding_idx=1),
    "dropout": lambda x, w: F.dropout(w, 0.5),
    "autograd function": lambda x, w: Scale.apply(x, w),
    "autograd function with setup": lambda x, w: ScaleWithSetup.apply(x, w),
    "vmap": lambda x, w: torch.vmap(lambda row: w @ row)(x),
    "vmap of a chain": lambda x, w: torch.vmap(torch.vmap(lambda e: (e * w).sum()))(x),
    "func.grad": through_grad,
    "func.jacfwd": through_jacobian,
    "checkpoint": lambda x, w: checkpoint(lambda x: x @ w, x, use_reentrant=False),
    "reentrant checkpoint": lambda x, w: checkpoint(torch.matmul, x, w, use_reentrant=True),
    "state_dict": lambda x, w: nn.Module.state_dict(Call(None, w=w))["w"],
    "deepcopy": lambda x, w: copy.deepcopy(w) + copy.copy(w.data),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls(case):
    assert_matches(frozen(Call(CALLS[case], randn(4, 4), w=randn(4, 4))))


def test_lists_and_dicts_of_parameters():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.some = nn.ParameterList([randn(3, 3) for _ in range(3)])
            self.others = nn.ParameterDict({"a": randn(3, 3), "b": randn(3)})

        def forward(self):
            chain = torch.linalg.multi_dot([*self.some, self.others["a"]])
            stacked = torch.stack(tuple(self.some)) * self.others["b"]
            nested = torch.block_diag(*self.some, *self.others.values())
            return score(chain) + score(stacked) + score(nested)

    assert_matches(frozen(Lists()))


def test_functions_of_containers():
    """Functions that know __torch_function__ may take any structure."""

    def total(weights, *, more):
        tensors = (*weights[0], *weights[1], *more["list"])
        if torch.overrides.has_torch_function(tensors):
            return torch.overrides.handle_torch_function(total, tensors, weights, more=more)
        return sum(t.sum() * (i + 1) for i, t in enumerate(tensors))

    def call(a, b, c):
        return total([(a,), [b]], more={"list": [c, {"deep": a}["deep"]]})

    weights = {name: randn(2, 3, seed=i) for i, name in enumerate("abc")}
    assert_matches(frozen(Call(call, **weights)))


@pytest.mark.parametrize("tie", [False, True])
def test_functional_call(tie):
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterDict(
                {n.replace(".", "_"): p.detach().clone() for n, p in module.named_parameters()}
            )

        def forward(self):
            given = {n.replace("_", "."): p for n, p in self.weights.items()}
            if tie:
                given["2.weight"] = given["0.weight"] * 1
            return score(torch.func.functional_call(module, given, randn(5, 4)))

    assert_matches(frozen(Functional()))


def test_the_parameter_itself_as_the_loss():
    model = frozen(Call(None, w=torch.tensor(1.5)))
    assert_matches(model, lambda model: model.w)


def test_scalars_empty_and_unused_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar, self.empty = Parameter(torch.ones(())), Parameter(torch.ones(0, 3))
            self.unused = Parameter(torch.ones(5))

        def forward(self):
            return self.scalar * torch.cat([self.empty, randn(2, 3)]).sum()

    model = frozen(Odd())
    assert_matches(model)
    assert not torch.equal(model.unused, frozen(Odd()).unused)


def test_dropout_draws_the_same_in_all_evaluations():
    model = frozen(Around(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)),
                          randn(5, 4)))  # fmt: skip
    torch.manual_seed(3)
    assert_matches(model)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(3):
        model()
    assert torch.equal(torch.get_rng_state(), after)
