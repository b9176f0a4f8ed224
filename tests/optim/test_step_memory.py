"""The most that tensors take in a step, beside that of its forward passes."""

import pytest
import torch
from low_rank import PER_EXAMPLE, STREAMED

from experiments.measure import growth
from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, STREAMED, PER_EXAMPLE], ids=["full", "shared", "examples"])
def test_a_step_takes_the_memory_of_a_forward_pass(model, options, dtype):
    model.to(dtype)
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=ids, labels=ids)

    def losses():
        return example_losses_of(model, batch)

    def closure():
        return losses() if options.get("directions") else losses().mean()

    groups = hybrid_param_groups(model, dict(lr=1e-4), verbose=False)
    optimizer = HybridZOFO(groups, **options)
    optimizer.step(closure)  # which also verifies
    with torch.no_grad():
        losses()
        forward = growth(losses).most
    assert forward > 0
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    assert growth(lambda: optimizer.step(closure)).most <= forward + 0.02 * (before + forward)
