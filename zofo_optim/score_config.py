"""Arguments of the trainer of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, TrainingArguments

_OURS = {
    *("num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "prompt_lookup_num_tokens"),
    *("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "cache_implementation", "eos_token_id", "pad_token_id"),
}
"""Fields of ``GenerationConfig`` that the arguments say otherwise, or the trainer."""
SCALES = ("group", "batch", "centered_rank", "none")


def _argument(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass
class ScoreConfig(TrainingArguments):  # type: ignore[misc]
    """``transformers.TrainingArguments`` with those of a population of completions.

    Names and meanings are those of TRL's ``GRPOConfig`` where it has them. Other defaults than
    ``TrainingArguments``: ``learning_rate`` 1e-2 (of the zeroth-order weights, whose update rule
    makes the scale of scores one), ``logging_steps`` 10, ``remove_unused_columns`` False, since
    reward functions see the columns, ``dataloader_drop_last`` True, and the best model is that of
    the largest ``reward``. ``per_device_train_batch_size`` counts completions, as in TRL:
    ``num_generations`` of each prompt. ``weight_decay`` is of the weights; ``optim`` and
    ``max_grad_norm`` have no effect, as there are no gradients.

    Args:
        num_generations: completions of each prompt in a step, in pairs that share a direction, one
            displaced forth and one back. An even number.
        num_generations_eval: of each prompt in evaluations; None: ``num_generations``.
        prompts_per_direction: so many prompts have a direction together, whose mean is its score.
        max_completion_length: tokens.
        temperature: of sampling; 0 decodes greedily.
        top_p, top_k, min_p, repetition_penalty: of sampling, as in ``GenerationConfig``.
        generation_kwargs: further fields of ``GenerationConfig``; what neither these nor the
            arguments say is the model's own, but for beams.
        cache_implementation: of the generation, such as "static".
        chat_template_kwargs: for the chat template, where prompts are conversations.
        common_noise: the two completions of a pair draw the same noise, so that they differ by what
            the displacement does; see :class:`zofo_optim.common_noise`.
        beta: weight of the KL divergence to the start, per token: the mean of log p - log p_start
            over a completion's tokens is taken from its reward. Above 0 the trainer keeps a copy of
            the start's weights, and runs both over all completions.
        reward_weights: of each reward function; None: 1.
        scale_rewards: "group" makes z-scores of each prompt's rewards, "batch" of all,
            "centered_rank" ranks of all; "none" leaves them. True is "group", False "none". See
            :func:`zofo_optim.shape_scores`.
        log_completions: print completions when logging, and keep them as parquet files.
        num_completions_to_print: None: all of the last batch.

    Raises:
        ValueError: an argument that cannot be used.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # as transformers has it
        *TrainingArguments._VALID_DICT_FIELDS,
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    learning_rate: float = _argument(1e-2, "Of the zeroth-order weights.")
    logging_steps: float = _argument(10, "Steps between logs.")
    remove_unused_columns: bool = _argument(False, "Reward functions see the columns.")
    dataloader_drop_last: bool = _argument(True, "Leave out the last, smaller batch.")

    num_generations: int = _argument(8, "Completions of each prompt in a step; even.")
    num_generations_eval: int | None = _argument(None, "In evaluations.")
    prompts_per_direction: int = _argument(1, "Prompts that have a direction together.")
    max_completion_length: int = _argument(256, "Tokens.")
    temperature: float = _argument(1.0, "Of sampling; 0 decodes greedily.")
    top_p: float = _argument(1.0, "Of sampling.")
    top_k: int = _argument(0, "Of sampling; 0 for all tokens.")
    min_p: float | None = _argument(None, "Of sampling.")
    repetition_penalty: float = _argument(1.0, "Of generation.")
    generation_kwargs: dict[str, Any] | str | None = _argument(
        None, "Further fields of GenerationConfig."
    )
    cache_implementation: str | None = _argument(None, "Of generation, such as static.")
    chat_template_kwargs: dict[str, Any] | str | None = _argument(None, "Of the chat template.")
    common_noise: bool = _argument(True, "Pairs draw the same noise.")
    beta: float = _argument(0.0, "Weight of the KL divergence to the start.")
    reward_weights: list[float] | None = _argument(None, "Of the reward functions.")
    scale_rewards: str = _argument("group", f"One of {', '.join(SCALES)}.")
    log_completions: bool = _argument(False, "Print and keep completions.")
    num_completions_to_print: int | None = _argument(None, "None: all.")

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.scale_rewards, bool):  # as TRL has it
            self.scale_rewards = "group" if self.scale_rewards else "none"
        for name in ("num_generations", "prompts_per_direction", "max_completion_length"):
            self._check(name, _is_count(getattr(self, name)), "an int >= 1")
        self._check("num_generations", self.num_generations % 2 == 0, "even: pairs of completions")
        if self.num_generations_eval is not None:
            self._check("num_generations_eval", _is_count(self.num_generations_eval), "an int >= 1")
        for name in ("temperature", "beta"):
            self._check(name, _is_number(getattr(self, name), 0), "a number >= 0")
        self._check("top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]")
        self._check("min_p", self.min_p is None or _is_number(self.min_p, 0, 1), "in [0, 1]")
        self._check("scale_rewards", self.scale_rewards in SCALES, f"one of {SCALES}")
        together = self.num_generations * self.prompts_per_direction
        self._check(
            "per_device_train_batch_size",
            self.per_device_train_batch_size % together == 0,
            f"a multiple of num_generations x prompts_per_direction, {together}",
        )
        self._check(
            "dataloader_drop_last",
            self.dataloader_drop_last or self.prompts_per_direction == 1,
            "True where prompts_per_direction > 1",
        )
        self._check("remove_unused_columns", not self.remove_unused_columns, "False")
        further = self.generation_kwargs
        if isinstance(further, dict):
            known = set(GenerationConfig().to_dict())  # type: ignore[no-untyped-call]
            if wrong := sorted(set(further) - (known - _OURS)):
                raise ValueError(
                    "generation_kwargs must be fields of GenerationConfig, other than those of "
                    f"the trainer, {sorted(_OURS)}, got {wrong}"
                )

    def _check(self, name: str, sound: bool, rule: str) -> None:
        if not sound:
            raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def prompts_of_a_step(self) -> int:
        """In each batch of a process."""
        return int(self.train_batch_size) // self.num_generations

    @property
    def generations_eval(self) -> int:
        """Completions of each prompt in evaluations."""
        return self.num_generations_eval or self.num_generations


def _is_number(value: Any, low: float, high: float = math.inf) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
