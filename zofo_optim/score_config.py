"""Arguments of the trainer of scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

SCALES = ("group", "batch", "centered_rank", "none")


def _argument(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass
class ScoreConfig(TrainingArguments):  # type: ignore[misc]
    """``transformers.TrainingArguments`` with those of a population of completions.

    Names and meanings are those of TRL's ``GRPOConfig`` where it has them. Other defaults than
    ``TrainingArguments``: ``learning_rate`` 1e-2 (of the zeroth-order weights, whose update rule
    makes the scale of scores one), ``logging_steps`` 10, ``remove_unused_columns`` False, since
    reward functions see the columns, and ``dataloader_drop_last`` True.
    ``per_device_train_batch_size`` counts completions, as in TRL: ``num_generations`` of each
    prompt.

    Args:
        num_generations: completions of each prompt in a step, in pairs that share a direction, one
            displaced forth and one back. An even number.
        num_generations_eval: of each prompt in evaluations; None: ``num_generations``.
        prompts_per_direction: so many prompts have a direction together, whose mean is its score.
        max_completion_length: tokens.
        temperature: of sampling; 0 decodes greedily.
        top_p, top_k, min_p, repetition_penalty: of sampling, as in ``GenerationConfig``.
        generation_kwargs: further fields of ``GenerationConfig``.
        cache_implementation: of the generation, such as "static".
        chat_template_kwargs: for the chat template, where prompts are conversations.
        common_noise: the two completions of a pair draw the same noise, so that they differ by what
            the displacement does; see :class:`zofo_optim.common_noise`.
        beta: weight of log p(completion) - log p_start(completion), which is taken from the
            reward: its mean is the KL divergence to the start. Above 0 the trainer keeps a copy of
            the start's weights, and runs both over all completions.
        reward_weights: of each reward function; None: 1.
        scale_rewards: "group" makes z-scores of each prompt's rewards, "batch" of all,
            "centered_rank" ranks of all; "none" leaves them. See
            :func:`zofo_optim.shape_scores`.
        log_completions: print completions when logging, and keep them as parquet files.
        num_completions_to_print: None: all of the step.

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
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("num_generations", "prompts_per_direction", "max_completion_length"):
            self._check(name, _is_count(getattr(self, name)), "an int >= 1")
        self._check("num_generations", self.num_generations % 2 == 0, "even: pairs of completions")
        if self.num_generations_eval is not None:
            self._check("num_generations_eval", _is_count(self.num_generations_eval), "an int >= 1")
        self._check("temperature", self.temperature >= 0, ">= 0")
        self._check("beta", self.beta >= 0, ">= 0")
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
        if isinstance(further, dict) and further.get("num_return_sequences", 1) != 1:
            raise ValueError(
                "generation_kwargs must not have num_return_sequences, which is num_generations, "
                f"got {further['num_return_sequences']!r}"
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
