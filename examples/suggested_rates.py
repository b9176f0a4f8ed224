"""Both learning rates and mu from measured curvature, and smoothness watched while it trains.

    python examples/suggested_rates.py
    python examples/suggested_rates.py --model facebook/opt-125m

Before training, suggest_hyperparameters measures how far a step of each kind may go; nothing of
the model or the optimizer changes. SmoothnessRecorder warns where a rate leaves what is stable.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from zofo_optim import HybridZOFO, hybrid_param_groups, suggest_hyperparameters
from zofo_optim.smoothness import SmoothnessRecorder

TEXTS = [
    "The kettle sings before the rain begins.",
    "A quiet harbour keeps its lights on late.",
    "Nobody told the gardener about the frost.",
    "Seven small boats came home without a sound.",
]

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
else:
    tokenizer = ByT5Tokenizer()  # its tokens are bytes
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))

batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def closure():
    return model(**batch).loss


groups = hybrid_param_groups(model, zo=dict(lr=1e-6, mu=1e-3), fo=dict(lr=1e-3))
optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW)
found = suggest_hyperparameters(optimizer, closure)
print(found)
found.apply(optimizer)  # before a scheduler is made

recorder = SmoothnessRecorder(optimizer, every=20)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, args.steps)
losses = []
for _ in range(args.steps):
    optimizer.zero_grad()
    recorder.step(closure)
    losses.append(optimizer.step(closure).item())
    scheduler.step()
for row in recorder.rows:
    base, adapter = row["smoothness_zo"], row["smoothness_fo"]
    print(f"step {row['step']}: smoothness of the base {base:.3g}, of the adapter {adapter:.3g}")
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
