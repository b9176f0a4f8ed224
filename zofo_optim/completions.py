"""Texts of a population: prompts laid out in rows, generated, and what the model makes of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .names import within_peft
from .score_config import ScoreConfig

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""
_TAKEN = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
"""Names by which reward functions get other things."""


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
        if taken := sorted(_TAKEN & set(example)):
            raise ValueError(
                f"the data set must not have columns {sorted(_TAKEN)}, by which reward functions "
                f"get other things, got {taken}"
            )
        prompt = example["prompt"]
        conversation = isinstance(prompt, list) and len(prompt) > 0
        if not isinstance(prompt, str) and not (conversation and all(map(_is_message, prompt))):
            raise TypeError(
                "prompt must be a text, or a list of messages with role and content, got "
                f"{prompt!r:.200}"
            )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and {"role", "content"} <= message.keys()


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
    """Generates completions of rows, in batches that the model takes.

    Prompts are padded on the left, where their completions follow them; an encoder's on the right.

    Args:
        model: a causal or encoder-decoder language model.
        processing_class: the tokenizer, or a processor with one; it needs a chat template where
            prompts are conversations.
        args: of the generation.
    """

    def __init__(self, model: Any, processing_class: Any, args: ScoreConfig) -> None:
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.config = _generation_config(model, self._tokenizer, args)
        """Whole: nothing is left to the model's own."""
        template = args.chat_template_kwargs
        self._template = dict(template) if isinstance(template, dict) else {}
        self._ends = _tokens(self.config.eos_token_id)
        self._encoder = bool(model.config.is_encoder_decoder)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt; of a conversation, up to where the assistant answers, or goes on.

        Raises:
            ValueError: there are none.
        """
        if isinstance(prompt, str):
            tokens = list(self._tokenizer(prompt)["input_ids"])
        else:
            goes_on = prompt[-1]["role"] == "assistant"
            options = dict(add_generation_prompt=not goes_on, continue_final_message=goes_on)
            options |= {**self._template, "tokenize": True, "return_dict": True}
            tokens = list(self._tokenizer.apply_chat_template(prompt, **options)["input_ids"])
        if not tokens:
            raise ValueError(f"prompt must have at least one token, got {prompt!r:.200}")
        return tokens

    def decode(self, prompt: Prompt, tokens: Sequence[int]) -> Any:
        """The completion of a prompt: a text, or the assistant's message."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether the text came to its end before its length did."""
        if len(tokens) > 0 and tokens[-1] in self._ends:
            return True
        if self.config.stop_strings:
            return len(tokens) < int(self.config.max_new_tokens)
        return not self._ends

    def batch(self, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """Prompts, padded: ``input_ids`` and ``attention_mask``, shape (B, longest)."""
        width = max(map(len, rows.tokens))
        pad = self.config.pad_token_id
        assert isinstance(pad, int)
        ids: list[list[int]] = []
        mask: list[list[int]] = []
        for row in rows.tokens:
            missing = width - len(row)
            for found, inside, outside in ((ids, row, pad), (mask, [1] * len(row), 0)):
                padding = [outside] * missing
                found.append(inside + padding if self._encoder else padding + inside)
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def write(self, model: Any, rows: Rows, device: torch.device) -> list[list[int]]:
        """The tokens of each row's completion, the one that ends it included."""
        batch = self.batch(rows, device)
        stops = {"tokenizer": self._tokenizer} if self.config.stop_strings else {}
        made = model.generate(
            **batch, generation_config=self.config, **stops, **_no_other_settings(model)
        )
        start = 1 if self._encoder else batch["input_ids"].shape[1]
        return [self._until_the_end(row) for row in made[:, start:].tolist()]

    def _until_the_end(self, tokens: list[int]) -> list[int]:
        for position, token in enumerate(tokens):
            if token in self._ends:
                return tokens[: position + 1]
        if self.config.stop_strings:  # what comes after such an end is padding
            while tokens and tokens[-1] == self.config.pad_token_id:
                tokens = tokens[:-1]
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
        changes |= dict(stop_strings=None, temperature=None, top_p=None, top_k=None, min_p=None)
        for name, value in changes.items():
            setattr(config, name, value)
        made = model.generate(
            **self.batch(rows, device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Always(token)]),
            **_no_other_settings(model),
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
            Shape (B,), at least fp32: sums over tokens.
        """
        width = max(1, *map(len, completions))
        pad = self.config.pad_token_id
        made = torch.tensor([[*row, *[pad] * (width - len(row))] for row in completions])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in completions])
        made, mask = made.to(device), mask.to(device)
        batch = self.batch(rows, device)
        if self._encoder:
            start = made.new_full((len(made), 1), self.config.decoder_start_token_id)
            logits = model(**batch, decoder_input_ids=torch.cat([start, made[:, :-1]], 1)).logits
        else:
            whole = torch.cat([batch["attention_mask"], mask], 1)
            inputs: dict[str, Any] = {"input_ids": torch.cat([batch["input_ids"], made], 1)}
            inputs["attention_mask"] = whole
            takes = _takes(model)
            if "position_ids" in takes:  # some count them from the first token, padding or not
                inputs["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
            if "logits_to_keep" in takes:
                inputs["logits_to_keep"] = width + 1
            logits = model(**inputs, use_cache=False).logits[:, -width - 1 : -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.do_sample and self.config.temperature not in (None, 1.0):
            logits = logits / self.config.temperature
        chosen = logits.gather(2, made.unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
        found: Tensor = (chosen * mask).sum(1)
        return found


def _takes(model: Any) -> set[str]:
    """Names of what the model's forward takes; a peft model's is that within."""
    return set(inspect.signature(within_peft(model).forward).parameters)


def _no_other_settings(model: Any) -> dict[str, bool]:
    """For ``generate``: transformers 4 prefers the model's own to a given one's defaults."""
    name, generate = "use_model_defaults", cast(Any, within_peft(model)).generate
    return {name: False} if name in inspect.signature(generate).parameters else {}


def _generation_config(model: Any, tokenizer: Any, args: ScoreConfig) -> GenerationConfig:
    """The arguments', and where they say nothing the model's own; beams are asked for."""
    own = {k: v for k, v in model.generation_config.to_dict().items() if v is not None}
    ends = _tokens(own.get("eos_token_id")) | _tokens(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    given: dict[str, Any] = dict(
        max_new_tokens=args.max_completion_length,
        max_length=None,
        do_sample=args.temperature > 0,
        num_beams=1,
        # where the arguments say nothing, sampling is plain, whatever the model's own
        temperature=args.temperature or None,
        top_p=args.top_p if args.temperature else None,
        top_k=args.top_k if args.temperature else None,
        min_p=(args.min_p or 0.0) if args.temperature else None,
        repetition_penalty=args.repetition_penalty,
        pad_token_id=min(ends, default=0) if pad is None else pad,
        eos_token_id=sorted(ends) or None,
    )
    if tokenizer.bos_token_id is not None:
        given["bos_token_id"] = tokenizer.bos_token_id
    if args.cache_implementation is not None:
        given["cache_implementation"] = args.cache_implementation
    further = args.generation_kwargs
    given |= further if isinstance(further, dict) else {}
    return GenerationConfig(**{**own, **given})  # type: ignore[no-untyped-call]


def _tokens(given: int | list[int] | None) -> set[int]:
    """A chat model's turns may end in another token than its texts."""
    return set() if given is None else {given} if isinstance(given, int) else {*given}


class _Always(LogitsProcessor):  # type: ignore[misc]
    """Leaves the choice of one token."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._token] = 0.0
        return only
