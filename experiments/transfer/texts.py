"""The training examples without their labels: what activations are recorded of."""

from __future__ import annotations

import torch
from torch import Tensor

from ..choices import ChoiceData
from ..classification import Batch, Encoded
from ..models import Problem

BATCH = 16


def unlabelled(problem: Problem, size: int = BATCH) -> list[Batch]:
    """Batches of similar length. A causal language model's end where its answer would begin."""
    data = problem.train
    if isinstance(data, ChoiceData):
        return _prompts(data, size, problem.tokenizer.pad_token_id)
    assert isinstance(data, Encoded)
    return [
        {name: value for name, value in batch.items() if name != "labels"}
        for batch in data.fixed_batches(size)
    ]


def _prompts(data: ChoiceData, size: int, padding: int) -> list[Batch]:
    rows = sorted((ids[:-count] for (ids, count), *_ in data.options), key=len)
    return [_padded(rows[start : start + size], padding) for start in range(0, len(rows), size)]


def _padded(rows: list[list[int]], padding: int) -> Batch:
    tensors = [torch.tensor(row) for row in rows]
    masks: list[Tensor] = [torch.ones_like(row) for row in tensors]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(tensors, batch_first=True, padding_value=padding),
        "attention_mask": pad(masks, batch_first=True),
    }
