"""Losses of examples from logits: against transformers' formulas, written here by element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from zofo_optim import example_losses
from zofo_optim.losses import TASKS, TOKEN_TASKS

SHIFT = {"causal_lm": 1}


def logits_of(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def reference(logits, labels, task, *, virtual_tokens=0, count=None, smoothing=0.0, ignored=-100):
    """Losses (B,) of token tasks, label by label."""
    rows = []
    for row, targets in zip(logits, labels.tolist(), strict=True):
        total, number = 0.0, 0
        for t, target in enumerate(targets):
            place = virtual_tokens + t - SHIFT.get(task, 0)
            if target == ignored or place < 0:
                continue
            negative = -torch.log_softmax(row[place], -1)
            total = total + (1 - smoothing) * negative[target] + smoothing * negative.mean()
            number += 1
        rows.append((total, number))
    found = sum(number for _, number in rows) if count is None else count
    share = len(rows) / found if found else math.nan
    return torch.stack([torch.as_tensor(total, dtype=logits.dtype) * share for total, _ in rows])


@st.composite
def token_batches(draw):
    """Logits and labels of a token task: ragged, with rows that may have no label."""
    rows, length, classes = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
    )
    label = st.one_of(st.just(-100), st.integers(0, classes - 1))
    row = st.lists(label, min_size=length, max_size=length)
    labels = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))
    virtual = draw(st.integers(0, 2))
    logits = logits_of(rows, virtual + length, classes, seed=draw(st.integers(0, 9)))
    return logits, labels, virtual


@given(
    token_batches(),
    st.sampled_from(TOKEN_TASKS),
    st.one_of(st.none(), st.integers(1, 99)),
    st.sampled_from([0.0, 0.25]),
)
def test_token_losses(batch, task, count, smoothing):
    logits, labels, virtual = batch
    number = torch.tensor(count) if count is not None and count % 2 else count
    losses = example_losses(
        logits,
        labels,
        task,
        virtual_tokens=virtual,
        num_items_in_batch=number,
        label_smoothing=smoothing,
    )
    expected = reference(
        logits, labels, task, virtual_tokens=virtual, count=count, smoothing=smoothing
    )
    assert losses.shape == (len(labels),)
    torch.testing.assert_close(losses, expected, equal_nan=True)


@given(token_batches(), st.sampled_from(TOKEN_TASKS))
def test_gradients_are_those_of_the_mean(batch, task):
    logits, labels, virtual = batch
    full = F.pad(labels, (virtual, 1), value=-100)
    shift = SHIFT.get(task, 0)
    targets = full[:, shift : shift + logits.shape[1]]
    if (targets == -100).all():
        return
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    example_losses(ours, labels, task, virtual_tokens=virtual).mean().backward()
    loss = F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@given(token_batches(), st.sampled_from(TOKEN_TASKS))
def test_a_loss_depends_on_its_own_logits(batch, task):
    logits, labels, virtual = batch
    logits.requires_grad_()
    losses = example_losses(logits, labels, task, virtual_tokens=virtual, num_items_in_batch=7)
    for b, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        others = [row for row in range(len(labels)) if row != b]
        assert not gradient[others].any()


@st.composite
def row_batches(draw):
    """Task, logits and labels of classification, as transformers takes each kind."""
    rows, classes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    logits = logits_of(rows, classes, seed=draw(st.integers(0, 9)))
    kind = draw(st.sampled_from(TASKS[-3:]))
    if kind == "single_label_classification":
        classes_of = st.one_of(st.just(-100), st.integers(0, classes - 1))
        labels = torch.tensor(draw(st.lists(classes_of, min_size=rows, max_size=rows)))
        labels = labels[:, None] if draw(st.booleans()) else labels
    elif kind == "multi_label_classification":
        labels = (logits_of(rows, classes, seed=20) > 0).float()
    else:
        labels = logits_of(rows, classes, seed=20).float()
        labels = labels[:, 0] if classes == 1 and draw(st.booleans()) else labels
    return kind, logits, labels


@given(row_batches())
def test_row_losses(batch):
    kind, logits, labels = batch
    if kind == "single_label_classification":
        expected = reference(logits[:, None], labels.reshape(-1, 1), kind)
    elif kind == "regression":
        expected = ((logits - labels.reshape(logits.shape)) ** 2).mean(1)
    else:
        p = torch.sigmoid(logits)
        expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(1)
    torch.testing.assert_close(example_losses(logits, labels, kind), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("classes", "labels", "kind"),
    [
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.tensor([0, 2], dtype=torch.int32), "single_label_classification"),
        (2, torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "multi_label_classification"),
        (2, torch.tensor([[True, False], [True, True]]), "multi_label_classification"),
        (1, torch.tensor([0.5, -1.0]), "regression"),
        (1, torch.tensor([0, 1]), "regression"),
    ],
)
def test_sequence_classification_is_one_of_three(classes, labels, kind):
    logits = logits_of(2, classes)
    losses = example_losses(logits, labels, "sequence_classification")
    assert torch.equal(losses, example_losses(logits, labels, kind))


def test_a_row_without_labels_is_zero():
    logits = logits_of(3, 4, 5).requires_grad_()
    labels = torch.tensor([[1, 2, -100, 3], [-100] * 4, [-100, -100, 4, 0]])
    losses = example_losses(logits, labels, "causal_lm")
    assert losses[1] == 0
    assert (losses[[0, 2]] > 0).all()
    losses.sum().backward()
    assert not logits.grad[1].any()


def test_a_batch_without_labels_is_nan_unless_others_count():
    logits, labels = logits_of(2, 3, 5), torch.full((2, 3), -100)
    assert example_losses(logits, labels, "causal_lm").isnan().all()
    counted = example_losses(logits, labels, "causal_lm", num_items_in_batch=4)
    assert not counted.any()


def test_ignore_index():
    logits, labels = logits_of(2, 3, 5), torch.tensor([[0, 1, 2], [0, 0, 3]])
    marked = torch.where(labels == 0, -100, labels)
    losses = example_losses(logits, labels, "masked_lm", ignore_index=0)
    assert torch.equal(losses, example_losses(logits, marked, "masked_lm"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("task", [*TOKEN_TASKS, "regression", "multi_label_classification"])
def test_dtypes(task, dtype):
    """At least fp32: what 16-bit logits hold is not rounded again."""
    shape = (2, 3, 5) if task in TOKEN_TASKS else (2, 5)
    logits = logits_of(*shape, dtype=dtype).requires_grad_()
    labels = torch.tensor([[1, 2, 3], [0, -100, 4]]) if len(shape) == 3 else logits_of(2, 5, seed=1)
    losses = example_losses(logits, labels, task)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    exact = example_losses(logits.detach().double(), labels, task)
    torch.testing.assert_close(losses.detach().double(), exact, rtol=1e-6, atol=1e-6)
    losses.mean().backward()
    assert logits.grad.dtype == dtype


def test_int32_labels():
    logits, labels = logits_of(2, 3, 5), torch.tensor([[1, 2, 3], [0, -100, 4]])
    short = example_losses(logits, labels.int(), "causal_lm")
    assert torch.equal(short, example_losses(logits, labels, "causal_lm"))


def test_logits_that_are_a_view():
    logits = logits_of(2, 5, 3).transpose(1, 2)
    labels = torch.tensor([[1, 2, 3], [0, -100, 4]])
    losses = example_losses(logits, labels, "causal_lm")
    assert torch.equal(losses, example_losses(logits.contiguous(), labels, "causal_lm"))


def test_outputs_as_mappings_and_objects():
    class Outputs:
        logits = logits_of(2, 3, 5)

    labels = torch.tensor([[1, 2, 3], [0, -100, 4]])
    expected = example_losses(Outputs.logits, labels, "causal_lm")
    assert torch.equal(example_losses(Outputs(), labels, "causal_lm"), expected)
    mapping = dict(logits=Outputs.logits)
    assert torch.equal(example_losses(mapping, labels, "causal_lm"), expected)


LOGITS, LABELS = logits_of(2, 3, 5), torch.tensor([[1, 2, 3], [0, -100, 4]])


class WithExperts:
    logits, aux_loss = LOGITS, torch.tensor(1.0)


@pytest.mark.parametrize(
    ("outputs", "labels", "task", "options", "error", "message"),
    [
        (LOGITS, LABELS, "lm", {}, ValueError, "task must be one of .*got 'lm'"),
        ((LOGITS,), LABELS, "causal_lm", {}, TypeError, "outputs must be logits .*got tuple"),
        (dict(loss=1), LABELS, "causal_lm", {}, TypeError, "outputs must be logits"),
        (LABELS, LABELS, "causal_lm", {}, TypeError, "logits must be real .*int64"),
        (WithExperts, LABELS, "causal_lm", {}, ValueError, "aux_loss.*output_router_logits"),
        (LOGITS, [[1]], "causal_lm", {}, TypeError, "labels must be a tensor, got list"),
        (LOGITS, LABELS * 1.0, "causal_lm", {}, TypeError, "labels must be integers .*float32"),
        (LOGITS, LABELS > 0, "masked_lm", {}, TypeError, "labels must be integers .*bool"),
        (LOGITS[:1], LABELS, "causal_lm", {}, ValueError, "same number of rows"),
        (LOGITS, LABELS[:, :2], "causal_lm", {}, ValueError, "pass virtual_tokens=1"),
        (LOGITS[:, :2], LABELS, "causal_lm", {}, ValueError, "labels must have shape"),
        (LOGITS, LABELS[:, 0], "causal_lm", {}, ValueError, "labels must have shape"),
        (LOGITS, LABELS, "causal_lm", dict(virtual_tokens=1), ValueError, "virtual_tokens=1"),
        (LOGITS, LABELS, "causal_lm", dict(virtual_tokens=-1), ValueError, "virtual_tokens must"),
        (LOGITS, LABELS, "causal_lm", dict(virtual_tokens=1.0), TypeError, "virtual_tokens must"),
        (LOGITS[0], LABELS, "causal_lm", {}, ValueError, "logits must have shape"),
        (LOGITS, LABELS, "regression", {}, ValueError, "logits must have shape"),
        (LOGITS[0], LABELS[:, 0], "regression", {}, ValueError, "same number of rows"),
        (LOGITS[:, 0], LABELS[:, 0], "regression", {}, ValueError, r"labels .*shape \(2, 5\)"),
        (
            *(LOGITS[:, 0], LABELS[:, :2], "single_label_classification", {}),
            *(ValueError, r"labels must have shape \(2,\) or \(2, 1\)"),
        ),
        (
            *(LOGITS[:, 0], LABELS[:, 0], "sequence_classification", dict(virtual_tokens=2)),
            *(ValueError, "virtual_tokens must be 0"),
        ),
        (
            *(LOGITS[:, 0], LOGITS[:, 1], "regression", dict(num_items_in_batch=2)),
            *(ValueError, "num_items_in_batch has no use"),
        ),
        (
            *(LOGITS[:, 0], LOGITS[:, 1], "regression", dict(label_smoothing=0.1)),
            *(ValueError, "label_smoothing has no use"),
        ),
        (
            *(LOGITS, LABELS, "causal_lm", dict(label_smoothing=1.0)),
            *(ValueError, r"label_smoothing must be a number in \[0, 1\), got 1.0"),
        ),
        (
            *(LOGITS, LABELS, "causal_lm", dict(num_items_in_batch=0)),
            *(ValueError, "num_items_in_batch must be at least 1, got 0"),
        ),
        (
            *(LOGITS, LABELS, "causal_lm", dict(num_items_in_batch=True)),
            *(TypeError, "num_items_in_batch must be an int or a tensor, got True"),
        ),
        (
            *(LOGITS, LABELS, "causal_lm", dict(num_items_in_batch=torch.ones(2))),
            *(ValueError, "num_items_in_batch must be an int or have one element"),
        ),
    ],
)
def test_refusals(outputs, labels, task, options, error, message):
    with pytest.raises(error, match=message):
        example_losses(outputs, labels, task, **options)
