"""The command line: what a journal says, whether it is sound, and replaying it on files."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .converted import Converted
from .copies import Copies
from .errors import JournalError
from .match import match, some
from .player import Words, apply, check_start, choose, different, verify_end
from .reader import Recording, read

_WORDS = Words(stop="--stop", to_a_step="--stop STEP", partial="--partial", weights="--base")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 1 with what is wrong on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say
            options.run(options)
    except (JournalError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _say(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as a line: nobody looks for its place in the code."""
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zofo_optim.journal", description="Journals of zeroth-order training."
    )
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("journal", help="the journal's file")
        added.set_defaults(run=run)
        return added

    info = command("info", _info, "Print what a journal says of itself.")
    info.add_argument("--json", action="store_true", help="its whole header, as JSON")
    verify = command("verify", _verify, "Check every record, and weights by their fingerprints.")
    verify.add_argument("--base", help="the starting weights: a safetensors file, or a folder")
    verify.add_argument("--result", help="the trained weights, likewise")
    run = command("replay", _replay, "Write the weights to which a journal leads.")
    run.add_argument("--base", required=True, help="the starting weights, as for verify")
    run.add_argument("--out", required=True, help="a new file, or a new folder for a folder")
    run.add_argument("--stop", type=int, help="the step to go to; default: the last")
    run.add_argument(
        "--partial", action="store_true", help="go as far as a damaged or unclosed journal is sound"
    )
    run.add_argument(
        "--copies",
        choices=("train", "keep"),
        help="what to do with second copies of trained weights in --base, such as tied embeddings "
        "that were stored twice",
    )
    run.add_argument("--device", default="cpu", help="where to compute; default: cpu")
    return parser


def _info(options: argparse.Namespace) -> None:
    recording = read(options.journal)
    header = recording.header
    if options.json:
        print(json.dumps(header, indent=1))
        return
    kinds = recording.kinds()
    marginal = recording.marginal_size()
    each = "" if marginal is None else f", {marginal:.1f} for each further step"
    lines = {
        "steps": f"{recording.start} to {recording.stop}",
        "state": recording.fault or "closed",
        "size": f"{recording.size:,} bytes{each}",
        "weights": f"{sum(math.prod(shape) for _, shape, _ in kinds):,} in {len(kinds)} tensors "
        f"of {len(header['groups'])} groups, "
        + ", ".join(sorted({str(dtype).removeprefix("torch.") for _, _, dtype in kinds})),
        "noise": f"{header['distribution']}, {_structure(header)}, version "
        f"{header['noise_version']}, seeds "
        + ", ".join(str(group["seed"]) for group in header["groups"]),
        "estimator": f"{header['estimator']}, {header['num_samples']} samples, rule "
        + header.get("zo_rule", "sgd"),
        "active": str(header.get("active") or "all"),
        "made by": f"{header['perturbation']} perturbation, {header['rounding']} rounding, "
        f"backends {', '.join(sorted(recording.backends()))}",
        "metadata": json.dumps(header["metadata"]),
    }
    for name, value in lines.items():
        print(f"{name:>9}  {value}")


def _structure(header: dict[str, Any]) -> str:
    if header.get("structure", "full") == "full":
        return "full"
    if header.get("directions", "shared") == "shared":
        return f"rank {header['rank']}"
    together = header.get("examples_of_a_direction", 1)
    whose = "an example" if together == 1 else f"for {together} examples"
    return f"rank {header['rank']}, one {whose}"


def _verify(options: argparse.Namespace) -> None:
    recording = read(options.journal)
    print(recording.fault or f"{recording.path}: all {len(recording.steps)} steps are sound")
    if options.base:
        checkpoint = _opened(recording, options.base, "--base")
        for file, tensors, keys in _files(recording, checkpoint):
            check_start(recording, 0, _chosen(recording, file, tensors, keys), _WORDS)
        print(f"{options.base}: every parameter is as at the journal's start")
    if options.result:
        count = len(recording.steps)
        if recording.fingerprints(count) is None:
            raise JournalError(f"{recording.path} has no fingerprints of its last weights")
        checkpoint = _opened(recording, options.result, "--result")
        for file, tensors, keys in _files(recording, checkpoint):
            wrong = different(recording, count, _chosen(recording, file, tensors, keys))
            if wrong:
                raise JournalError(
                    f"--result {file} has not the weights that were trained: {some(wrong)} differ"
                )
        print(f"{options.result}: every parameter is as at the journal's end")
    if recording.fault:
        raise JournalError("the journal is not whole")


def _replay(options: argparse.Namespace) -> None:
    device = _device(options.device)
    recording = read(options.journal)
    span = choose(recording, None, options.stop, options.partial, _WORDS)
    out = Path(options.out)
    checkpoint = _opened(recording, options.base, "--base")
    checkpoint.refuse_existing(out)
    copies = Copies(recording)
    for file, tensors, keys in _files(recording, checkpoint):  # all, before any is replayed
        check_start(recording, 0, _chosen(recording, file, tensors, keys), _WORDS)
        copies.look(tensors, keys)
    tied = copies.chosen(options.copies, str(checkpoint))
    verified: set[bool | None] = set()
    with checkpoint.beside(out) as fresh:
        for file, tensors, keys in _files(recording, checkpoint):
            again = {key: name for key, name in tied.items() if key in tensors}
            keys = {**{name: key for key, name in again.items()}, **keys}
            chosen = _chosen(recording, file, tensors, keys)
            chosen = {name: tensor.to(device) for name, tensor in chosen.items()}
            apply(recording, span, chosen, progress=_Progress(file.name))
            verified.add(verify_end(recording, span.high, chosen, "auto"))
            tensors.update({keys[name]: tensor.cpu() for name, tensor in chosen.items()})
            for key, name in again.items():
                if keys[name] != key:
                    tensors[key] = tensors[keys[name]].clone()
            checkpoint.write(fresh, file, tensors)
    if False in verified:
        said = "not bit-identical to those trained"
    else:
        said = "not verified" if None in verified else "bit-identical to those trained"
    print(f"{out}: weights of step {span.stop}, {said}")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # not compiled with CUDA: an assertion
        reason = str(error).partition("\n")[0]
        raise JournalError(
            f"--device must be a device torch can use here, got {name!r}: {reason}"
        ) from None


def _opened(recording: Recording, path: str, option: str) -> Checkpoint:
    """The weights of an option, by the names that the journal's parameters have.

    As the files have them, or else as transformers makes a model of the files.
    """
    plain = Checkpoint(path, option)
    try:
        match(recording, plain.names(), str(plain))
    except JournalError as error:
        try:
            converted = Converted(Path(path), option)
            match(recording, converted.names(), str(plain))
        except (JournalError, OSError, ValueError, RuntimeError):
            raise JournalError(
                f"{error}. A head that a published model lacks begins at random: save the model "
                f"as it is before training, by save_pretrained, and give that as {option}"
            ) from None
        return converted
    return plain


_File = tuple[Path, dict[str, Tensor], dict[str, str]]


def _files(recording: Recording, checkpoint: Checkpoint) -> Iterator[_File]:
    """Each file with its tensors, and the keys of the journal's parameters in it, by name."""
    where = match(recording, checkpoint.names(), str(checkpoint))
    for file, tensors in checkpoint.tensors():
        yield file, tensors, {name: key for name, key in where.items() if key in tensors}


def _chosen(
    recording: Recording, file: Path, tensors: dict[str, Tensor], keys: dict[str, str]
) -> dict[str, Tensor]:
    """The journal's parameters in a file, in the dtype in which they were trained.

    Other dtypes are converted, as loading the model in the training's dtype did; fingerprints
    tell whether that is what was done.
    """
    found = {}
    for name, shape, dtype in recording.kinds():
        if name in keys:
            tensor = tensors[keys[name]]
            if tensor.shape != shape:
                raise JournalError(
                    f"{keys[name]!r} in {file} must have shape {tuple(shape)} as in "
                    f"{recording.path}, got {tuple(tensor.shape)}"
                )
            found[name] = tensor.to(dtype)
    return found


class _Progress:
    """A bar that appears where somebody looks at it."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, unit=" weights", unit_scale=True, disable=None)

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
