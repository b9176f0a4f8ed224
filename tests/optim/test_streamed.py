"""perturbation="streamed": every way in which models use weights, and what cannot be seen."""

import copy
import gc
import os
import signal
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from zofo_kernels import DISTRIBUTIONS, DTYPES, Direction, perturbed, unavailable_reason, update_
from zofo_optim import HybridZOFO, hybrid_param_groups, streamed
from zofo_optim.evaluation import evaluate

MU, LR, SEED = 2.0**-7, 1e-2, 5


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(*shape, high=7, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def score(value):
    """A loss of any output, in which all elements count differently."""
    value = value.float()
    factors = torch.linspace(0.5, 1.5, max(value.numel(), 1))[: value.numel()]
    return (value.reshape(-1) * factors).sum()


class Call(nn.Module):
    """``function(x, **weights)`` as a module; keywords are parameters or modules."""

    def __init__(self, function, *inputs, **parts):
        super().__init__()
        self.function, self.inputs, self.names = function, inputs, list(parts)
        for name, part in parts.items():
            setattr(self, name, Parameter(part) if type(part) is torch.Tensor else part)

    def forward(self):
        return score(self.function(*self.inputs, **{n: getattr(self, n) for n in self.names}))


def frozen(model, dtype=None):
    """The same weights whatever ran before, not much smaller than 1, without gradients."""
    for index, p in enumerate(model.parameters()):
        if p.is_floating_point():
            p.data = p.data.copy_(0.3 + 0.2 * randn(*p.shape, seed=index))  # keeps the strides
    return model.to(dtype).requires_grad_(False)


def trained(model, **options):
    options = {"perturbation": "streamed", "distribution": "rademacher", "mu": MU} | options
    groups = hybrid_param_groups(model, zo={"lr": LR}, fo={"lr": LR}, verbose=False)
    return HybridZOFO(groups, seed=SEED, **options)


def contents(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model, expected):
    for (name, p), old in zip(model.named_parameters(), expected, strict=True):
        assert same_bits(p.detach(), old), name


def assert_matches(model, loss=lambda model: model(), *, steps=3, distribution="rademacher"):
    """Losses and weights of ``steps`` steps, against weights that are really perturbed."""
    simulated = copy.deepcopy(model)
    optimizer = trained(model, distribution=distribution)
    names = optimizer.param_groups[0]["param_names"]
    zo = [simulated.get_parameter(name) for name in names]
    fo = [p for p in simulated.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(fo, lr=LR) if fo else None
    for step in range(steps):
        seen, reference = [], []
        before, state = contents(model), torch.get_rng_state()

        def closure(seen=seen):
            value = loss(model)
            seen.append(value.detach().clone())
            return value

        optimizer.zero_grad()
        optimizer.backward(closure)
        assert_same(model, before)
        torch.set_rng_state(state)
        if sgd:
            sgd.zero_grad()
            evaluate(lambda: loss(simulated), gradients=True)
        direction = Direction(SEED, step, 0, distribution)
        kept = [p.detach().clone() for p in zo]
        for sign in (1, -1):
            torch.set_rng_state(state)
            for index, (p, old) in enumerate(zip(zo, kept, strict=True)):
                p.data.copy_(perturbed(old, direction, sign * MU, index=index))
            reference.append(evaluate(lambda: loss(simulated), gradients=False).loss)
            for p, old in zip(zo, kept, strict=True):
                p.data.copy_(old)
        plus, minus = seen[1 if fo else 0], seen[-1]
        assert torch.equal(plus.to(reference[0]), reference[0])
        assert torch.equal(minus.to(reference[1]), reference[1])
        assert not torch.equal(plus, minus)
        coefficient = ((reference[0] - reference[1]) / 2 / MU).reshape(1)
        assert torch.equal(optimizer.projected_grads.reshape(1), coefficient)
        optimizer.step()
        update_(zo, [direction], coefficient, LR)
        if sgd:
            assert any(p.grad is not None and p.grad.any() for p in fo)
            sgd.step()
        for (name, p), q in zip(model.named_parameters(), simulated.parameters(), strict=True):
            assert same_bits(p.detach(), q.detach()), name
    return optimizer


# ---- modules ----------------------------------------------------------------------------------

MODULES = {
    "linear": lambda: (nn.Linear(4, 3), randn(5, 4)),
    "linear 3d": lambda: (nn.Linear(4, 3, bias=False), randn(2, 5, 4)),
    "bilinear": lambda: (nn.Bilinear(3, 4, 2), randn(5, 3), randn(5, 4)),
    "embedding": lambda: (nn.Embedding(7, 4, padding_idx=0), tokens(2, 5)),
    "embedding bag": lambda: (nn.EmbeddingBag(7, 4, mode="sum"), tokens(2, 5)),
    "layer norm": lambda: (nn.LayerNorm(4), randn(5, 4)),
    "rms norm": lambda: (nn.RMSNorm(4), randn(5, 4)),
    "group norm": lambda: (nn.GroupNorm(2, 4), randn(5, 4, 3)),
    "instance norm": lambda: (nn.InstanceNorm1d(4, affine=True), randn(5, 4, 3)),
    "batch norm, train": lambda: (nn.BatchNorm1d(4), randn(5, 4)),
    "batch norm, eval": lambda: (nn.BatchNorm2d(4).eval(), randn(5, 4, 2, 2)),
    "conv 1d": lambda: (nn.Conv1d(2, 3, 3, padding="same"), randn(2, 2, 6)),
    "conv 2d": lambda: (nn.Conv2d(2, 4, 3, groups=2, padding_mode="circular"), randn(1, 2, 5, 5)),
    "conv 3d": lambda: (nn.Conv3d(1, 2, 2), randn(1, 1, 3, 3, 3)),
    "conv transposed 1d": lambda: (nn.ConvTranspose1d(2, 3, 3), randn(2, 2, 6)),
    "conv transposed 2d": lambda: (nn.ConvTranspose2d(2, 3, 3), randn(1, 2, 4, 4)),
    "prelu": lambda: (nn.PReLU(4), randn(5, 4)),
    "attention, train": lambda: (nn.MultiheadAttention(4, 2), *[randn(3, 2, 4)] * 3),
    "attention, eval": lambda: (
        nn.MultiheadAttention(4, 2, batch_first=True).eval(),
        *[randn(2, 3, 4)] * 3,
    ),
    "attention, kdim and bias_kv": lambda: (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        *(randn(3, 2, n) for n in (4, 3, 5)),
    ),
    "encoder layer, train": lambda: (
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5),
        randn(3, 2, 4),
    ),
    "encoder layer, eval": lambda: (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        randn(2, 3, 4),
    ),
    "decoder layer": lambda: (nn.TransformerDecoderLayer(4, 2, 8), *[randn(3, 2, 4)] * 2),
    "rnn cell": lambda: (nn.RNNCell(3, 4), randn(2, 3)),
    "lstm": lambda: (nn.LSTM(3, 4, 2, dropout=0.5, bidirectional=True), randn(5, 2, 3)),
    "lstm with projection": lambda: (nn.LSTM(3, 4, proj_size=2), randn(5, 2, 3)),
    "gru": lambda: (nn.GRU(3, 4, batch_first=True), randn(2, 5, 3)),
    "packed gru": lambda: (
        nn.GRU(3, 4),
        nn.utils.rnn.pack_padded_sequence(randn(5, 2, 3), torch.tensor([5, 3])),
    ),
    "adaptive softmax": lambda: (
        nn.AdaptiveLogSoftmaxWithLoss(4, 7, [2, 5]),
        randn(5, 4),
        tokens(5),
    ),
}  # fmt: skip


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


class Around(nn.Module):
    def __init__(self, module, *inputs):
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self):
        return score(first_tensor(self.module(*self.inputs)))


@pytest.mark.parametrize("case", MODULES)
def test_modules(case):
    module, *inputs = MODULES[case]()
    assert_matches(frozen(Around(module, *inputs)))


@pytest.mark.parametrize("case", ["linear", "conv 2d", "lstm", "embedding", "attention, eval"])
def test_gaussian_noise_too(case):
    module, *inputs = MODULES[case]()
    assert_matches(frozen(Around(module, *inputs)), distribution="gaussian")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["linear", "conv 1d", "layer norm"])
def test_weights_of_other_dtypes(case, dtype):
    module, x = MODULES[case]()
    assert_matches(frozen(Around(module, x.to(dtype)), dtype))


@pytest.mark.parametrize("case", ["linear", "conv 2d", "attention, train", "lstm"])
def test_autocast(case):
    module, *inputs = MODULES[case]()

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model()

    assert_matches(frozen(Around(module, *inputs)), loss)


@pytest.mark.parametrize("inner", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradient_modes_inside_the_closure(inner):
    def loss(model):
        with inner():
            value = model().clone()
        return value.clone()

    assert_matches(frozen(Around(nn.LSTM(3, 4), randn(5, 2, 3))), loss)


def test_a_tied_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self):
            return F.cross_entropy(self.head(self.embedding(tokens(5)).tanh()), tokens(5, seed=1))

    model = frozen(Tied())
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]
    assert_matches(model)


@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "old weight_norm", "orthogonal"])
def test_parametrized_weights(kind):
    layer = nn.Linear(4, 4)
    if kind == "parametrize":

        class Symmetric(nn.Module):
            def forward(self, w):
                return w.triu() + w.triu(1).mT

        nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    elif kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer)
    elif kind == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(layer)
        layer.requires_grad_(False)
        layer(randn(5, 4))  # a leaf now, which deepcopy needs
    else:
        nn.utils.parametrizations.orthogonal(layer, orthogonal_map="cayley")
    assert_matches(frozen(Around(layer, randn(5, 4))))


@pytest.mark.parametrize("case", ["transposed", "strided", "channels last"])
def test_parameters_that_are_not_contiguous(case):
    if case == "channels last":
        layer = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        model = Around(layer, randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    else:
        w = randn(6, 40).t() if case == "transposed" else randn(40, 12)[:, ::2]
        strides = w.stride()
        model = Call(lambda x, w: torch.as_strided(x @ w, (3, 6), (6, 1)), randn(5, 40), w=w)
    for p in model.parameters():  # deepcopy does not keep the strides
        p.requires_grad_(False)
    layout = [p.stride() for p in model.parameters()]
    assert not next(model.parameters()).is_contiguous()
    seen = []

    def loss(model):
        seen.append([p.detach().stride() for p in model.parameters()])
        return model()

    before = contents(model)
    optimizer = trained(model)
    optimizer.backward(lambda: loss(model))
    assert all(s == layout for s in seen)
    assert_same(model, before)
    direction = Direction(SEED, 0, 0, "rademacher")
    values = []
    for sign in (1, -1):
        for index, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
            p.data.copy_(perturbed(old, direction, sign * MU, index=index))
        values.append(evaluate(model, gradients=False).loss)
    slope = (values[0] - values[1]) / 2 / MU
    assert torch.equal(optimizer.projected_grads.reshape(()), slope)
    if case != "channels last":
        assert model.w.stride() == strides


# ---- calls ------------------------------------------------------------------------------------


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
    "x.data = w": lambda x, w: setattr(out := torch.empty(4, 4), "data", w) or out,
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


# ---- Hugging Face -----------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def hugging_face(kind, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": 32} | options
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=50
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "opt":
        config = transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **sizes)
        return transformers.OPTForCausalLM(config)
    sizes["intermediate_size"] = 32
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    config = transformers.LlamaConfig(pad_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config)


def language_loss(model):
    ids = tokens(2, 6, high=50)
    if (
        "Classification"
        in type(getattr(model, "base_model", model)).__name__ + type(model).__name__
    ):
        return model(input_ids=ids, labels=torch.tensor([0, 1])).loss
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss


@pytest.fixture
def caught(monkeypatch):
    """Names of the parameters that were copied."""
    names = set()
    original = streamed.Streaming._copy
    monkeypatch.setattr(
        streamed.Streaming, "_copy", lambda self, s: names.add(s.name) or original(self, s)
    )
    return names


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("llama", False),
        ("llama", True),
        ("opt", False),
        ("opt", True),
        ("bert", True),
        ("gpt2", True),
    ],
)
def test_transformers(kind, tied, attention, caught):
    model = hugging_face(kind, tie_word_embeddings=tied).requires_grad_(False)
    model.set_attn_implementation(attention)
    assert_matches(model.train(), language_loss, steps=2)
    assert caught == {name for name, _ in model.named_parameters()}


def test_gradient_checkpointing(caught):
    model = hugging_face("llama").requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert_matches(model.train(), language_loss, steps=2)
    assert caught == {name for name, _ in model.named_parameters()}


def test_sixteen_bit_transformers(caught):
    model = hugging_face("llama").bfloat16().requires_grad_(False)
    assert_matches(model, language_loss, steps=2)
    assert caught == {name for name, _ in model.named_parameters()}


ADAPTERS = {
    "lora": ("LoraConfig", {"r": 2, "lora_dropout": 0.1}),
    "lora, modules_to_save": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"]}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "loha": ("LoHaConfig", {"r": 2}),
    "lokr": ("LoKrConfig", {"r": 2}),
    "vera": ("VeraConfig", {"r": 2}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "layer norms": ("LNTuningConfig", {}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft(kind, caught):
    """Gradients for the adapter at the clean point, streaming for the base."""
    peft = pytest.importorskip("peft")
    name, options = ADAPTERS[kind]
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    if kind in ("prompt", "prefix", "p-tuning"):
        targets = {}
    elif kind == "layer norms":
        targets = {"target_modules": ["input_layernorm"]}
    elif kind == "vera":
        targets = {"target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, name)(task_type="CAUSAL_LM", **targets, **options)
        model = peft.get_peft_model(hugging_face("llama"), config)
        optimizer = assert_matches(model.train(), language_loss)
    unused = {"layer norms": "input_layernorm.base_layer"}.get(kind, " ")  # adapted copies serve
    names = optimizer.param_groups[0]["param_names"]
    assert caught == {name for name in names if unused not in name}
    base = hugging_face("llama").num_parameters()
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) > 0.8 * base


# ---- what is not torch's ----------------------------------------------------------------------


def test_compiled_models_run_uncompiled():
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    plain = frozen(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)))
    model = copy.deepcopy(plain)
    counter = testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    try:
        compiled(randn(5, 4))
        assert counter.frame_count == 1
        optimizer, expected = trained(model), trained(plain)
        for _ in range(2):
            optimizer.step(lambda: compiled(randn(5, 4)).sum())
            expected.step(lambda: plain(randn(5, 4)).sum())
        assert_same(model, contents(plain))
        assert counter.frame_count == 1
        compiled(randn(6, 4))  # compiles again, for another shape
        assert counter.frame_count == 2
    finally:
        torch._dynamo.reset()


class Hidden(nn.Module):
    """Uses ``seen`` by torch functions, ``hidden`` in a way of its own."""

    def __init__(self, prepare):
        super().__init__()
        self.seen, self.hidden = Parameter(torch.ones(6)), Parameter(torch.ones(6))
        self.more = nn.ParameterList([torch.ones(2) for _ in range(5)])
        self.requires_grad_(False)
        self.read = prepare(self.hidden)

    def forward(self):
        return self.seen.sum() + self.read() * 3 + sum(p.sum() for p in self.more)


def earlier_view(w):
    view = w.view(2, 3)
    return lambda: view.square().sum()


def earlier_data(w):
    data = w.data
    return lambda: data.square().sum()


def earlier_numpy(w):
    array = w.numpy()
    return lambda: float((array**2).sum())


def raw_pointer(w):
    import ctypes

    def read():
        memory = (ctypes.c_float * w.numel()).from_address(w.data_ptr())
        return sum(float(v) ** 2 for v in memory)

    return read


def raw_storage(w):
    return lambda: torch.tensor(w.untyped_storage().tolist()).float().square().sum()


def without_modes(w):
    def read():
        with torch._C.DisableTorchFunction():
            return w.square().sum()

    return read


def vmapped(w):
    return lambda: torch.vmap(lambda e: e * 2)(w).square().sum()


def subclassed(w):
    return lambda: Parameter(w, requires_grad=False).square().sum()


def in_a_thread(w):
    import threading

    def read():
        found = []
        thread = threading.Thread(target=lambda: found.append(w.square().sum()))
        thread.start()
        thread.join()
        return found[0]

    return read


HIDDEN = [earlier_view, earlier_data, earlier_numpy, raw_pointer, raw_storage, without_modes,
          vmapped, subclassed, in_a_thread]  # fmt: skip


@pytest.mark.parametrize("prepare", HIDDEN, ids=lambda f: f.__name__)
def test_what_torch_functions_do_not_see_is_named(prepare):
    model = Hidden(prepare)
    before = contents(model)
    optimizer = trained(model)
    with pytest.raises(RuntimeError, match=r"another way .*: hidden; use perturbation='in_place'"):
        optimizer.step(model)
    assert_same(model, before)


def test_a_weight_that_is_seen_only_in_part_is_named():
    model = Hidden(earlier_view)
    with pytest.raises(RuntimeError, match=": hidden; use"):
        trained(model).step(lambda: model() + model.hidden.sum())


def test_several_hidden_weights_are_all_named():
    model = Hidden(earlier_view)
    views = [p.view(-1) for p in model.more[1:4]]
    with pytest.raises(RuntimeError, match=r": hidden, more\.1, more\.2, more\.3; use"):
        trained(model).step(lambda: model() + sum(v.exp().sum() for v in views))


def test_script_modules_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 3))
    model = nn.Sequential(nn.Linear(4, 4), scripted).requires_grad_(False)
    before = contents(model)
    with pytest.raises(RuntimeError, match=r": 1\.weight, 1\.bias; use"):
        trained(model).step(lambda: model(randn(5, 4)).sum())
    assert_same(model, before)


def test_verification_happens_once_for_a_set_of_parameters():
    model, counts = frozen(Call(lambda a, b: a * b, a=randn(3), b=randn(3))), []
    optimizer = trained(model)
    for _ in range(3):
        calls = []
        optimizer.step(lambda calls=calls: calls.append(1) or model())
        counts.append(len(calls))
    assert counts == [2 + 1 + 2, 2, 2]  # repeated once, then in two parts
    late = Parameter(torch.ones(3), requires_grad=False)
    optimizer.add_param_group({"params": [("late", late)], "mode": "zo"})
    view = late.view(-1)
    with pytest.raises(RuntimeError, match=": late; use"):
        optimizer.step(lambda: model() + view.sum())


def test_a_loss_that_is_not_finite_verifies_nothing():
    model = Hidden(earlier_view)
    optimizer = trained(model)
    optimizer.step(lambda: model() * float("nan"))
    with pytest.raises(RuntimeError, match=": hidden; use"):
        optimizer.step(model)


def test_a_loss_that_does_not_repeat_warns_once():
    model = frozen(Around(nn.Linear(4, 3), randn(5, 4)))
    optimizer = trained(model)
    generator = torch.Generator().manual_seed(0)
    before = contents(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.backward(lambda: model() + torch.rand((), generator=generator))
            assert_same(model, before)
            optimizer.zero_grad()
    assert [str(w.message)[:25] for w in caught] == ["closure gave two losses a"]


# ---- writes, exceptions -----------------------------------------------------------------------


def set_data(w):
    w.data = torch.zeros(4, 4)


def set_item(w):
    w[0] = 1.0


def augmented(w):
    w[0, 1] += 1.0


def operator(w):
    w += 1.0


def module_to(w):
    holder = nn.Module()
    holder.w = w
    holder.double()


WRITES = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(4, 4)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1.0),
    "normal_": lambda w: nn.init.normal_(w),
    "uniform_ by keyword": lambda w: nn.init.uniform_(tensor=w),
    "xavier": lambda w: nn.init.xavier_uniform_(w),
    "w.data =": set_data,
    "w[0] =": set_item,
    "w[0] +=": augmented,
    "w +=": operator,
    "out=w": lambda w: torch.mul(torch.ones(4, 4), 2, out=w),
    "out=(w, ...)": lambda w: torch.sort(
        torch.ones(4, 4), out=(w, torch.empty(4, 4, dtype=torch.long))
    ),
    "relu(inplace=True)": lambda w: F.relu(w, inplace=True),
    "dropout(..., True)": lambda w: F.dropout(w, 0.5, True, True),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.ones(4)),
    "embedding max_norm": lambda w: F.embedding(tokens(5, high=4), w, max_norm=1e-3),
    "module.to": module_to,
    "clip_grad_by_value": lambda w: w.clamp_(-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", WRITES)
def test_writes_in_the_closure_raise(case, inference):
    model = frozen(Call(lambda w: w, w=randn(4, 4)))
    before, where = contents(model), model.w.data_ptr()
    optimizer = trained(model)

    def closure():
        value = model()
        with torch.inference_mode(inference):
            WRITES[case](model.w)
        return value

    with pytest.raises(RuntimeError, match="must not write to the zeroth-order parameter 'w'"):
        optimizer.step(closure)
    assert_same(model, before)
    assert model.w.data_ptr() == where


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", range(1, 6))
def test_exceptions_leave_weights_to_the_bit(at, error):
    """In the clean evaluation, the first, the repeated, one with written weights, the last."""
    model = frozen(Call(lambda a, b: a * b, a=randn(3).bfloat16(), b=randn(3)))
    model.b.requires_grad_(True)
    before, calls = contents(model), []
    optimizer = trained(model)

    def closure():
        calls.append(1)
        value = model()
        if len(calls) == at:
            raise error("stop")
        return value

    with pytest.raises(error, match="stop"):
        optimizer.step(closure)
    assert_same(model, before)
    optimizer.zero_grad()
    optimizer.step(model)  # and the optimizer works on
    assert not torch.equal(model.a, before[0])


def test_ctrl_c_at_any_time_leaves_weights_to_the_bit():
    """A signal in the midst of each kind of evaluation."""
    model = frozen(Around(nn.Linear(4, 3), randn(5, 4)))
    before = contents(model)
    for at in range(1, 5):
        calls = []

        def closure(calls=calls, at=at):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return model()

        with pytest.raises(KeyboardInterrupt):
            trained(model).step(closure)
        assert_same(model, before)


def test_a_mode_that_ctrl_c_left_behind_does_nothing(monkeypatch):
    model = frozen(Call(lambda w: w, w=randn(3)))
    before, optimizer = model.w.clone(), trained(model)

    def interrupted(*error):
        raise KeyboardInterrupt

    monkeypatch.setattr(streamed.Streaming, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(model)
    try:
        assert torch._C._len_torch_function_stack() == 1
        assert torch.equal(model.w * 1, before)
    finally:
        torch._C._pop_torch_function_stack()


# ---- copies -----------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch):
    """Weak references to all copies that were made, with how many lived when each was made."""
    made, alive = [], []
    original = streamed.Streaming._copy

    def counting(self, source):
        alive.append(sum(reference() is not None for reference in made))
        copy = original(self, source)
        made.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(streamed.Streaming, "_copy", counting)
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
