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


def packed(model, ids):
    """Bytes that a product of two vectors takes while it runs, beyond a layer's own product.

    oneDNN of torch 2.6 packs both factors of 16-bit ones into blocks; that of 2.13 takes less.
    """
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    x = weight.new_ones(1, ids.numel(), weight.shape[1])
    column, row = x[..., :1].clone(), weight.new_ones(1, 1, len(weight))
    most = [growth(call).most for call in (lambda: torch.bmm(column, row), lambda: x @ weight.t())]
    return max(0, most[0] - most[1])


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
    most = growth(lambda: optimizer.step(closure)).most
    assert most <= forward + packed(model, ids) + 0.02 * (before + forward)


class Generation:
    """Of 64 rows by a wide model, whose steps are those of a population."""

    def __init__(self, dtype):
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=1024,
            intermediate_size=2752,
            num_hidden_layers=1,
            num_attention_heads=16,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.model = transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()
        self.prompts = torch.arange(8, 16).repeat(64, 1)
        zo = dict(lr=1e-4, mu=1e-2)
        groups = hybrid_param_groups(self.model, zo, directions="per_example", verbose=False)
        self.optimizer = HybridZOFO(groups, **PER_EXAMPLE, estimator="antithetic")
        self.optimizer.verify(lambda: self.logits(self.prompts[:4]))

    def logits(self, prompts=None):
        prompts = self.prompts if prompts is None else prompts
        return self.model(prompts).logits[:, -1].float().square().mean(1)

    def scores(self):
        made = self.model.generate(self.prompts, do_sample=False, max_new_tokens=8)
        return (made % 2 == 0).float().mean(1)

    @property
    def weights(self):
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def factors(self):
        """Bytes of those of 32 directions, in the weights' dtype."""
        sizes = [sum(p.shape) * p.itemsize for p in self.model.parameters() if p.dim() == 2]
        return 32 * sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_population_takes_the_memory_of_plain_generation(dtype):
    """And at most 5 % for its factors, 32 pairs at width 1,024."""
    task = Generation(dtype)
    task.optimizer.step(task.scores)
    with torch.no_grad():
        task.scores()
        plain = growth(task.scores).most
    assert plain > 0
    step = growth(lambda: task.optimizer.step(task.scores)).most
    assert step <= plain + 1.1 * task.factors
    assert task.weights + step <= 1.05 * (task.weights + plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_are_kept_in_the_dtype_of_their_weights_alone(dtype):
    task = Generation(dtype)
    task.optimizer.step(task.logits)
    kept = growth(lambda: task.optimizer.backward(task.logits)).left
    assert task.factors <= kept <= 1.02 * task.factors
