"""A journal of a training: some bytes a step, from which the base model's weights are remade.

    python examples/journal_replay.py
    python examples/journal_replay.py --model facebook/opt-125m --lr-zo 1e-6

So a fine-tuned model is published as the name of its base, its adapter, and its journal.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay

TEXT = "The kettle sings before the rain begins. Nobody told the gardener about the frost."
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--lr-zo", type=float, default=5e-3)
parser.add_argument("--steps", type=int, default=150)
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    base = AutoModelForCausalLM.from_pretrained(args.model)
    ids = AutoTokenizer.from_pretrained(args.model)(TEXT, return_tensors="pt")["input_ids"]
else:
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES))
    ids = torch.tensor([list(TEXT.encode())])
again = copy.deepcopy(base)  # as it would be loaded elsewhere

model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
optimizer = HybridZOFO(
    hybrid_param_groups(model, zo=dict(lr=args.lr_zo, mu=1e-3), fo=dict(lr=0.3, momentum=0.9))
)
path = Path(tempfile.mkdtemp()) / "run.zofo"
losses = []
with Journal(path, metadata={"base": args.model or "random"}).attach(optimizer):
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss = optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
        losses.append(loss.item())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; journal: {path.stat().st_size:,} bytes")

replay(again, path)  # raises where the weights are not the trained ones
trained = dict(model.unload().named_parameters())
equal = all(torch.equal(p, trained[name]) for name, p in again.named_parameters())
print(f"weights of the base model remade to the bit: {equal}")
