"""Which parameters cannot have a direction for each example: what they act on has no example."""

from __future__ import annotations

import re

from torch import nn

_MIXES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.RNNBase, nn.MultiheadAttention),
)
"""Modules whose torch functions have no closed form for examples."""
_POSITIONS = re.compile(r"(^|[._])(positions?|pos|wpe|relative_attention_bias)([._]|$)|pos_emb")
"""Embeddings that are looked up once for all examples."""


def without_examples(model: nn.Module) -> set[str]:
    """Names of the parameters of which this can be told; the first step finds the others."""
    names: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        positions = _POSITIONS.search(prefix) and isinstance(module, nn.Embedding)
        if positions or isinstance(module, _MIXES):
            inside = module.named_parameters(remove_duplicate=False)
            names.update(f"{prefix}.{name}" if prefix else name for name, _ in inside)
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            if _POSITIONS.search(name):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names
