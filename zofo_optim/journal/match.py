"""Finding a journal's parameters among a model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..names import match_names
from ..quantized import tensors_for
from .errors import JournalError
from .reader import Recording


def match(recording: Recording, available: Iterable[str], where: str) -> dict[str, str]:
    """For each parameter of the journal its name in ``available``; see :func:`match_names`.

    Raises:
        JournalError: some have none.
    """
    names = recording.names()
    found = match_names(names, available, heads=True)
    missing = [name for name in names if name not in found]
    if missing:
        raise JournalError(
            f"{where} must have the {len(names)} parameters of {recording.path}, but "
            f"{len(missing)} are missing: {some(missing)}"
        )
    return found


def by_name(model: nn.Module | Mapping[str, Tensor], recording: Recording) -> dict[str, Tensor]:
    """The zeroth-order parameters of the journal, by its names.

    Raises:
        TypeError: ``model`` is no module and no mapping.
        JournalError: parameters are missing or have other shapes or dtypes.
    """
    if isinstance(model, nn.Module):
        available: Mapping[str, Tensor] = tensors_for(recording.names(), model)
    elif isinstance(model, Mapping):
        available = model
    else:
        raise TypeError(
            f"model must be a torch.nn.Module or a mapping of tensors, got {type(model).__name__}"
        )
    found = {ours: available[name] for ours, name in match(recording, available, "model").items()}
    for name, shape, dtype in recording.kinds():
        tensor = found[name]
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise JournalError(
                f"parameter {name!r} must have shape {tuple(shape)} and dtype {dtype} as in "
                f"{recording.path}, got shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
            )
    return found


def some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
