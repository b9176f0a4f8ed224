"""Texts of a language model, their probabilities, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .scores import PROMPT, Score


class Writer:
    """A causal language model that continues :data:`scores.PROMPT`.

    Args:
        model: in evaluation mode from here on.
        tokenizer: its own.
        tokens: of a text, after the prompt; fewer where the model ends it.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int
    ) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.model.eval()  # type: ignore[no-untyped-call]
        self.model.config.use_cache = True
        self.prompt: Tensor = tokenizer(PROMPT, return_tensors="pt").input_ids
        ends = model.config.eos_token_id
        self.ends = torch.tensor([] if ends is None else ends).view(-1)

    @torch.no_grad()
    def sample(self, rows: int) -> Tensor:
        """Token ids of so many texts, prompts included, drawn at temperature 1: (rows, length)."""
        prompt = self.prompt.repeat(rows, 1)
        model: Any = self.model
        made: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return made

    def texts(self, ids: Tensor) -> list[str]:
        """Prompts included."""
        decoded: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return decoded

    def log_probabilities(self, ids: Tensor, model: PreTrainedModel | None = None) -> Tensor:
        """Of whole texts, given their prompt: (rows,), in nats.

        Args:
            ids: as :meth:`sample` gives them.
            model: by which they are counted, instead of the writer.
        """
        first = self.prompt.shape[1]
        logits = (model or self.model)(ids[:, :-1]).logits[:, first - 1 :].float()
        made = ids[:, first:]
        each: Tensor = logits.log_softmax(-1).gather(-1, made[..., None])[..., 0]
        ended = torch.isin(made, self.ends).cumsum(1)
        counted = ended - torch.isin(made, self.ends).long() == 0  # the end itself counts
        return (each * counted).sum(1)


@dataclass
class Judged:
    """Of one batch of texts, each (rows,).

    Attributes:
        scores: without the penalty.
        log_ratios: log-probability under the writer less that under the start.
        worth: what is climbed: scores less the penalty.
    """

    scores: Tensor
    log_ratios: Tensor
    worth: Tensor


class Judge:
    """Scores of texts, less a penalty for how far the writer is from its start.

    The mean of the penalty, beta (log p(text) - log p_start(text)), is beta times the
    Kullback-Leibler divergence of the writer from the start, in nats a text.

    Args:
        score: of texts.
        beta: of the penalty; 0: none.
        start: a frozen copy of the writer's model, whose weights nobody displaces.
    """

    def __init__(self, score: Score, beta: float, start: PreTrainedModel) -> None:
        self.score, self.beta, self.start = score, beta, start

    @torch.no_grad()
    def worth(self, writer: Writer, ids: Tensor) -> Tensor:
        """What a method climbs: (rows,)."""
        if self.beta:
            return self.judged(writer, ids).worth
        return torch.tensor(self.score(writer.texts(ids)))

    @torch.no_grad()
    def judged(self, writer: Writer, ids: Tensor) -> Judged:
        """All that there is to say of the texts."""
        scores = torch.tensor(self.score(writer.texts(ids)))
        ratios = writer.log_probabilities(ids) - writer.log_probabilities(ids, self.start)
        return Judged(scores, ratios, scores - self.beta * ratios)


def evaluated(writer: Writer, judge: Judge, rows: int, seed: int) -> tuple[dict[str, float], Any]:
    """Means over fresh texts of the writer at rest, and some of the texts.

    The global generator is afterwards as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = writer.sample(rows)
    judged = judge.judged(writer, ids)
    means = dict(
        reward=judged.scores.mean().item(),
        kl=judged.log_ratios.mean().item(),
        worth=judged.worth.mean().item(),
    )
    return means, _some(writer.texts(ids))


def _some(texts: Sequence[str], count: int = 6) -> list[str]:
    return list(texts[:count])
