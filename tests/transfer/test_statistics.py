"""What is summed over batches, against closed forms of all rows at once."""

import pytest
import torch
from bridged import llama, text
from torch import nn

from zofo_optim.transfer.statistics import Contribution, Influence, Refit, observe

TOKENS, INPUTS, OUTPUTS = 40, 6, 5


def rows(seed, width=INPUTS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.randn(TOKENS, width, generator=generator).to(dtype)


def told(who, inputs, outputs, sizes=(TOKENS,)):
    for x, y in zip(inputs.split(sizes), outputs.split(sizes), strict=True):
        who(x, y)
    return who


X, Y = rows(0), rows(1, OUTPUTS)
WEIGHT = rows(2)[:OUTPUTS]
KEPT, LEFT = torch.tensor([0, 2, 5]), [1, 3, 4]


def test_influence_is_the_mean_of_one_minus_the_cosine():
    outputs = rows(3)
    cosines = (X * outputs).sum(1) / (X.norm(dim=1) * outputs.norm(dim=1))
    found = told(Influence(), X, outputs).value()
    torch.testing.assert_close(found, (1 - cosines).double().mean())
    scaled = told(Influence(), X, 3 * X).value()  # longer, but not turned
    torch.testing.assert_close(scaled, torch.zeros((), dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_contribution_is_the_norm_of_what_a_group_adds(size):
    found = told(Contribution(WEIGHT, size), X, Y).value()
    parts = zip(X.split(size, 1), WEIGHT.split(size, 1), strict=True)
    wanted = torch.stack([(x @ w.T).norm() for x, w in parts])
    torch.testing.assert_close(found.float(), wanted)


def test_units_that_are_off_do_nothing_whatever_their_weights():
    inputs, weight = X.clone(), WEIGHT.clone()
    inputs[:, 3] = 0
    weight[:, 3] = 1e6
    weight[:, 4] = 0
    inputs[:, 4] = 1e6
    found = told(Contribution(weight), inputs, Y).value()
    assert found[3] == found[4] == 0
    assert found[[0, 1, 2, 5]].min() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_refit_is_least_squares_with_rows_for_the_ridge(bias):
    found, shift = told(Refit(WEIGHT, KEPT, bias), X, Y).changes()
    x, lost = X[:, KEPT].double(), (X[:, LEFT] @ WEIGHT[:, LEFT].T).double()
    ridge = 0.1 * (x - x.mean(0) if bias else x).square().sum(0).mean()
    rows_of_ridge = torch.cat([ridge.sqrt() * torch.eye(3), torch.zeros(3, 1)], 1)
    free = torch.full((TOKENS, 1), float(bias))
    left = torch.cat([torch.cat([x, free], 1), rows_of_ridge])
    right = torch.cat([lost, torch.zeros(3, OUTPUTS)])
    wanted = torch.linalg.lstsq(left.double(), right.double(), driver="gelsd").solution
    torch.testing.assert_close(found, wanted[:3].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shift, wanted[3], rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0.1


def test_kept_inputs_that_never_change_explain_nothing_but_the_mean():
    inputs = X.clone()
    inputs[:, KEPT] = 2.0
    change, shift = told(Refit(WEIGHT, KEPT, True), inputs, Y).changes()
    assert not change.any()
    lost = inputs[:, LEFT] @ WEIGHT[:, LEFT].T
    torch.testing.assert_close(shift.float(), lost.mean(0))


MAKERS = {
    "influence": lambda: (Influence(), rows(3)),
    "units": lambda: (Contribution(WEIGHT), Y),
    "groups": lambda: (Contribution(WEIGHT, 2), Y),
    "refit": lambda: (Refit(WEIGHT, KEPT, True), Y),
    "refit without a bias": lambda: (Refit(WEIGHT, KEPT, False), Y),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_two_batches_are_one(kind):
    results = []
    for sizes in ((TOKENS,), (7, TOKENS - 7)):
        who, outputs = MAKERS[kind]()
        told(who, X, outputs, sizes)
        results.append(who.changes() if isinstance(who, Refit) else who.value())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_single_precision(dtype):
    """200 squares of 20 are past float16's range, and past bfloat16's digits."""
    inputs, weight = torch.full((200, 1), 20.0, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    assert told(Contribution(weight), inputs, inputs, (200,)).value() == 80000**0.5


def test_padding_is_not_told_of_and_the_head_does_not_run():
    large = llama()
    large.lm_head.forward = None
    module, seen = large.model.layers[1].mlp, []
    batches = text()
    observe(large, batches, {module: lambda x, y: seen.append((x, y))})
    inputs, outputs = (torch.cat(part) for part in zip(*seen, strict=True))
    real = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
    assert len(inputs) == len(outputs) == real.sum() < len(real)
    whole = []
    handle = module.register_forward_hook(lambda _, args, out: whole.append((args[0], out)))
    with torch.no_grad():
        for batch in batches:
            large.model(batch["input_ids"], batch["attention_mask"])
    handle.remove()
    for found, part in zip((inputs, outputs), zip(*whole, strict=True), strict=True):
        assert torch.equal(found, torch.cat([rows.flatten(0, 1) for rows in part])[real])


def test_where_padding_is_unknown_rows_are_not_guessed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, input_ids, attention_mask):
            return self.inner(torch.ones(len(input_ids), 2))

    net = Net()
    batch = dict(input_ids=torch.ones(2, 3), attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"6 tokens .* a module of Net is given 2 rows"):
        observe(net, [batch], {net.inner: lambda x, y: None})
