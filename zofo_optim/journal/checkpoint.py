"""Model weights in safetensors files, for the command line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from .errors import JournalError


class Checkpoint:
    """A safetensors file, or a folder of them with whatever else a model has.

    Args:
        path: the file or folder.

    Raises:
        FileNotFoundError: there is none.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import safetensors  # noqa: F401
        except ImportError:
            raise ImportError("safetensors is not installed; pip install safetensors") from None
        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"no safetensors file at {str(path)!r}")
        self.files = files

    def names(self) -> list[str]:
        """Of all tensors."""
        return [name for file in self.files for name in self._keys(file)]

    def _keys(self, file: Path) -> list[str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except SafetensorError as error:
            raise JournalError(f"{file} is no sound safetensors file: {error}") from None

    def tensors(self) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """Each file's content, one in memory at a time."""
        from safetensors.torch import load_file

        for file in self.files:
            yield file, load_file(file)

    def write(self, out: Path, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write one file's tensors to its place under ``out``, whole or not at all."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        target = out / file.name if self.path.is_dir() else out
        fresh = target.with_name(target.name + ".new")
        save_file(dict(tensors), fresh, metadata=metadata)
        fresh.replace(target)

    def refuse_existing(self, out: Path) -> None:
        """Raise FileExistsError where there is something at ``out``."""
        if out.exists():
            raise FileExistsError(f"--out must not exist, got {str(out)!r}, which does")

    def copy_rest(self, out: Path) -> None:
        """Make the output's folder, with all that is not weights; of usual permissions.

        The base's may forbid to write: model folders that are shared often do.
        """
        if self.path.is_dir():
            out.mkdir(parents=True)
            for source in sorted(self.path.rglob("*")):
                target = out / source.relative_to(self.path)
                if source.is_dir():
                    target.mkdir()
                elif source.suffix != ".safetensors":
                    shutil.copyfile(source, target)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
