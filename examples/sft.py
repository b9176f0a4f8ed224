"""Supervised fine-tuning by TRL's SFTTrainer.

    python examples/sft.py
    python examples/sft.py --model facebook/opt-125m --lr-zo 1e-6

`HybridTrainerMixin` comes first among the base classes. It works so with every trainer whose step
is that of transformers' Trainer, such as DPOTrainer with `precompute_ref_log_probs=True`.
"""

import argparse
import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from zofo_optim.trainer import HybridTrainerMixin

PAIRS = [
    {"prompt": "Q: What sings before the rain?\nA:", "completion": " The kettle."},
    {"prompt": "Q: What keeps its lights on?\nA:", "completion": " The harbour."},
    {"prompt": "Q: Who missed the frost?\nA:", "completion": " The gardener."},
    {"prompt": "Q: What came home?\nA:", "completion": " Seven small boats."},
]

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--lr-zo", type=float, default=3e-3)
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--out", default=tempfile.mkdtemp())
args = parser.parse_args()

set_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
else:
    tokenizer = ByT5Tokenizer()  # its tokens are bytes
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))


class HybridSFTTrainer(HybridTrainerMixin, SFTTrainer):
    pass


trainer = HybridSFTTrainer(
    base,
    args=SFTConfig(
        args.out,
        learning_rate=5e-2,  # of LoRA
        max_steps=args.steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(PAIRS),
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    zo=dict(lr=args.lr_zo, mu=1e-3),  # of the base model
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}; saved: {args.out}")
