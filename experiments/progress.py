"""How far a run is: its name and a bar on a terminal, about ten plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

LINES = 10


class ProgressLines(TrainerCallback):
    """Shows steps, training loss, development loss and accuracy, and the time that is left."""

    def __init__(self, console: Console, name: str, scored: bool = True) -> None:
        self._console, self._name, self._scored = console, name, scored
        self._shown: dict[str, str] = {"loss": "-", "dev": "-"}
        self._logged = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._first = time.perf_counter(), state.global_step
        if self._console.is_terminal:  # above the bar, which fills 80 columns
            self._console.print(self._name, highlight=False)
        self._progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  dev {task.fields[dev]}"),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        shown: dict[str, Any] = dict(self._shown)
        self._bar = self._progress.add_task(self._name, total=state.max_steps, **shown)
        self._progress.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._shown["loss"] = f"{float(logs['loss']):.4f}"
            self._show()

    def _show(self) -> None:
        shown: dict[str, Any] = dict(self._shown)
        self._progress.update(self._bar, **shown)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        step, steps = state.global_step, state.max_steps
        self._shown["dev"] = f"{metrics['eval_loss']:.4f}"
        if self._scored:
            self._shown["dev"] += f", {100 * metrics['eval_accuracy']:.1f} %"
        self._show()
        due = step - self._logged >= steps / LINES or step == steps
        if self._console.is_terminal or not due:
            return
        self._logged = step
        spent = time.perf_counter() - self._started
        left = spent / max(step - self._first, 1) * (steps - step)
        self._console.print(
            f"{self._name}: step {step}/{steps}, training loss {self._shown['loss']}, "
            f"development {self._shown['dev']}, {left:.0f} s left for this method",
            highlight=False,
            soft_wrap=True,
        )
