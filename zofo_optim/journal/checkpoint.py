"""Model weights in safetensors files, for the command line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .errors import JournalError


class Checkpoint:
    """A safetensors file, or a folder of them with whatever else a model has.

    Args:
        path: the file or folder.
        option: what messages call it.

    Raises:
        FileNotFoundError: there is none.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], option: str) -> None:
        try:
            import safetensors  # noqa: F401
        except ImportError:
            raise ImportError("safetensors is not installed; pip install safetensors") from None
        self.path, self.option = Path(path), option
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(
                f"{option} must be a safetensors file, or a folder of them, got {str(path)!r}: no "
                "safetensors file there"
            )
        self.files = files

    def __str__(self) -> str:
        return f"{self.option} {self.path}"

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

    @contextmanager
    def beside(self, out: Path) -> Iterator[Path]:
        """Where to write what is to be at ``out``: it comes there whole, or not at all.

        Where this is a folder, it is one, of usual permissions, with all of it that is not
        weights: the base's may forbid to write, as model folders that are shared often do.

        Raises:
            FileExistsError: there is something at ``out``.
        """
        self.refuse_existing(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(out.name + ".new")
        _remove(fresh)  # of a run that was killed
        try:
            if self.path.is_dir():
                self._copy_rest(fresh)
            yield fresh
            self.refuse_existing(out)
            fresh.rename(out)
        finally:
            _remove(fresh)

    def refuse_existing(self, out: Path) -> None:
        """Raise FileExistsError where there is something at ``out``."""
        if out.exists():
            raise FileExistsError(f"--out must not exist, got {str(out)!r}, which does")

    def _copy_rest(self, out: Path) -> None:
        out.mkdir()
        for source in sorted(self.path.rglob("*")):
            target = out / source.relative_to(self.path)
            if source.is_dir():
                target.mkdir()
            elif source.suffix != ".safetensors":
                shutil.copyfile(source, target)

    def write(self, out: Path, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write one file's tensors to its place in ``out``, which :meth:`beside` gave."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(dict(tensors), out / file.name if self.path.is_dir() else out, metadata=metadata)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
