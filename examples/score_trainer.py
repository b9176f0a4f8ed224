"""Train by a score of what the model writes: reward functions as in TRL, and no gradients.

    python examples/score_trainer.py
    python examples/score_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --lr 1e-3

One `generate()` a step evaluates a population: the completions of each prompt decode under
directions of their own. `--model` is any causal language model with a tokenizer.
"""

import argparse
import tempfile

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from zofo_optim.score_trainer import ScoreConfig, ScoreTrainer

PROMPTS = ["Once upon a time", "In the harbour", "The gardener", "Seven small boats"]

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--lr", type=float, default=0.3)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default=tempfile.mkdtemp())
args = parser.parse_args()

set_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:
    tokenizer = ByT5Tokenizer()  # its tokens are bytes
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes)
    model = LlamaForCausalLM(config)


def lowercase(completions, **columns):
    """The share of small letters; any program may come up with the numbers."""
    return [sum(c.islower() for c in text) / max(1, len(text)) for text in completions]


def brevity(completion_ids, **columns):
    """Less for longer texts."""
    return [-len(tokens) / 100 for tokens in completion_ids]


trainer = ScoreTrainer(
    model,
    [lowercase, brevity],
    ScoreConfig(
        args.out,
        learning_rate=args.lr,
        max_steps=args.steps,
        per_device_train_batch_size=128,  # completions in a step
        num_generations=64,  # of each prompt
        lr_scheduler_type="constant",
        max_completion_length=16,
        reward_weights=[1.0, 0.1],
        logging_steps=20,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    processing_class=tokenizer,
)
first = trainer.evaluate()["eval_reward"]
trainer.train()
print(f"score {first:.3f} -> {trainer.evaluate()['eval_reward']:.3f}; saved: {args.out}")
