"""Model folders whose files have other tensors than the model: transformers converts them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import JournalError

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class Converted(Checkpoint):
    """A folder that transformers reads and writes, as a whole.

    From version 5 on it holds the experts of a layer in one parameter, while published folders
    have a tensor an expert; it splits them again as it saves.

    Args:
        path: the folder.
        option: as for :class:`Checkpoint`.

    Raises:
        JournalError: transformers is not installed, or has no such model.
    """

    def __init__(self, path: Path, option: str) -> None:
        super().__init__(path, option)
        self._class = _architecture(path)

    @cached_property
    def _model(self) -> Any:
        """In a dtype that holds the weights of all files."""
        return self._class.from_pretrained(
            self.path, dtype=self._dtype(), local_files_only=True, use_safetensors=True
        )

    def _dtype(self) -> torch.dtype:
        from safetensors import safe_open

        found: set[str] = set()
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                found.update(opened.get_slice(key).get_dtype() for key in self._keys(file))
        dtypes = [_DTYPES[name] for name in found if name in _DTYPES]
        return reduce(torch.promote_types, dtypes or [torch.float32])

    @cached_property
    def _given(self) -> dict[str, Tensor]:
        parameters = self._model.named_parameters(remove_duplicate=False)
        return {name: p.detach() for name, p in parameters}

    def names(self) -> list[str]:
        return list(self._given)

    def tensors(self) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        yield self.path, dict(self._given)

    def write(self, out: Path, file: Path, tensors: Mapping[str, Tensor]) -> None:
        for name, p in self._model.named_parameters(remove_duplicate=False):
            if tensors[name] is not self._given[name]:  # of another dtype or device
                p.data = tensors[name]
        kept = {path.name for path in out.iterdir()} - {_INDEX}
        (out / _INDEX).unlink(missing_ok=True)  # save_pretrained writes one where it needs one
        with TemporaryDirectory(dir=out) as folder:
            self._model.save_pretrained(folder)
            for path in Path(folder).iterdir():
                if path.name not in kept:  # configurations stay as they were published
                    path.rename(out / path.name)


def _architecture(path: Path) -> Any:
    """The class of transformers that the folder's configuration names."""
    try:
        import transformers
    except ImportError:
        raise JournalError("transformers is not installed") from None
    config = path / "config.json"
    named = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    names = named.get("architectures") or [""]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise JournalError(f"{config} names no model of transformers")
    return found
