"""Estimates against what steps really take, on small models."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from experiments.memory.cases import BATCH, METHODS, MODELS, format_of, measured, weights_of
from zofo_optim.memory import estimate_memory

pytestmark = pytest.mark.filterwarnings("ignore")
PLAIN = [name for name, case in METHODS.items() if "fp32" in weights_of(*case)]


def check(model, name, weights, device="cpu", folder=None, within=0.02, layers=2):
    config, (method, options) = MODELS[model](), METHODS[name]
    config.num_hidden_layers = layers
    estimate = estimate_memory(
        config, method, BATCH, weights=format_of(weights), device=device, **options
    )
    seen = measured(config, method, options, weights, device, folder)
    assert estimate.peak == pytest.approx(seen.later, rel=within)
    # with the optimizer's state, which the first step does not have yet
    assert seen.first <= estimate.most * (1 + within)
    if estimate.peak_while_verifying > estimate.peak:
        assert estimate.peak_while_verifying == pytest.approx(seen.first, rel=within)


QUICK = [name for name in PLAIN if name not in ("hybrid, coupled", "hybrid, coupled, low rank")]


@pytest.mark.parametrize("name", QUICK)
def test_every_method(name):
    check("Llama", name, "fp32")


@pytest.mark.parametrize("model", ["BERT", "GPT-2", "OPT"])
@pytest.mark.parametrize("name", ["zo, streamed", "hybrid, in place", "fo, AdamW, checkpointed"])
def test_other_models(model, name):
    check(model, name, "fp32")


def test_16_bits():
    check("Llama", "zo, per example", "bf16")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights(weights, tmp_path):
    pytest.importorskip("bitsandbytes")
    check("Llama", "lora, AdamW, checkpointed", weights, folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("hybrid, in place", "int8 (torchao)"),
        ("zo, in place", "int4 (torchao)"),
        ("zo, side updates, streamed", "int8 (torchao)"),
        ("hybrid, integers frozen", "int4 (torchao)"),
    ],
)
def test_torchao_weights(name, weights):
    pytest.importorskip("torchao")
    check("Llama", name, weights)


def test_side_updates_beside_biases():
    pytest.importorskip("torchao")
    check("BERT", "zo, side updates", "int4 (torchao)")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLAIN)
def test_every_method_on_a_gpu(name):
    """Within 10 %, as libraries have workspaces of their own there."""
    check("Llama", name, "bf16", device="cuda", within=0.1, layers=6)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int8 (torchao)", "int4 (torchao)"])
@pytest.mark.parametrize("name", ["hybrid, in place", "zo, side updates"])
def test_torchao_weights_on_a_gpu(name, weights):
    pytest.importorskip("torchao")
    check("Llama", name, weights, device="cuda", within=0.1, layers=6)
