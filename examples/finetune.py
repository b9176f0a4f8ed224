"""Fine-tune a pre-trained transformer with and without gradients, and compare.

    python examples/finetune.py --steps 200 --out runs/finetune

The task is text classification. Three methods see the same batches in the same order and start from
the same model:

    zo           the whole model learns by zeroth-order estimates; no backward pass at all
    fo-lora      LoRA adapters and the head learn by AdamW; the base stays as it is
    hybrid-lora  the same, and the frozen base learns by zeroth-order estimates at the same time

Start. All methods start from the same head, zero-shot by default: the nearest class of a few
prompts (`--head prompts`), or a linear probe, a logistic regression on the frozen model's features
(for BERT, the pooler's output), its penalty chosen by cross-validation on the training data
(`--head probe`). `accuracy_before` is the dev accuracy of that model; "baselines" in results.json
holds the dev accuracy of both heads. Learning rates fall linearly to 0 (`--schedule`).

results.json, for each method:

    accuracy_before, accuracy_after   on the dev set; after = best weights of the evaluations made
                                      during training (ties: lower dev loss), which are the ones
                                      saved. Chosen on the dev set itself, so it flatters a little;
                                      accuracy_last is the accuracy after the last step.
    loss_first, loss_last             mean loss, without dropout, over one fixed set of at most 256
                                      training examples, before the first and after the last step
    seconds, steps                    wall time in optimizer steps, evaluations not counted;
                                      seconds_per_step leaves the first one out, which may compile
    peak_memory_bytes                 most bytes of live tensors in one optimizer step on the
                                      longest batch of the run, taken on an extra step after
                                      training (see measure.py)
    curve, losses                     dev accuracy and loss at each evaluation; loss of every step

With `--seeds 0 1 2` the numbers are means, `accuracy_after_std` is the sample standard deviation
and `seeds` holds every run; weights are saved for the first seed.

Saved weights, and how to load them:

    zo           model = AutoModelForSequenceClassification.from_pretrained("OUT/zo/model")
    fo-lora      base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
                 model = PeftModel.from_pretrained(base, "OUT/fo-lora/adapter")
    hybrid-lora  base = AutoModelForSequenceClassification.from_pretrained("OUT/hybrid-lora/base")
                 model = PeftModel.from_pretrained(base, "OUT/hybrid-lora/adapter")

Needs: pip install "zofo-optim[examples]"
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from heads import HEADS, fit_probe, set_prompt_head
from measure import peak_memory
from models import (
    DEFAULT_MODEL_PACKAGE,
    METHODS,
    Method,
    ModelError,
    Snapshot,
    classification_loss,
    default_model,
    evaluate,
    load_model,
    prepare,
    save,
)
from options import DEMO_DATA, DTYPES, parser
from report import Result, Tracker, plot_curves, print_table, summarise, write_results
from rich.console import Console
from tasks import TASKS, DataError, Encoded, fingerprint, load_examples, shuffled_batches
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zofo_optim import HybridZOFO

EVAL_BATCH = 32
LOSS_EXAMPLES = 256


def train(
    name: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Encoded, Encoded],
    args: argparse.Namespace,
    seed: int,
    folder: Path | None,
    console: Console,
) -> Result:
    """Train a copy of `base` by one method with one seed; save the best weights in `folder`."""
    method: Method = METHODS[name]
    device = torch.device(args.device)
    torch.manual_seed(seed)
    model, groups = prepare(
        method,
        base,
        lora={
            "r": args.lora_rank,
            "lora_alpha": 2 * args.lora_rank,
            "lora_dropout": args.lora_dropout,
            "target_modules": args.lora_targets or None,
            "layers_to_transform": args.lora_layers or None,
        },
        zo={"lr": args.lr_hybrid_zo if method.adapter else args.lr_zo, "mu": args.mu},
        fo={"lr": args.lr_hybrid_fo if method.zo_base else args.lr_fo},
        include=args.include_hybrid if method.adapter else args.include_zo,
        device=device,
    )
    optimizer = HybridZOFO(
        groups,
        estimator=args.estimator,
        num_samples=args.samples_hybrid if method.adapter else args.samples_zo,
        distribution=args.distribution,
        seed=seed,
        fo_optimizer=torch.optim.AdamW,
        weight_decay=0,
    )
    linear = args.schedule == "linear"
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / args.steps) if linear else 1.0
    )

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def optimizer_step(indices: Sequence[int]) -> torch.Tensor:
        batch = data[0].batch(indices)
        optimizer.zero_grad()
        loss: torch.Tensor = optimizer.step(lambda: classification_loss(model, batch))
        return loss.detach()

    dev = data[1].fixed_batches(EVAL_BATCH)
    loss_set = data[0].fixed_batches(EVAL_BATCH, first=LOSS_EXAMPLES)
    accuracy_before, dev_loss = evaluate(model, dev)
    loss_first = evaluate(model, loss_set)[1]
    curve: list[dict[str, float]] = [{"step": 0, "accuracy": accuracy_before, "loss": dev_loss}]
    batches = list(islice(shuffled_batches(len(data[0]), args.batch_size, seed), args.steps))
    losses: list[float] = []
    pending: list[torch.Tensor] = []
    best, best_step, waited = (-math.inf, -math.inf), 0, 0
    snapshot = Snapshot(groups)
    seconds, first_step, shown = 0.0, 0.0, time.perf_counter()
    with Tracker(console, name, args.steps, accuracy_before) as tracker:
        model.train(args.dropout)
        started = time.perf_counter()
        for step, indices in enumerate(batches, start=1):
            pending.append(optimizer_step(indices))
            scheduler.step()
            if step == 1:
                synchronise()
                first_step = time.perf_counter() - started
            if time.perf_counter() - shown > 0.5:
                tracker.step(step, float(pending[-1]))
                shown = time.perf_counter()
            if step % args.eval_every and step < args.steps:
                continue
            synchronise()
            seconds += time.perf_counter() - started
            recent = torch.stack(pending).tolist()
            pending.clear()
            losses += recent
            accuracy, dev_loss = evaluate(model, dev)
            curve.append({"step": step, "accuracy": accuracy, "loss": dev_loss})
            tracker.step(step)
            tracker.evaluated(accuracy, sum(recent) / len(recent))
            waited = 0 if accuracy > best[0] else waited + 1
            if (accuracy, -dev_loss) > best:
                best, best_step = (accuracy, -dev_loss), step
                snapshot.take()
            if args.patience and waited >= args.patience:
                break
            started = time.perf_counter()
    loss_last = evaluate(model, loss_set)[1]

    # An extra step for the memory, undone by going back to the best weights.
    used = batches[: len(losses)]
    longest = max(used, key=lambda batch: len(batch) * max(data[0].lengths[i] for i in batch))
    optimizer.zero_grad()

    def extra_step() -> None:
        optimizer_step(longest)
        optimizer.zero_grad()

    peak = peak_memory(extra_step, model, optimizer, device)
    snapshot.restore()
    result: Result = {
        "accuracy_before": accuracy_before,
        "accuracy_after": best[0],
        "accuracy_last": curve[-1]["accuracy"],
        "loss_first": loss_first,
        "loss_last": loss_last,
        "seconds": seconds,
        "seconds_per_step": (
            (seconds - first_step) / (len(losses) - 1) if len(losses) > 1 else seconds
        ),
        "steps": len(losses),
        "best_step": best_step,
        "stopped_early": len(losses) < args.steps,
        "peak_memory_bytes": peak,
        "parameters_zo": sum(p.numel() for g in groups if g["mode"] == "zo" for p in g["params"]),
        "parameters_fo": sum(p.numel() for g in groups if g["mode"] == "fo" for p in g["params"]),
        "data_order": fingerprint(used),
        "curve": curve,
        "losses": losses,
    }
    if folder is not None:
        result["saved"] = save(method, model, tokenizer, folder)
    return result


def versions() -> dict[str, str]:
    packages = ("zofo-optim", "torch", "transformers", "peft", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    args.data = args.data or DEMO_DATA
    seeds = list(dict.fromkeys(args.seeds or [args.seed]))
    methods = list(dict.fromkeys(args.methods))
    console = Console()
    task = TASKS[args.task]
    title = f"{Path(args.model or DEFAULT_MODEL_PACKAGE).name} on {args.task}"
    title += f", batches of {args.batch_size}" + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")
    device = torch.device(args.device)
    try:
        args.model = args.model or default_model()
        examples = load_examples(args.data, task, args.train_size, args.dev_size)
        torch.manual_seed(seeds[0])
        base, tokenizer = load_model(args.model, task.label_names, DTYPES[args.dtype])
        data = (
            Encoded(examples[0], tokenizer, device),
            Encoded(examples[1], tokenizer, device),
        )
        base.to(device)
        baselines = {}
        for head in sorted(HEADS, key=lambda name: name == args.head):  # the chosen one last
            if head == "probe":
                fit_probe(base, data[0].fixed_batches(EVAL_BATCH))
            elif task.prompts:
                set_prompt_head(base, tokenizer, task.prompts, data[0].fixed_batches(EVAL_BATCH))
            else:
                continue
            baselines[head] = evaluate(base, data[1].fixed_batches(EVAL_BATCH))[0]
        if args.head not in baselines:
            raise ModelError(f"task {args.task!r} has no prompts: use --head probe")
        base.to("cpu")
        args.out.mkdir(parents=True, exist_ok=True)
        results: dict[str, Result] = {}
        for name in methods:
            runs: dict[int, Result] = {}
            for seed in seeds:
                folder = args.out / name if seed == seeds[0] else None
                runs[seed] = train(name, base, tokenizer, data, args, seed, folder, console)
            results[name] = summarise(runs)
    except (DataError, ModelError) as error:
        p.error(str(error))
    settings = {
        **vars(args),
        "methods": methods,
        "seeds": seeds,
        "train_examples": len(data[0]),
        "dev_examples": len(data[1]),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    if device.type == "cuda":
        settings["machine"] = torch.cuda.get_device_name(device)
    write_results(
        args.out / "results.json",
        results,
        baselines=baselines,
        settings=settings,
        versions=versions(),
    )
    plot_curves(args.out / "curves.png", results, title)
    print_table(console, results, title)
    console.print(f"Results, curves and weights: {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
