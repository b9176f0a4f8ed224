"""Lightning with automatic optimization: it passes the training step as closure by itself.

    pip install lightning
    python examples/loop_lightning.py --out runs/lightning

Nothing is to be done but `configure_optimizers`. `training_step` is evaluated several times a step,
so it must not count; what it logs is of its last evaluation, off by O(mu). To accumulate, switch to
manual optimization and call `self.optimizers().optimizer.backward(closure)` for each batch.

Needs: pip install "zofo-optim[examples]" lightning
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from loops import loop_parser, start

from zofo_optim import HybridZOFO, hybrid_param_groups


class Module(LightningModule):
    def __init__(self, model: Any, data: Any, args: Any) -> None:
        super().__init__()
        self.model, self.data, self.options = model, data, args

    def training_step(self, batch: Any, index: int) -> Any:
        return self.data.loss(self.model, batch)

    def on_train_batch_end(self, *args: Any) -> None:
        optimizer = self.optimizers().optimizer
        self.log("loss", optimizer.last_loss)  # of the clean evaluation
        self.log("projected_grad", optimizer.projected_grads.abs().mean())

    def configure_optimizers(self) -> HybridZOFO:
        groups = hybrid_param_groups(
            self.model,
            zo=dict(lr=self.options.lr_zo),
            fo=dict(lr=self.options.lr_fo),
            include=self.options.include,
        )
        return HybridZOFO(groups, seed=self.options.seed)


def main(argv: Sequence[str] | None = None) -> int:
    args = loop_parser(__doc__).parse_args(argv)
    model, data, loader = start(args)
    trainer = Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=CSVLogger(args.out),
        log_every_n_steps=1,
        default_root_dir=args.out,
    )
    trainer.fit(Module(model, data, args), loader)
    print(f"Logs and checkpoint: {trainer.log_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
