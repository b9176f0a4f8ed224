"""A Llama of two layers that is trained by scores of what it writes."""

import pytest
from conftest import same_bits
from tiny_llama import base_model, word_tokenizer

pytest.importorskip("datasets")

from zofo_optim.score_trainer import ScoreConfig, ScoreTrainer

PROMPTS = ["w3 w4 w5", "w6", "w7 w8", "w9 w10 w11 w12"]
DATA = [{"prompt": prompt, "bonus": i} for i, prompt in enumerate(PROMPTS)]


def even(completions, **kwargs):
    """The share of words with an even number."""
    words = [text.split() for text in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in some) / max(1, len(some)) for some in words]


def config(folder, **options):
    chosen = dict(
        max_steps=3,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    return ScoreConfig(str(folder), **{**chosen, **options})


def model_of(double=False):
    model = base_model()
    return model.double() if double else model


def trainer(folder, rewards=even, model=None, tokenizer=None, data=DATA, options=None, **more):
    return ScoreTrainer(
        model_of() if model is None else model,
        rewards,
        config(folder, **(options or {})),
        train_dataset=data,
        processing_class=word_tokenizer() if tokenizer is None else tokenizer,
        **more,
    )


def contents(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert all(same_bits(p, b[name]) for name, p in a.items())


def logged(done, key):
    return [entry[key] for entry in done.state.log_history if key in entry]
