"""Estimates of memory where weights visit a device, against what steps take there."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from offloaded import ON_LINUX  # noqa: E402
from torch import nn  # noqa: E402
from visited import pretended  # noqa: E402

from experiments.measure import peak_memory  # noqa: E402
from experiments.memory import cases  # noqa: E402
from experiments.memory.resident import METHODS  # noqa: E402
from zofo_optim.memory import estimate, estimate_memory  # noqa: E402
from zofo_optim.memory.rehearsed_visits import VisitingDevice  # noqa: E402
from zofo_optim.offload import offload_weights  # noqa: E402
from zofo_optim.offload.device_visits import visits_of  # noqa: E402
from zofo_optim.offload.in_turn import is_offloaded  # noqa: E402

pytestmark = [*ON_LINUX, pytest.mark.filterwarnings("ignore")]
__all__ = ["pretended"]  # a fixture


@pytest.fixture(autouse=True)
def visited_cpu(monkeypatch):
    """Estimates for "cpu" are of a CPU that weights visit, as of a GPU."""
    monkeypatch.setattr(estimate, "_offloaded", lambda made, asked: VisitingDevice(made))


BATCH = 2, 16
SIZES = dict(vocab_size=100, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(
        **SIZES, intermediate_size=1024, use_cache=False, architectures=["LlamaForCausalLM"]
    ),
    "OPT": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=1024, word_embed_proj_dim=256, max_position_embeddings=32,
        use_cache=False, architectures=["OPTForCausalLM"],
    ),
}  # fmt: skip
"""Few activations: what is there of the weights makes the peak."""


@pytest.mark.parametrize(
    ("model", "name", "weights"),
    [
        ("Llama", "zo, streamed", "fp32"),
        ("Llama", "zo, per example", "bf16"),
        ("OPT", "hybrid, low rank, checkpointed", "fp32"),
        ("Llama", "lora, AdamW", "fp32"),
        ("OPT", "hybrid, streamed, coupled", "fp32"),
    ],
)
def test_steps(model, name, weights):
    config, (method, options) = CONFIGS[model](), METHODS[name]
    found = estimate_memory(config, method, BATCH, weights=weights, device="cpu", **options)
    made = cases.loaded(config, weights, torch.device("cpu")).requires_grad_(False)
    offload_weights(made, device="cpu")
    made = cases.with_adapter(made, method, options)
    optimizer, step = cases.training(made, config, method, options, weights, BATCH)
    sizes = [p.nbytes for p in made.parameters() if is_offloaded(p)]
    first = peak_memory(step, made, optimizer, torch.device("cpu")) - sum(sizes)
    optimizer.zero_grad()
    later = peak_memory(step, made, optimizer, torch.device("cpu")) - sum(sizes)
    assert found.on_host == sum(sizes)
    assert found.on_disk == 0
    assert 2 * found.visiting > found.peak  # else nothing of this is tested
    assert found.peak == pytest.approx(later, rel=0.01)
    # verification keeps the content of the largest weight on the host, which is the device here
    assert first - (0 if method == "lora" else max(sizes)) <= found.most * 1.01
    assert found.most <= 1.01 * max(first, later)


@pytest.mark.parametrize("model", CONFIGS)
def test_a_block_and_the_next_are_there(model):
    options = dict(perturbation="streamed", offloaded=True, device="cpu")
    found = estimate_memory(CONFIGS[model](), "zo", BATCH, weights="fp32", **options)
    block = 4 * (4 * 256**2 + (3 if model == "Llama" else 2) * 256 * 1024)
    assert found.visiting == 2 * block


class Output(dict):
    loss = property(lambda self: self["loss"])


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(256, 256, device="meta") for _ in range(4)])

    def forward(self, x, labels):
        return Output(loss=self.layers(x).square().mean())


def test_a_layer_and_the_next_are_there():
    model, layer = Stack(), 4 * 256 * 256
    batch = dict(x=torch.zeros(1, 256), labels=torch.zeros(1))
    options = dict(perturbation="streamed", offloaded=True, device="cpu")
    found = estimate_memory(model, "zo", batch, **options)
    assert (found.on_host, found.visiting) == (4 * layer, 2 * layer)
    assert found.weights == 4 * 4 * 256  # biases stay
    assert found.peak == pytest.approx(found.weights + 3 * layer, abs=20_000)  # and a copy
    assert not model.layers[0]._forward_hooks  # a copy was rehearsed
    assert visits_of(model.layers[0].weight) is None


def test_a_tensor_that_a_forward_makes_elsewhere():
    class Masked(Stack):
        def forward(self, x, labels):
            mask = torch.ones(256)  # on the CPU
            for layer in self.layers:
                x = layer(x, mask)
            return Output(loss=x.square().mean())

    class Layer(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x) * mask.shape[0]

    model = Masked()
    model.layers = nn.ModuleList([Layer(256, 256, device="meta") for _ in range(2)])
    batch = dict(x=torch.zeros(1, 256), labels=torch.zeros(1))
    options = dict(perturbation="streamed", offloaded=True, device="cpu")
    assert estimate_memory(model, "zo", batch, **options).visiting == 2 * 4 * 256 * 256
