"""A plain PyTorch loop: LoRA by gradients, the base model by forward passes, and its curves.

    python examples/loop_plain.py --model facebook/opt-125m --out runs/loop
    python examples/loop_plain.py                      # MiniLM on the demo sentences

What differs from a loop with torch.optim.SGD: the parameter groups, and the closure given to
`optimizer.backward`. Accumulation, clipping, scheduler, checkpoint and journal are as usual.
`OUT/curves.png` shows loss and projected gradients, `OUT/run.zofo` remakes the base weights.

Needs: pip install "zofo-optim[examples]"
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from loops import loop_parser, start
from tqdm import tqdm

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups

ACCUMULATED = 2


def main(argv: Sequence[str] | None = None) -> int:
    args = loop_parser(__doc__).parse_args(argv)
    if (args.out / "run.zofo").exists():
        raise SystemExit(f"--out {args.out} holds a journal already: take another folder")
    model, data, loader = start(args)
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=args.lr_zo, mu=1e-3),
        fo=dict(lr=args.lr_fo, momentum=0.9),
        include=args.include,
    )
    optimizer = HybridZOFO(groups, estimator="one_sided", seed=args.seed)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    journal = Journal(args.out / "run.zofo", metadata={"base": args.model}).attach(optimizer)
    batches = iter(loader)
    losses, slopes = [], []
    with journal:
        for _ in tqdm(range(args.steps)):
            for _ in range(ACCUMULATED):
                batch = next(batches)
                loss = optimizer.backward(lambda: data.loss(model, batch) / ACCUMULATED)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            losses.append(ACCUMULATED * loss.item())
            slopes.append(optimizer.projected_grads.abs().mean().item())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.save_pretrained(args.out / "adapter")
    torch.save(optimizer.state_dict(), args.out / "optimizer.pt")

    figure, axes = plt.subplots(2, sharex=True, layout="constrained")
    axes[0].plot(losses)
    axes[0].set(ylabel="loss of a batch")
    axes[1].plot(slopes)
    axes[1].set(ylabel="size of the projected gradient", xlabel="step")
    figure.savefig(args.out / "curves.png")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; curves, adapter and journal: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
