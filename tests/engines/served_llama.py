"""A small Llama that engines serve, its optimizer, and what it generates when displaced here."""

import contextlib
import copy
import json

import pytest
import torch

from zofo_kernels import perturbed
from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.engines import Engine
from zofo_optim.engines.base import Recipe

transformers = pytest.importorskip("transformers")

VOCABULARY = 128
MATRICES = r"(proj|lm_head|embed_tokens)\.weight$"


def llama(**config):
    """Wide enough for vLLM, which refuses small attention heads."""
    torch.manual_seed(0)
    defaults = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.1,  # so that greedy completions differ from each other
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**defaults, **config}))
    return model.eval().requires_grad_(False)


def population(model, include=MATRICES, *, zo=None, **options):
    """An optimizer that asks for a population."""
    zo = {**dict(lr=0.05, mu=0.05, maximize=True), **(zo or {})}
    groups = hybrid_param_groups(
        model, zo=zo, include=include, directions="per_example", verbose=False
    )
    return of_groups(groups, **options)


def of_groups(groups, **options):
    kind = dict(structure="low_rank", perturbation="streamed", directions="per_example")
    return HybridZOFO(groups, **{**kind, "estimator": "antithetic", "seed": 3, **options})


class Letters:
    """A tokenizer of letters."""

    eos_token_id = bos_token_id = None
    pad_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(map(chr, tokens))

    def save_pretrained(self, folder):
        pass


class CopyEngine(Engine):
    """Serves a copy of the model, which knows of the optimizer by recipes alone."""

    def _begin(self, optimizer, model):
        self.served = copy.deepcopy(model)
        own = dict(self.served.named_parameters())
        self._weights = [[(own[t.name], t.noise_index) for t in group] for group in self._targets]
        self.calls = []

    def _follow(self, recipes):
        said = json.loads(json.dumps(recipes))  # plain numbers only
        for recipe, weights in zip(said, self._weights, strict=True):
            Recipe(*recipe).apply(weights, self._optimizer.settings.rounding, "auto")

    def synchronise(self, compare=False):
        self.calls.append(compare)

    def generate(self, prompts, displaced=None, sampling=None, seeds=None):
        self._check_rows(prompts, displaced, seeds)
        count = getattr(sampling, "max_new_tokens", 4)
        rows = [one.shifts for one in displaced] if displaced else [()] * len(prompts)
        found = []
        for prompt, shifts in zip(prompts, rows, strict=True):
            with self._displaced(shifts):
                found.append(greedy(self.served, prompt, count))
        return found

    @contextlib.contextmanager
    def _displaced(self, shifts):
        before = copy.deepcopy(self.served.state_dict())
        for shift, weights in zip(shifts, self._weights, strict=False):
            for p, index in weights:
                p.data.copy_(perturbed(p.detach(), shift.direction, shift.scale, index=index))
        yield
        self.served.load_state_dict(before)


@contextlib.contextmanager
def displaced_to(optimizer, shifts):
    """The weights hold the displacement, written out, within the block."""
    before = {}
    for group, shift in zip(optimizer.active_groups(), shifts, strict=True):
        for parameter, index in zip(group.params, group.indices, strict=True):
            before[parameter] = parameter.detach().clone()
            moved = perturbed(parameter.detach(), shift.direction, shift.scale, index=index)
            parameter.data.copy_(moved)
    try:
        yield
    finally:
        for parameter, content in before.items():
            parameter.data.copy_(content)


def greedy(model, prompt, count):
    """Token ids of the likeliest completion."""
    tokens = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)
    return tokens[0, len(prompt) :].tolist()


def prompts(count, length=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (count, length), generator=generator).tolist()
