"""One run of `finetune.py`: a method, a task and a seed, by transformers' Trainer."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from zofo_optim import HybridZOFO
from zofo_optim.trainer import HybridTrainer
from zofo_optim.whole import write_json

from .classification import Batch
from .measure import peak_memory
from .methods import METHODS, prepare, save, trained_parameters
from .models import Problem
from .progress import ProgressLines
from .scores import Scores
from .settings import Settings

LOSS_EXAMPLES = 256
"""Of the training examples, how many the curves' training loss is taken over."""


class RunError(ValueError):
    """A run cannot go on where it is to be written; the message says why."""


class Clock(TrainerCallback):
    """Seconds spent in optimizer steps; the first one, which may compile, counts as the second."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self.durations: list[float] = []
        self._device = device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.durations.append(self._now() - self._started)
        if len(self.durations) > 1:
            self.seconds += self.durations[-1] * (2 if len(self.durations) == 2 else 1)


class FinetuneTrainer(HybridTrainer):
    """A HybridTrainer whose loss and scores are those of the problem's data."""

    def __init__(self, problem: Problem, clock: Clock, **options: Any) -> None:
        self.problem, self.clock = problem, clock
        train = problem.train
        super().__init__(
            train_dataset=range(len(train)),  # type: ignore[arg-type]
            eval_dataset=range(len(problem.dev)),
            data_collator=lambda indices: train.batch(indices),
            callbacks=[clock],
            **options,
        )

    @property
    def trained(self) -> nn.Module:
        """The model; the Trainer may have none."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def example_losses(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        return self.problem.train.losses(model, inputs)

    def load_finished(self, checkpoint: str) -> None:
        """The state and the best weights of a training that had come to its end."""
        self.create_optimizer_and_scheduler(self.args.max_steps)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        self._load_best_model()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model = self.trained
        scores = asdict(self.problem.dev.score(model))
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        metrics["eval_train_loss"] = self.problem.train.mean_loss(model, LOSS_EXAMPLES)
        metrics["eval_seconds"] = self.clock.seconds
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def finished(settings: Settings, folder: Path, weights: bool) -> dict[str, Any] | None:
    """The result of this run, if it is there already.

    Raises:
        RunError: the folder holds a run with other settings, or one without the weights wanted.
    """
    note, result = folder / "settings.json", folder / "result.json"
    if not note.is_file():
        return None
    try:
        there = _flat(json.loads(note.read_text(encoding="utf-8")))
        found: dict[str, Any] | None = None
        if result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{folder} holds a damaged run ({error}): --overwrite it") from error
    own = _flat(json.loads(json.dumps(asdict(settings))))
    # earlier versions had fewer settings
    there = {**{f.name: f.default for f in fields(Settings)}, **there}
    others = [
        f"{k} {there.get(k)!r} there, {own[k]!r} asked for" for k in own if there.get(k) != own[k]
    ]
    if others:
        raise RunError(
            f"{folder} holds a run with other settings ({'; '.join(others)}): take another --out, "
            "or --overwrite"
        )
    if found is not None and weights and "saved" not in found:
        raise RunError(f"{folder} holds a run without its weights: --overwrite it, or --no-save")
    return found


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, **settings.get("adapter", {}), "adapter": None}


def prepared(settings: Settings, problem: Problem) -> tuple[nn.Module, HybridZOFO]:
    """A copy of the base model, on the CPU, with its adapter, and the optimizer of what trains.

    Raises:
        ModelError: the method does not fit the model.
    """
    torch.manual_seed(settings.seed)
    model, groups = prepare(
        METHODS[settings.method],
        problem,
        settings.adapter,
        zo={"lr": settings.lr_zo or 0.0, "mu": settings.mu},
        fo={"lr": settings.lr_fo or 0.0},
        include=settings.include,
        directions=settings.directions,
    )
    optimizer = HybridZOFO(
        groups,
        estimator=settings.estimator,
        num_samples=settings.samples,
        distribution=settings.distribution,
        structure=settings.structure,
        rank=settings.rank,
        directions=settings.directions,
        perturbation=settings.perturbation,
        zo_rule=settings.zo_rule,
        seed=settings.seed,
        fo_optimizer={"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.optimizer],
        weight_decay=0,
    )
    return model, optimizer


def closure_of(
    settings: Settings, problem: Problem, model: nn.Module, batch: Batch
) -> Callable[[], Tensor]:
    """Gives what the optimizer takes: losses of the training batch's examples, or their mean."""

    def closure() -> Tensor:
        losses = problem.train.losses(model, batch)
        return losses if settings.directions == "per_example" else losses.mean()

    return closure


def run(
    settings: Settings,
    problem: Problem,
    folder: Path,
    console: Console,
    *,
    device: torch.device,
    name: str = "",
    report_to: Sequence[str] = (),
    keep_weights: bool = True,
) -> dict[str, Any]:
    """Train as `settings` say, or go on where an interrupted run in `folder` stopped.

    The folder holds no other run; see :func:`finished`. Its progress is shown under `name`.

    Returns:
        What `finetune.py` documents, also written to `result.json`.

    Raises:
        ModelError: the method does not fit the model.
        RunError: the folder cannot be made, or `report_to` names what cannot report.
    """
    method = METHODS[settings.method]
    model, optimizer = prepared(settings, problem)
    untrained = problem.untrained(device)
    model.to(device)
    checkpoints = str(folder / "checkpoints")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: cannot write there ({error})") from error
    for part in folder.glob("checkpoints/checkpoint-*"):
        if not (part / "trainer_state.json").is_file():
            shutil.rmtree(part)  # its saving was interrupted
    checkpoint = None
    if Path(checkpoints).is_dir():
        checkpoint = get_last_checkpoint(checkpoints)  # type: ignore[no-untyped-call]
    arguments = TrainingArguments(
        output_dir=checkpoints,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        lr_scheduler_type=settings.schedule,
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=checkpoint is None,
        save_steps=settings.eval_every,
        save_total_limit=1,
        load_best_model_at_end=True,  # by the development loss
        logging_steps=max(1, settings.steps // 100),
        logging_nan_inf_filter=False,
        restore_callback_states_from_checkpoint=True,  # of early stopping
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=list(report_to),
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    clock = Clock(device)
    try:
        trainer = FinetuneTrainer(
            problem, clock, model=model, args=arguments, optimizers=(optimizer, None)
        )
    except (ValueError, RuntimeError) as error:
        if not report_to:
            raise
        raise RunError(f"--report-to {' '.join(report_to)}: {error}") from error
    trainer.remove_callback(PrinterCallback)
    name = name or f"{settings.method}, seed {settings.seed}"
    trainer.add_callback(ProgressLines(console, name, problem.form.scored))
    if settings.patience:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    if checkpoint is not None:
        clock.seconds = _seconds_until(Path(checkpoint))
    write_json(folder / "settings.json", asdict(settings))
    if checkpoint is None or not checkpoint.endswith(f"-{settings.steps}"):
        trainer.train(resume_from_checkpoint=checkpoint)
    else:  # it ended before its result was written; the Trainer would make another step
        trainer.load_finished(checkpoint)

    result = _result(trainer, settings, problem, untrained)
    if keep_weights:
        result["saved"] = save(method, model, problem, folder)
        model = problem.base  # saving took the adapter apart
    write_json(folder / "result.json", result)
    for part in folder.glob("checkpoints/checkpoint-*"):
        shutil.rmtree(part)
    if not any(Path(checkpoints).iterdir()):  # reports may be there
        Path(checkpoints).rmdir()
    return result


def _seconds_until(checkpoint: Path) -> float:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return max((entry.get("eval_seconds", 0.0) for entry in history), default=0.0)


def _result(
    trainer: FinetuneTrainer, settings: Settings, problem: Problem, untrained: Scores
) -> dict[str, Any]:
    """Of the trainer's log, the best weights' test scores, and one more step's memory."""
    history, optimizer = trainer.state.log_history, trainer.hybrid_optimizer
    curve = [
        {"step": e["step"], **{k[5:]: e[k] for k in e if k.startswith("eval_")}}
        for e in history
        if "eval_loss" in e
    ]
    best = min(curve[1:], key=_rank, default=curve[0])
    durations = trainer.clock.durations
    groups = optimizer.param_groups
    mean = curve[-1]["seconds"] / trainer.state.global_step
    result: dict[str, Any] = {
        "task": settings.task,
        "method": settings.method,
        "seed": settings.seed,
        "settings": asdict(settings),
        "scored": problem.form.scored,
        "best": best,
        "test": asdict(problem.test.score(trainer.trained)),
        "untrained": asdict(untrained),
        "head": None if problem.causal else settings.head,
        "test_examples": len(problem.test),
        "steps": trainer.state.global_step,
        "stopped_early": trainer.state.global_step < settings.steps,
        "seconds": curve[-1]["seconds"],
        "seconds_per_step": statistics.median(durations[1:] or durations or [mean]),
        "skipped_steps": optimizer.skipped_steps,
        "parameters_zo": sum(p.numel() for p in trained_parameters(groups, "zo")),
        "parameters_fo": sum(p.numel() for p in trained_parameters(groups, "fo")),
        "curve": curve,
        "losses": [
            {k: e[k] for k in ("step", "loss", "projected_grad") if k in e}
            for e in history
            if "loss" in e
        ],
    }
    result["peak_memory_bytes"] = _peak_of_a_step(trainer, settings, problem)
    return result


def _rank(point: dict[str, float]) -> float:
    return math.inf if math.isnan(point["loss"]) else point["loss"]


def _peak_of_a_step(trainer: FinetuneTrainer, settings: Settings, problem: Problem) -> int:
    """Of an extra step on the longest training batch; the weights are put back."""
    lengths, size = problem.train.lengths, trainer.args.per_device_train_batch_size
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-size:]
    batch = problem.train.batch(longest)
    optimizer, model = trainer.hybrid_optimizer, trainer.trained
    live: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().to("cpu", copy=True) for p in live]

    closure = closure_of(settings, problem, model, batch)

    def step() -> None:
        optimizer.backward(closure)
        optimizer.step()
        optimizer.zero_grad()

    optimizer.zero_grad()
    peak = peak_memory(step, model, optimizer, trainer.args.device)
    with torch.no_grad():
        for p, before in zip(live, kept, strict=True):
            p.copy_(before)
    return peak
