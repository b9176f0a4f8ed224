"""GRPO as TRL's trainer makes it, on the prompt and the rewards of the other methods."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from .grid import Cell
from .scores import PROMPT
from .texts import Judge, Writer


class _Told(TrainerCallback):
    """Tells when steps begin and end."""

    def __init__(self, began: Callable[[], None], ended: Callable[[], None]) -> None:
        self._began, self._ended = began, ended

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended()


def train(
    writer: Writer,
    judge: Judge,
    cell: Cell,
    rate: float,
    seed: int,
    *,
    began: Callable[[], None],
    ended: Callable[[], None],
) -> None:
    """Train all weights by :class:`trl.GRPOTrainer`: a group of all texts of a step.

    Defaults are TRL's, but for a constant rate, and no penalty of its own.

    Args:
        writer, judge: as of the other methods.
        cell: its steps and texts of a step.
        rate: of AdamW.
        seed: of the trainer.
        began, ended: called before and after each step.
    """
    trl: Any = importlib.import_module("trl")
    writer.model.requires_grad_(True)

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        length = max(map(len, completion_ids))
        padding = int(writer.tokenizer.pad_token_id)
        rows = [ids + [padding] * (length - len(ids)) for ids in completion_ids]
        prompts = writer.prompt.repeat(len(rows), 1)
        worth: list[float | None] = judge.worth(
            writer, torch.cat([prompts, torch.tensor(rows)], 1)
        ).tolist()
        return worth

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            folder,
            max_steps=cell.steps,
            per_device_train_batch_size=cell.texts,
            num_generations=cell.texts,
            learning_rate=rate,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            beta=0.0,
            max_completion_length=writer.tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
        trainer = trl.GRPOTrainer(
            model=writer.model,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": PROMPT}] * cell.texts),
            processing_class=writer.tokenizer,
            callbacks=[_Told(began, ended)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
