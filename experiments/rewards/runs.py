"""Making runs, each a file, and searching each cell's rate on one seed."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.zofo_bench.machine import cpu_model
from zofo_optim.whole import write_json

from ..finetune import machine, model_name, versions
from ..kept import kept
from ..measure import growth, peak_memory, stored_bytes
from ..models import ModelError
from ..report import Result
from ..search import SEARCHED, seeds_of
from . import grpo
from .grid import FULL_SIZE, GRPO, MU, TOKENS, Cell
from .methods import STEPPED, Method
from .scores import SCORES, Score
from .texts import Judge, Writer, evaluated

FRESH = 1_000_000
"""Seeds of evaluations are above those of runs."""


class Record:
    """The curve of a run: what the writer's fresh texts are worth, over the seconds of its steps.

    Seconds are those of the process on the CPU, which what else runs there does not lengthen; on
    one thread, as a quiet machine's clock. Evaluations are made between steps and count in no time.

    Args:
        evaluate: of the step's number; what :func:`texts.evaluated` gives.
        cell: its steps and how often it is evaluated.
    """

    def __init__(self, evaluate: Callable[[int], tuple[dict[str, float], Any]], cell: Cell) -> None:
        self._evaluate, self._cell = evaluate, cell
        self.steps, self.durations, self.wall_seconds = 0, list[float](), 0.0
        self.curve: list[dict[str, float]] = []
        self.texts: dict[str, list[str]] = {}
        self._add("start")

    def began(self) -> None:
        self._at = time.process_time(), time.perf_counter()

    def ended(self) -> None:
        self.durations.append(time.process_time() - self._at[0])
        self.wall_seconds += time.perf_counter() - self._at[1]
        self.steps += 1
        if self.steps % self._cell.eval_every == 0 or self.steps == self._cell.steps:
            self._add("end")

    def _add(self, when: str) -> None:
        means, self.texts[when] = self._evaluate(self.steps)
        place = dict(step=self.steps, samples=self.steps * self._cell.texts)
        self.curve.append({**place, "seconds": sum(self.durations), **means})


class Runs:
    """Makes and reads the runs of cells.

    Args:
        out: folder of all runs.
        seeds: of the best rate, the searched one among them.
        model: folder or hub id of the causal language model; None: runs that are there are read,
            and others :class:`Unfinished`.
        data: folder of SST-2; None: in the environment variable ZOFO_DATA.
        steps: at most so many a run; None: as the grid says.
        texts: of an evaluation.
    """

    def __init__(
        self,
        out: Path,
        seeds: Sequence[int],
        *,
        model: str | None = None,
        data: str | None = None,
        steps: int | None = None,
        texts: int = 64,
        console: Console | None = None,
    ) -> None:
        self._out, self._model, self._data = out, model, data
        self._steps, self._texts, self._console = steps, texts, console
        self.seeds = seeds_of(seeds)
        self._scores: dict[str, Score] = {}
        self._warm: set[Cell] = set()
        self._loaded: tuple[Any, Any] | None = None

    def cut(self, cell: Cell) -> Cell:
        """With as many steps as the command line allows."""
        return replace(cell, steps=min(cell.steps, self._steps or cell.steps))

    def searched(self, cell: Cell) -> dict[float, Result]:
        """By rate, on one seed."""
        return {rate: self.run(cell, rate, SEARCHED) for rate in cell.rates}

    def best(self, cell: Cell) -> float:
        """The rate whose run is worth most, on the mean of its curve: quick and far."""
        found = {rate: merit(run) for rate, run in self.searched(cell).items()}
        return max(found, key=found.__getitem__)

    def results(self, cell: Cell) -> list[Result]:
        """At the best rate, one a seed."""
        rate = self.best(cell)
        return [self.run(cell, rate, seed) for seed in self.seeds]

    def run(self, cell: Cell, rate: float, seed: int) -> Result:
        """Made, where there is a model, or read; see :func:`experiments.kept.kept`."""
        cell = self.cut(cell)
        file = self._out / cell.folder / f"{rate:g}" / f"seed-{seed}.json"
        settings = {name: value for name, value in asdict(cell).items() if name != "rates"}
        settings.update(rate=rate, seed=seed, mu=MU, tokens=TOKENS, evaluation_texts=self._texts)
        settings["model"] = self._model and model_name(self._model)
        found = kept(file, settings, made=self._model is not None)
        if found is not None:
            return found
        self._warm_up(cell)
        result = {"settings": settings, **self._made(cell, rate, seed)}
        write_json(file, result)
        last = result["curve"][-1]
        self._say(
            f"{cell.problem}: {cell.name}, {rate:g}, seed {seed}: "
            f"{result['curve'][0]['reward']:.3f} -> {last['reward']:.3f}, "
            f"KL {last['kl']:.1f}, {last['seconds']:.1f} s"
        )
        return result

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, highlight=False, soft_wrap=True)

    def _problem(self, cell: Cell) -> tuple[Writer, Judge]:
        """A fresh copy of the model, and what judges its texts."""
        if self._loaded is None:
            assert self._model is not None
            try:
                self._loaded = (
                    AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32),
                    AutoTokenizer.from_pretrained(self._model),
                )
            except (OSError, ValueError) as error:
                raise ModelError(f"cannot load the model {self._model!r}: {error}") from error
        start, tokenizer = self._loaded
        start.requires_grad_(False)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = start.config.pad_token_id
        if cell.reward not in self._scores:
            self._scores[cell.reward] = SCORES[cell.reward](self._data)
        writer = Writer(copy.deepcopy(start), tokenizer, TOKENS)
        return writer, Judge(self._scores[cell.reward], cell.beta, start)

    def _made(self, cell: Cell, rate: float, seed: int) -> Result:
        writer, judge = self._problem(cell)
        record = Record(
            lambda step: evaluated(writer, judge, self._texts, FRESH * (1 + seed) + step), cell
        )
        checked = 0.0
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pairs of equal scores, where scores are 0 and 1
            if cell.method == GRPO:
                grpo.train(writer, judge, cell, rate, seed, began=record.began, ended=record.ended)
            else:
                method: Method = STEPPED[cell.method](writer, judge, cell, rate, seed)
                started = time.process_time()
                method.verify()
                checked = time.process_time() - started
                for _ in range(cell.steps):
                    record.began()
                    method.step()
                    record.ended()
        return {
            "curve": record.curve,
            "seconds_per_step": statistics.median(record.durations),
            "verify_seconds": checked,
            "wall_seconds": record.wall_seconds,
            "texts": record.texts,
            "versions": versions("trl"),
            "machine": {**machine(torch.device("cpu")), "cpu": cpu_model()},
        }

    def _warm_up(self, cell: Cell) -> None:
        """A step of a small one of its kind: kernels are compiled before any time is taken."""
        small = replace(cell, directions=min(cell.directions, 2), steps=1, eval_every=1)
        if small not in self._warm:
            self._made(small, 0.0, SEARCHED)
            self._warm.add(small)

    def memory(self, cell: Cell) -> dict[str, int]:
        """Bytes in tensors at most: of one step, and of generating as many texts, scores apart.

        Those of a full-size direction are generated one side after the other.
        """
        writer, judge = self._problem(cell)
        judge = Judge(
            lambda texts: [float(i % 2) for i in range(len(texts))], cell.beta, judge.start
        )
        at_once = cell.texts // (2 * cell.directions if cell.method == FULL_SIZE else 1)
        writer.sample(at_once)
        weights = stored_bytes(writer.model.parameters())
        plain = weights + growth(lambda: writer.sample(at_once)).most
        if cell.method == GRPO:
            small = replace(cell, steps=2)

            def nothing() -> None: ...

            def train() -> None:
                grpo.train(writer, judge, small, 0.0, SEARCHED, began=nothing, ended=nothing)

            return {"plain": plain, "step": weights + growth(train).most}
        few = replace(cell, directions=1) if cell.method == FULL_SIZE else cell
        method: Method = STEPPED[cell.method](writer, judge, few, 0.0, SEARCHED)
        method.verify()
        method.step()
        device = torch.device("cpu")
        step = peak_memory(method.step, writer.model, method.optimizer, device)
        return {"plain": plain, "step": step}


def merit(run: Result) -> float:
    """The mean worth over the evaluations after the start."""
    return statistics.fmean(point["worth"] for point in run["curve"][1:])


def reached(run: Result, reward: float, what: str = "seconds") -> float | None:
    """How many seconds, steps or samples it took to this reward, interpolated; None: never."""
    curve = run["curve"]
    if curve[0]["reward"] >= reward:
        return 0.0
    for before, after in pairwise(curve):
        if after["reward"] >= reward:
            share = (reward - before["reward"]) / (after["reward"] - before["reward"])
            return float(before[what] + share * (after[what] - before[what]))
    return None
