"""What estimates say, refuse and leave alone."""

import pytest
import torch

from zofo_optim.memory import Fits, MemoryEstimate, estimate_memory, which_fits
from zofo_optim.memory.fitting import COMMON
from zofo_optim.memory.quantized import stored_bytes

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

BATCH = 2, 16


def config(**changes):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return transformers.LlamaConfig(
        **sizes,
        num_attention_heads=2,
        use_cache=False,
        **changes,
        architectures=["LlamaForCausalLM"],
    )


def linear_elements():
    return 2 * (4 * 32 * 32 + 3 * 32 * 48)


def test_weights_and_state_in_closed_form():
    elements = linear_elements() + 2 * 64 * 32 + 5 * 32
    inverse_frequencies = 8 * 4
    found = estimate_memory(config(), "fo", BATCH, weights="fp32", fo_optimizer="adamw")
    copies = (found.weights - 4 * elements) / inverse_frequencies
    assert copies in (1, 2)  # transformers 5 keeps the original ones, too
    assert found.gradients == 4 * elements
    assert found.optimizer_state == 2 * 4 * elements + 4 * (2 * 9 + 3)
    assert found.logits == 4 * 2 * 16 * 64


@pytest.mark.parametrize(("weights", "double"), [("int8", False), ("int4", False), ("int4", True)])
def test_quantised_weights_in_closed_form(weights, double):
    rest = 2 * (2 * 64 * 32 + 5 * 32)
    inverse_frequencies = 2 * 8 * 2  # in the model's dtype
    found = estimate_memory(config(), "lora", BATCH, weights=weights, double_quant=double)
    shapes = 2 * [*4 * [(32, 32)], (48, 32), (48, 32), (32, 48)]
    stored = sum(stored_bytes(m, n, weights, double) for m, n in shapes)
    if weights == "int8":
        assert stored == linear_elements() + 4 * 2 * (5 * 32 + 2 * 48)
    assert abs(found.weights - stored - rest - inverse_frequencies) <= inverse_frequencies


def test_stored_bytes():
    assert stored_bytes(64, 64, "int8", False) == 64 * 64 + 64 * 4
    assert stored_bytes(64, 64, "int4", False) == 32 * 64 + 64 * 4
    assert stored_bytes(64, 256, "int4", True) == 32 * 256 + 256 + 4


def test_models_are_left_alone():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config())
    before = {n: p.clone() for n, p in model.named_parameters()}
    here = estimate_memory(model, "hybrid", BATCH)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == list(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.device("meta"):
        assert estimate_memory(transformers.LlamaForCausalLM(config()), "hybrid", BATCH) == here
    assert estimate_memory(config(), "hybrid", BATCH, weights="fp32").peak == here.peak
    ids = torch.zeros(BATCH, dtype=torch.long)
    assert estimate_memory(model, "hybrid", dict(input_ids=ids, labels=ids)) == here


def test_zeroth_order_takes_an_evaluation_and_streaming_a_copy():
    still = estimate_memory(config(), "zo", BATCH, weights="fp32")
    copied = estimate_memory(config(), "zo", BATCH, weights="fp32", perturbation="streamed")
    copied_buffers = 2 * 4 * 8  # of the inverse frequencies, in the first step
    assert still.peak == still.weights + still.evaluation
    assert still.peak_while_verifying == still.peak + copied_buffers
    assert (still.gradients, still.activations, still.optimizer_state) == (0, 0, 0)
    largest = 64 * 32 * 4  # kept aside while it is displaced
    assert copied.peak_while_verifying == copied.peak + largest
    assert copied.most == copied.peak_while_verifying


def test_fits_and_the_table():
    found = estimate_memory(config(), "hybrid", BATCH, weights="bf16")
    assert found.fits(found.most)
    assert not found.fits(found.most - 1)
    assert found.fits("1GB")
    assert not found.fits("1kB")
    lines = str(found).splitlines()
    assert lines[0] == "hybrid, bf16, in_place, sgd"
    assert any("peak" in line and "GB" in line for line in lines)
    assert isinstance(found, MemoryEstimate)


def test_which_fits():
    fits = which_fits(config(), BATCH, "1GB", weights="bf16")
    assert fits.methods == tuple(fits.estimates)
    least = min(e.most for e in fits.estimates.values())
    few = Fits(least, fits.estimates)
    assert few.methods
    assert all(few.estimates[name].most == least for name in few.methods)
    assert str(few).splitlines()[0].endswith("GB")
    assert len(str(few).splitlines()) == len(few.estimates) + 1
    for memory, said in ((least - 1, "no"), (least, "yes, with less than 10 % of room")):
        assert said in {
            line.split("  ")[-1].strip() for line in str(Fits(memory, fits.estimates)).splitlines()
        }
    assert str(fits).count("yes\n") == len(fits.estimates) - 1  # 1 GB is ample
    assert fits.arguments.keys() == fits.estimates.keys()
    for name in ("zo, low rank, per example", "hybrid, checkpointed"):
        again = estimate_memory(config(), batch=BATCH, **fits.arguments[name])
        assert again == fits.estimates[name]
    on_cpu = which_fits(config(), BATCH, "1GB", weights="bf16", device="cpu", adapter="lora")
    away = [n for n, e in fits.estimates.items() if e.on_host]
    assert away == [n for n, e in on_cpu.estimates.items() if e.on_disk]
    assert away == [n for n in fits.estimates if n.endswith("offloaded")]
    quantised = which_fits(config(), BATCH, "1GB", weights="int4")
    assert {"zo, in place", "hybrid"} < set(quantised.estimates) < set(fits.estimates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="mezo"), "method must be one of"),
        (dict(weights="int3"), "weights must be one of"),
        (dict(device="tpu"), "device must be one of"),
        (dict(method="fo", weights="int4"), "weights must be of floating point"),
        (dict(method="zo", weights="int4", perturbation="streamed"), "must be 'in_place'"),
        (dict(method="zo", gradient_checkpointing=True), "gradient_checkpointing must be left"),
        (dict(method="zo", optimizer_in_backward=True), "optimizer_in_backward must be left alone"),
        (dict(method="zo", fo_optimizer="sgd"), "fo_optimizer must be left alone"),
        (dict(method="zo", fo={}), "fo must be left alone"),
        (dict(method="zo", coupling=0.1), "coupling must be left alone where method='zo'"),
        (dict(method="zo", adapter="lora"), "adapter must be left alone"),
        (dict(method="fo", adapter=None), "adapter must be left alone where method='fo'"),
        (dict(method="lora", perturbation="streamed"), "perturbation must be left alone"),
        (dict(method="lora", estimator="one_sided"), "estimator must be left alone"),
        (dict(method="fo", rank=2), "rank must be left alone"),
        (dict(method="fo", offloaded=True), "offloaded must be left alone"),
        (dict(method="lora", weights="int4", quantized="frozen"), "quantized must be left alone"),
        (dict(weights="bf16", quantized="scales"), "quantized must be None"),
        (dict(weights="int4", quantized="all"), "quantized must be one of"),
        (dict(weights="int4", side_rank=4), "side_rank must be None"),
        (dict(weights="int4", quantized="low_rank", side_rank=0), "side_rank must be an int >= 1"),
        (dict(weights="bf16", dtype=torch.bfloat16), "dtype must be left alone"),
        (dict(weights="int4", dtype=torch.int8), "dtype must be one of"),
        (dict(weights="int8", double_quant=True), "double_quant must be False"),
        (dict(coupling=-1.0), "coupling must be a finite number"),
        (dict(coupling=0.1, optimizer_in_backward=True), "coupling must be 0"),
        (dict(offloaded=True, device="cpu"), "perturbation must be 'streamed'"),
        (
            dict(offloaded=True, perturbation="streamed", device="cpu", weights="int8"),
            "perturbation must be 'in_place'",
        ),
        (
            dict(method="lora", offloaded=True, device="cpu", weights="int8"),
            "weights must be plain",
        ),
        (
            dict(
                perturbation="streamed",
                structure="low_rank",
                directions="per_example",
                examples_per_direction=3,
            ),
            "batch must have a multiple of 3 rows",
        ),
        (dict(batch=(0, 3)), "batch must be"),
        (dict(batch={"input_ids": torch.zeros(1, 2).long()}), "batch must hold labels"),
        (dict(fo_optimizer="adam"), "fo_optimizer must be"),
        (dict(directions="per_example"), "structure must be"),
        (dict(method="hybrid", adapter=None, frozen=True), "model must have parameters that train"),
    ],
)
def test_refusals(changes, message):
    changes = dict(changes)
    model = config()
    if changes.pop("frozen", False):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config()).requires_grad_(False)
    method, batch = changes.pop("method", "hybrid"), changes.pop("batch", BATCH)
    with pytest.raises(ValueError, match=message):
        estimate_memory(model, method, batch, **changes)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        ("llama", BATCH, "model must be a torch.nn.Module or a configuration"),
        (config(), 8, "batch must be"),
    ],
)
def test_wrong_types(model, batch, message):
    with pytest.raises(TypeError, match=message):
        estimate_memory(model, "zo", batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(fo=[("lr", 0.1)]), "fo must be a mapping"),
        (dict(gradient_checkpointing=1), "gradient_checkpointing must be a bool"),
        (dict(adapter=16), "adapter must be 'lora'"),
    ],
)
def test_options_of_wrong_types(changes, message):
    with pytest.raises(TypeError, match=message):
        estimate_memory(config(), "hybrid", BATCH, **changes)


def test_a_model_that_has_an_adapter_keeps_it():
    import peft

    with torch.device("meta"):
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config()), peft.LoraConfig(r=2))
    of_two = estimate_memory(model, "hybrid", BATCH)
    assert of_two.adapter == 4 * 2 * 2 * 2 * (32 + 32)  # layers, projections, rank
    assert estimate_memory(model, "lora", BATCH, adapter=None).adapter == of_two.adapter
    with pytest.raises(ValueError, match="adapter must be left alone where the model has one"):
        estimate_memory(model, "hybrid", BATCH, adapter="lora")


def test_side_updates_in_closed_form():
    """4 r (m + n) bytes a layer, as docs/side-updates.md says."""
    plain = estimate_memory(config(), "zo", BATCH, weights="int4", quantized="frozen")
    beside = estimate_memory(
        config(), "zo", BATCH, weights="int4", quantized="low_rank", side_rank=4
    )
    widths = 4 * (32 + 32) + 3 * (32 + 48)
    assert beside.weights - plain.weights == 4 * 4 * 2 * widths


def test_torchao_weights_in_closed_form():
    quantization = pytest.importorskip("torchao.quantization")
    found = estimate_memory(config(), "lora", BATCH, weights=quantization.Int8WeightOnlyConfig())
    rest = 2 * (2 * 64 * 32 + 5 * 32)
    inverse_frequencies = 2 * 8 * 2
    rows = 2 * (5 * 32 + 2 * 48)
    stored = linear_elements() + (4 + 1) * rows  # a scale, and a zero point that is always 0
    assert abs(found.weights - stored - rest - inverse_frequencies) <= inverse_frequencies
    of_activations = quantization.Int8DynamicActivationInt8WeightConfig()
    with pytest.raises(ValueError, match="weights must be one of"):
        estimate_memory(config(), "lora", BATCH, weights=of_activations)


def test_models_without_a_loss():
    class Plain(torch.nn.Linear):
        def forward(self, input_ids, labels):
            return super().forward(input_ids.float())

    with pytest.raises(TypeError, match="outputs with a loss"):
        estimate_memory(Plain(16, 2), "zo", BATCH)


@pytest.mark.parametrize("memory", [0.5, "24 apples", "50%", 1, None])
def test_memories_that_are_none(memory):
    found = estimate_memory(config(), "zo", BATCH, weights="bf16")
    with pytest.raises((TypeError, ValueError), match="memory must be bytes"):
        found.fits(memory)


@pytest.mark.parametrize("option", ["perturbation", "fo_optimizer", "gradient_checkpointing"])
def test_options_that_tell_methods_apart_are_refused(option):
    with pytest.raises(ValueError, match=f"tell the methods apart, got {option}"):
        which_fits(None, None, "1GB", **{option: "streamed"})


def test_methods_that_a_model_does_not_admit_are_told():
    """Of a mixture of experts, one direction an example; the others have estimates."""
    experts = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, use_cache=False,
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    adapter = peft.LoraConfig(target_modules=["q_proj"])
    fits = which_fits(experts, BATCH, "1GB", weights="bf16", adapter=adapter)
    assert {"zo, in place", "hybrid", "full, AdamW, checkpointed"} <= set(fits.methods)
    assert fits.impossible.keys() == {n for n in COMMON if "per example" in n}
    assert fits.arguments.keys() == fits.estimates.keys() == COMMON.keys() - fits.impossible.keys()
    assert "cannot have a direction for each example" in str(fits)
    with pytest.raises(ValueError, match="weights must be one of"):
        which_fits(experts, BATCH, "1GB", weights="int3")
    with pytest.raises(ValueError, match="batch must be"):
        which_fits(experts, (0, 8), "1GB", weights="bf16")


def test_decoders_of_examples_get_their_inputs_from_labels():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, use_cache=False,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    ids = torch.zeros(2, 8, dtype=torch.long)
    options = dict(perturbation="streamed", structure="low_rank", directions="per_example")
    found = estimate_memory(config, "zo", dict(input_ids=ids, labels=ids), **options)
    assert found.evaluation > 0
