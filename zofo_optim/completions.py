"""Texts of a population: prompts laid out in rows, generated, and what the model makes of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


class Rows(NamedTuple):
    """The rows of a population, in the order of its directions; see :meth:`HybridZOFO.ask`."""

    prompts: list[Any]
    """As the data set has them."""
    tokens: list[list[int]]
    """Of the prompts."""
    groups: list[int]
    """The number of each row's prompt."""
    columns: dict[str, list[Any]]
    """The data set's others."""


def check_prompts(examples: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError or TypeError where these are no examples with prompts."""
    for example in examples:
        if "prompt" not in example:
            raise ValueError(
                f"the data set must have a column 'prompt', got {', '.join(example) or 'none'}"
            )
        prompt = example["prompt"]
        conversation = isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping)
        if not isinstance(prompt, str) and not conversation:
            raise TypeError(
                "prompt must be a text, or a list of messages with role and content, got "
                f"{prompt!r:.200}"
            )


def lay_out(
    examples: Sequence[Mapping[str, Any]],
    tokens: Sequence[list[int]],
    times: Sequence[int],
) -> Rows:
    """The examples so often and in such an order, by their numbers ``times``."""
    names = dict.fromkeys(name for example in examples for name in example)
    return Rows(
        [examples[i]["prompt"] for i in times],
        [tokens[i] for i in times],
        [*times],
        {
            name: [examples[i].get(name) for i in times]
            for name in names
            if name not in ("prompt", "completion", "completion_ids")
        },
    )


def of_a_population(prompts: int, generations: int, together: int) -> list[int]:
    """The number of each row's prompt, for :func:`lay_out`.

    ``together`` prompts at a time share a direction. Each gets ``generations`` rows: half as many
    directions, forth and back.
    """
    return [
        prompt
        for first in range(0, prompts, together)
        for _ in range(generations)
        for prompt in range(first, first + together)
    ]


class Writer:
    """Generates completions of rows, in batches that any causal or encoder-decoder model takes.

    Args:
        processing_class: the tokenizer; it needs a chat template where prompts are conversations.
        config: of the generation.
        chat_template_kwargs: for the template.
    """

    def __init__(
        self,
        processing_class: Any,
        config: GenerationConfig,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = processing_class
        self.config = config
        self._template = dict(chat_template_kwargs or {})
        ends = config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt; of a conversation, up to where the assistant answers."""
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        goes_on = prompt[-1]["role"] == "assistant"
        found = self._tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=True,
            return_dict=True,
            **self._template,
        )
        return list(found["input_ids"])

    def decode(self, prompt: Prompt, tokens: Sequence[int]) -> Any:
        """The completion of a prompt: a text, or the assistant's message."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether the text came to its end."""
        return not self._ends or (len(tokens) > 0 and tokens[-1] in self._ends)

    def batch(self, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """Prompts, padded on the left: ``input_ids`` and ``attention_mask``, shape (B, longest)."""
        width = max(map(len, rows.tokens))
        pad = self.config.pad_token_id
        assert isinstance(pad, int)
        ids = [[pad] * (width - len(row)) + row for row in rows.tokens]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows.tokens]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def write(self, model: Any, rows: Rows, device: torch.device) -> list[list[int]]:
        """The tokens of each row's completion, the one that ends it included."""
        batch = self.batch(rows, device)
        made = model.generate(**batch, generation_config=self.config)
        start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        return [self._until_the_end(row) for row in made[:, start:].tolist()]

    def _until_the_end(self, tokens: list[int]) -> list[int]:
        for position, token in enumerate(tokens):
            if token in self._ends:
                return tokens[: position + 1]
        return tokens

    def probe(self, model: Any, rows: Rows, device: torch.device) -> Tensor:
        """A number for each row that any displacement changes, by two tokens, shape (B,).

        For :meth:`HybridZOFO.verify`: it runs the model as :meth:`write` does, over a prompt and
        with a cache, and is as smooth as a score of a text is not.
        """
        taboo = {*self._ends, self.config.pad_token_id}
        token = next(i for i in range(len(taboo) + 1) if i not in taboo)
        config = copy.deepcopy(self.config)
        changes: dict[str, Any] = dict(do_sample=False, num_beams=1, max_new_tokens=2)
        changes |= dict(min_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        changes |= dict(temperature=None, top_p=None, top_k=None, min_p=None)
        for name, value in changes.items():
            setattr(config, name, value)
        made = model.generate(
            **self.batch(rows, device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Always(token)]),
        )
        wide = [torch.promote_types(logits.dtype, torch.float32) for logits in made.logits]
        found = [
            logits.to(dtype).log_softmax(-1)[:, token]
            for logits, dtype in zip(made.logits, wide, strict=True)
        ]
        return torch.stack(found).mean(0)

    def log_probs(
        self, model: Any, rows: Rows, completions: Sequence[Sequence[int]], device: torch.device
    ) -> Tensor:
        """log p of each completion after its prompt, at the temperature that it is sampled at.

        Returns:
            Shape (B,), at least fp32.
        """
        width = max(1, *map(len, completions))
        pad = self.config.pad_token_id
        made = torch.tensor([[*row, *[pad] * (width - len(row))] for row in completions])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
        made, mask = made.to(device), mask.to(device)
        batch = self.batch(rows, device)
        if model.config.is_encoder_decoder:
            start = made.new_full((len(made), 1), self._decoder_start(model))
            logits = model(**batch, decoder_input_ids=torch.cat([start, made[:, :-1]], 1)).logits
        else:
            prompt = batch["input_ids"].shape[1]
            whole = torch.cat([batch["attention_mask"], mask], 1)
            inputs = {"input_ids": torch.cat([batch["input_ids"], made], 1)}
            inputs["attention_mask"] = whole
            if "position_ids" in inspect.signature(model.forward).parameters:
                inputs["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
            logits = model(**inputs, use_cache=False).logits[:, prompt - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.do_sample and self.config.temperature not in (None, 1.0):
            logits = logits / self.config.temperature
        chosen = logits.gather(2, made.unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
        found: Tensor = (chosen * mask).sum(1)
        return found

    def _decoder_start(self, model: Any) -> int:
        start = self.config.decoder_start_token_id
        return int(model.generation_config.decoder_start_token_id if start is None else start)


class _Always(LogitsProcessor):  # type: ignore[misc]
    """Leaves the choice of one token."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._token] = 0.0
        return only


def copy_of(model: nn.Module) -> nn.Module:
    """The model as it is now, to compare with later; in memory of its own."""
    return copy.deepcopy(model).requires_grad_(False).eval()
