"""HybridTrainer on a tiny Llama, and what its runs are asked for."""

import copy
import itertools

import transformers
from conftest import same_bits
from tiny_llama import DATA, arguments, lora

from zofo_optim.trainer import HybridTrainer

PER_EXAMPLE = dict(structure="low_rank", perturbation="streamed", directions="per_example")


def trainer(folder, model=None, options=None, cls=HybridTrainer, **more):
    model = lora() if model is None else model
    more = {"zo": dict(lr=1e-3, mu=1e-3), **more}
    return cls(
        model, arguments(folder, **(options or {})), train_dataset=DATA, eval_dataset=DATA, **more
    )


def contents(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(model, other):
    for a, b in zip(contents(model), contents(other), strict=True):
        assert same_bits(a, b)


def assert_moved(model, before):
    """Every base weight, and the adapter.

    The adapter only as a whole: at the start B is small, and so is the gradient of A, whose
    update may round away. Which tensors this concerns depends on the CPU.
    """
    named = zip(model.named_parameters(), before, contents(model), strict=True)
    moved = {name: not same_bits(old, new) for (name, _), old, new in named}
    assert all(value for name, value in moved.items() if "lora_" not in name), moved
    assert any(value for name, value in moved.items() if "lora_" in name), moved


def logged(done, key):
    return [entry[key] for entry in done.state.log_history if key in entry]


def batches(done):
    """The batches that a trainer of this seed sees."""
    transformers.set_seed(1)
    return list(copy.copy(done).get_train_dataloader())


def the_second_is_best(**options):
    """Options that save three checkpoints, and a metric by which the second one is the best."""
    ranks = itertools.chain([1, 0], itertools.count(2))
    saved = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    best = dict(load_best_model_at_end=True, metric_for_best_model="rank", greater_is_better=False)
    return {
        "options": dict(max_steps=3, **saved, **best, **options),
        "compute_metrics": lambda prediction: {"rank": next(ranks)},
    }
