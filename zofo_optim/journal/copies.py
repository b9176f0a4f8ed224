"""Second copies of trained weights in a model's files, as where tied weights were stored twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import JournalError
from .reader import Recording


class Copies:
    """Finds tensors that are equal to the bit to a parameter of the journal, and have another name.

    Matrices only, and none whose elements are all equal: norms that begin at 1 are no copies of
    each other. Files do not say whether the two were one weight when it was trained.

    Args:
        recording: the journal.
    """

    def __init__(self, recording: Recording) -> None:
        self._shapes = {shape for _, shape, _ in recording.kinds() if len(shape) > 1}
        self._trained: dict[bytes, str] = {}
        self._others: dict[str, bytes] = {}

    def look(self, tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
        """Look at a file's tensors; ``keys`` are those of the journal's parameters, by name."""
        names = {key: name for name, key in keys.items()}
        places = {tensors[key].data_ptr() for key in names}
        for key, tensor in tensors.items():
            if tensor.shape not in self._shapes or bool((tensor == tensor.flatten()[0]).all()):
                continue
            if key in names:
                self._trained[_digest(tensor)] = names[key]
            elif tensor.data_ptr() not in places:  # else the same memory, written with it
                self._others[key] = _digest(tensor)

    def found(self) -> dict[str, str]:
        """The copies' keys, with the parameters that they are of."""
        pairs = ((key, self._trained.get(digest)) for key, digest in self._others.items())
        return {key: name for key, name in pairs if name is not None}

    def chosen(self, choice: str | None, where: str) -> dict[str, str]:
        """Those to write the trained weights to, by the user's choice: "train" or "keep".

        Raises:
            JournalError: there are some, and nothing was chosen.
        """
        found = self.found()
        if found and choice is None:
            key, name = next(iter(found.items()))
            raise JournalError(
                f"{where} holds {key!r}, equal to the trained {name!r} ({len(found)} such in all): "
                "say --copies train where they are one weight, stored twice (tied embeddings), "
                "or --copies keep where the second is a weight of its own that was not trained"
            )
        return found if choice == "train" else {}


def _digest(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(f"{tensor.dtype}".encode() + content.tobytes()).digest()
