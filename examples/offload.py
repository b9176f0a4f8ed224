"""Fine-tune a model without having it in memory: a Llama is read from its checkpoint's files.

    python examples/offload.py
    python examples/offload.py --checkpoint path/to/folder --folder /scratch

LoRA learns by gradients, all weights beneath it by zeroth order, from a private copy on the disk.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zofo_optim import HybridZOFO, hybrid_param_groups, save_base_weights
from zofo_optim.offload import offload_weights

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", help="a folder of safetensors files; default: a small one")
parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a disk, for the copy")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--lr", type=float, default=1e-4)
args = parser.parse_args()

torch.manual_seed(0)
scratch = tempfile.TemporaryDirectory(dir=args.folder)
checkpoint = args.checkpoint
if checkpoint is None:
    checkpoint = str(Path(scratch.name) / "llama")
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, vocab_size=256)
    sizes.update(initializer_range=0.1)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4)).save_pretrained(checkpoint)

config = AutoConfig.from_pretrained(checkpoint)
with init_empty_weights():
    model = AutoModelForCausalLM.from_config(config)
offload = offload_weights(model.requires_grad_(False), checkpoint, folder=args.folder)
print(offload)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))

groups = hybrid_param_groups(model, zo=dict(lr=args.lr, mu=1e-3), fo=dict(lr=1e-2))
settings = dict(perturbation="streamed", structure="low_rank", fo_optimizer=torch.optim.AdamW)
optimizer = HybridZOFO(groups, **settings)
text = torch.tensor([list(b"The weights are on the disk, and visit memory one by one. " * 2)])
losses = [
    float(optimizer.step(lambda: model(input_ids=text, labels=text).loss))
    for _ in range(args.steps)
]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
saved = save_base_weights(optimizer, model, Path(scratch.name) / "tuned")
print("trained weights of the base model:", saved.name)
scratch.cleanup()
