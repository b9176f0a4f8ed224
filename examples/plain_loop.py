"""A PyTorch loop with accumulation, clipping and a scheduler; LoRA by gradients, the base without.

    python examples/plain_loop.py
    python examples/plain_loop.py --model facebook/opt-125m --lr-zo 1e-6 --lr-fo 1e-3

What differs from a loop with torch.optim.SGD: the parameter groups, and the closure that
`optimizer.backward` is given, as it is evaluated more than once.
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

from zofo_optim import HybridZOFO, hybrid_param_groups

TEXTS = [
    "The kettle sings before the rain begins.",
    "A quiet harbour keeps its lights on late.",
    "Nobody told the gardener about the frost.",
    "Seven small boats came home without a sound.",
]
ACCUMULATED = 2

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--lr-zo", type=float, default=1e-2)
parser.add_argument("--lr-fo", type=float, default=1.0)
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
optimizer = HybridZOFO(
    hybrid_param_groups(
        model, zo=dict(lr=args.lr_zo, mu=1e-3), fo=dict(lr=args.lr_fo, momentum=0.9)
    )
)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, args.steps)


def collate(texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


loader = torch.utils.data.DataLoader(TEXTS, batch_size=2, shuffle=True, collate_fn=collate)
losses = []
for _ in range(args.steps):
    total = 0.0
    for batch in loader:  # two batches a step
        loss = optimizer.backward(lambda: model(**batch).loss / ACCUMULATED)
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    losses.append(total)
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
