"""What tests of offloaded weights share."""

import mmap

import accelerate
import pytest
import torch
import transformers
from conftest import same_bits
from tiny_llama import DATA, TOKENS, arguments, lora

from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups
from zofo_optim.offload import accelerate_hooks, in_turn, maps
from zofo_optim.trainer import HybridTrainer

ON_LINUX = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="offloading needs Linux"),
]


@pytest.fixture(autouse=True)
def any_folder(monkeypatch):
    """Where temporary files are in memory, all but the peak of memory can be tested."""
    monkeypatch.setattr(maps, "_IN_MEMORY", ())


OPTIONS = {
    "full": {},
    "rademacher, one-sided": dict(distribution="rademacher", estimator="one_sided"),
    "low rank": dict(structure="low_rank"),
    "per example": dict(structure="low_rank", directions="per_example"),
    "coupled": dict(coupling=0.5),
}


def trained(model, steps=3, **options):
    per_example = options.get("directions") == "per_example"
    hybrid = any(p.requires_grad for p in model.parameters())
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=1e-3, mu=1e-3, weight_decay=0.1),
        **dict(fo=dict(lr=1e-2)) if hybrid else {},
        verbose=False,
        directions=options.get("directions", "shared"),
    )
    optimizer = HybridZOFO(groups, perturbation="streamed", **options)
    for _ in range(steps):
        optimizer.step(closure_of(model, per_example))
    return optimizer


def closure_of(model, per_example=False):
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    return lambda: example_losses_of(model, batch) if per_example else model(**batch).loss


def assert_same(model, other):
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert same_bits(p, theirs[name]), name


def assert_offloaded(model, hooks=()):
    """What is frozen, and accelerate's hooks are gone, but for these."""
    for name, p in model.named_parameters():
        assert in_turn.is_offloaded(p) is not p.requires_grad, name
    left = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    assert {hook for one in left for hook in accelerate_hooks.single(one)} == set(hooks)


def empty(config, dtype=torch.float32):
    with accelerate.init_empty_weights():
        return transformers.LlamaForCausalLM(config).to(dtype)


def trained_by_trainer(offload, folder, checkpointed):
    """A model that ``offload`` has changed, trained by the Trainer; compared with one in memory."""

    def made():
        model = lora()
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return model

    expected, model = made(), made()
    offload(model)
    for one in (expected, model):
        HybridTrainer(
            one,
            arguments(folder, gradient_checkpointing=checkpointed),
            train_dataset=DATA,
            zo=dict(lr=1e-3, mu=1e-3),
            hybrid=dict(perturbation="streamed"),
        ).train()
    assert_same(model, expected)
    return model
