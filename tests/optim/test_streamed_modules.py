"""perturbation="streamed": the modules of torch.nn, in every dtype, mode and layout."""

import warnings

import pytest
import torch
import torch.nn.functional as F
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
    tokens,
    trained,
)
from torch import nn

from zofo_kernels import Direction, perturbed
from zofo_optim.evaluation import evaluate

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
