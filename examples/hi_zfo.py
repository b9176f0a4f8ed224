"""A budget in, the best split out: Hi-ZFO on a model without an adapter.

    python examples/hi_zfo.py
    python examples/hi_zfo.py --model facebook/opt-125m --budget 0.3 --lr 2e-5

The budget is a share of the FLOPs of full back-propagation, or with `--of memory` of what full
fine-tuning takes beyond inference; there also bytes in all, such as 12GB. The tensors that are
worth most within it train by AdamW, and all others by forward passes.
"""

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from zofo_optim import HybridZOFO
from zofo_optim.partition import hi_zfo, importance_partition

TEXTS = [
    "The kettle sings before the rain begins.",
    "A quiet harbour keeps its lights on late.",
    "Nobody told the gardener about the frost.",
    "Seven small boats came home without a sound.",
]

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--budget", default="0.6")
parser.add_argument("--of", choices=["flops", "memory"], help="default: by the budget's unit")
parser.add_argument(
    "--lr", type=float, default=1e-3, help="of AdamW; a tenth of it is zeroth order's"
)
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:
    tokenizer = ByT5Tokenizer()  # its tokens are bytes
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def loss():
    return model(**batch).loss


preset = hi_zfo(args.budget, lr=args.lr)
if args.of:
    preset.partition["of"] = args.of
groups, partition = importance_partition(
    model, loss, zo=preset.zo, fo=preset.fo, **preset.partition
)
print(partition)
optimizer = HybridZOFO(groups, **preset.hybrid)
losses = []
for _ in range(args.steps):
    optimizer.zero_grad()
    losses.append(optimizer.step(loss).item())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
