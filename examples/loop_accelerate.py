"""An accelerate loop: `prepare`, `accumulate`, `clip_grad_norm_`, checkpoints.

    python examples/loop_accelerate.py --out runs/accelerate

accelerate wraps the optimizer; the wrapped one has `backward`, which takes the closure. It goes
inside `accumulate` and divides by the number of accumulated batches itself, as it calls no
`accelerator.backward`.

Needs: pip install "zofo-optim[examples]"
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from loops import loop_parser, start
from tqdm import tqdm

from zofo_optim import HybridZOFO, hybrid_param_groups

ACCUMULATED = 2


def main(argv: Sequence[str] | None = None) -> int:
    args = loop_parser(__doc__).parse_args(argv)
    model, data, loader = start(args)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, cpu=True)
    groups = hybrid_param_groups(
        model, zo=dict(lr=args.lr_zo), fo=dict(lr=args.lr_fo), include=args.include
    )
    optimizer = HybridZOFO(groups, seed=args.seed)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    batches = iter(loader)
    for _ in tqdm(range(ACCUMULATED * args.steps)):
        batch = next(batches)
        with accelerator.accumulate(model):
            loss = optimizer.optimizer.backward(lambda: data.loss(model, batch) / ACCUMULATED)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(ACCUMULATED * loss.item())
    accelerator.save_state(str(args.out / "state"))
    accelerator.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; state: {args.out / 'state'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
