"""MeZO: a language model is fine-tuned by forward passes alone, without any gradient.

    python examples/mezo.py
    python examples/mezo.py --model facebook/opt-125m --lr 1e-6

Memory is that of inference: no backward pass, no gradients, no optimizer state.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zofo_optim import HybridZOFO

TEXT = "A fine, well-acted film. It was great. A dull, endless film. It was terrible."
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--lr", type=float, default=1e-2)
parser.add_argument("--steps", type=int, default=150)
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
    ids = AutoTokenizer.from_pretrained(args.model)(TEXT, return_tensors="pt")["input_ids"]
else:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES))
    ids = torch.tensor([list(TEXT.encode())])

model.requires_grad_(False).eval()
optimizer = HybridZOFO(model.parameters(), lr=args.lr, mode="zo", mu=1e-3, num_samples=4)
losses = [
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss).item() for _ in range(args.steps)
]
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
