"""What cannot be pruned rightly is refused, by name."""

import pytest
import torch
from bridged import LLAMA, SIZES, T, bert, gpt2, llama, text

from zofo_optim.transfer.bridge import bridge_model


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (dict(layers=0), ValueError, "layers must be from 1 to 4, got 0"),
        (dict(layers=5), ValueError, "layers must be from 1 to 4, got 5"),
        (dict(layers=True), TypeError, "layers must be an int, got True"),
        (dict(layers="01"), TypeError, "layers must be an int, got '01'"),
        (dict(layers=[]), ValueError, "layers must be ascending indices below 4"),
        (dict(layers=[2, 1]), ValueError, r"got \[2, 1\]"),
        (dict(layers=[1, 1]), ValueError, r"got \[1, 1\]"),
        (dict(layers=[0, 4]), ValueError, r"got \[0, 4\]"),
        (dict(layers=[1.0]), TypeError, r"layers must be an int or ascending indices, got \[1.0\]"),
        (dict(layers=[-1, 2]), ValueError, r"got \[-1, 2\]"),
        (dict(layers=2, units=0.0), ValueError, r"units must be a share in \(0, 1\].*got 0.0"),
        (dict(layers=2, units=1.1), ValueError, r"units must be a share in \(0, 1\].*got 1.1"),
        (dict(layers=2, units=float("nan")), ValueError, "got nan"),
        (dict(layers=2, units=25), ValueError, "units must be from 1 to 24, got 25"),
        (dict(layers=2, units=True), TypeError, "units must be an int, got True"),
        (dict(layers=2, heads=3), ValueError, "heads must be from 1 to 2, got 3"),
        (dict(layers=2, heads=0.5), TypeError, "heads must be an int, got 0.5"),
    ],
)
def test_numbers_are_checked(options, kind, said):
    with pytest.raises(kind, match=said):
        bridge_model(llama(), text(), **options)


@pytest.mark.parametrize(
    ("batches", "kind", "said"),
    [
        (None, ValueError, "batches must be given.*got None"),
        ([], ValueError, "batches must have at least one token"),
        ([torch.zeros(1)], TypeError, "batches must be mappings.*got Tensor"),
        (
            [dict(input_ids=torch.ones(1, 2).long(), attention_mask=torch.zeros(1, 2).long())],
            ValueError,
            "batches must have at least one token",
        ),
        (
            [dict(input_ids=torch.ones(1, 2).long(), attention_mask=torch.ones(1, 1, 2, 2))],
            ValueError,
            r"attention_mask of shape \(texts, tokens\), got \(1, 1, 2, 2\)",
        ),
    ],
)
def test_batches_are_checked(batches, kind, said):
    with pytest.raises(kind, match=said):
        bridge_model(llama(), batches, layers=2)


def test_activations_that_are_not_finite_are_named():
    large = llama()
    with torch.no_grad():
        large.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"activations of .* are not finite"):
        bridge_model(large, text(), layers=[1], units=0.5)


def test_heads_whose_size_follows_from_their_number_stay():
    for large in (bert(), gpt2(), falcon()):
        with pytest.raises(ValueError, match=f"no head_dim.*{type(large.config).__name__}.*got 1"):
            bridge_model(large, text(), layers=2, heads=1)


def test_models_without_heads_have_none_to_leave_out():
    large = T.MambaForCausalLM(T.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=4))
    with pytest.raises(ValueError, match="no head_dim of its own, as MambaConfig"):
        bridge_model(large, text(), layers=2, heads=1)


def falcon():
    return T.FalconForCausalLM(T.FalconConfig(**SIZES))  # head_dim is a property


def test_heads_that_the_config_would_not_load_are_refused():
    pytest.importorskip("transformers", "5", reason="configs of transformers 4 check nothing")
    large = llama(num_key_value_heads=4)  # 16 is not a multiple of 3
    with pytest.raises(ValueError, match=r"heads=3 is refused by LlamaConfig: [^|]* multiple"):
        bridge_model(large, text(), layers=2, heads=3)


def test_fused_layers_are_named_with_their_shapes():
    large = T.Phi3ForCausalLM(T.Phi3Config(**LLAMA, head_dim=4))
    with pytest.raises(ValueError, match=r"units=12: .*layers\.0\.mlp\.gate_up_proj.*\(48, 16\)"):
        bridge_model(large, text(), layers=2, units=12)
    with pytest.raises(ValueError, match=r"heads=1: .*layers\.0\.self_attn\.qkv_proj.*\(32, 16\)"):
        bridge_model(large, text(), layers=2, heads=1)
    assert bridge_model(large, text(), layers=2).config.num_hidden_layers == 2


def test_experts_and_unknown_widths_are_refused():
    mixture = T.MixtralForCausalLM(T.MixtralConfig(**LLAMA, num_local_experts=2))
    with pytest.raises(ValueError, match=r"units=0\.5: .*layers\.0\.\w+\.experts"):
        bridge_model(mixture, text(), layers=2, units=0.5)
    bloom = T.BloomForCausalLM(T.BloomConfig(vocab_size=64, hidden_size=16, n_layer=4, n_head=4))
    with pytest.raises(ValueError, match=r"units=0\.5: BloomConfig has none of intermediate_size"):
        bridge_model(bloom, text(), layers=2, units=0.5)


def test_norms_over_all_heads_are_refused():
    config = T.Olmo2Config(**LLAMA)
    config.head_dim = 4
    with pytest.raises(ValueError, match=r"heads=1: .*self_attn\.q_norm\.weight"):
        bridge_model(T.Olmo2ForCausalLM(config), text(), layers=2, heads=1)


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"transformers model, got PeftModel.*merge_and_unload"):
        bridge_model(wrapped, text(), layers=2)
    with pytest.raises(ValueError, match="merge an adapter first"):
        bridge_model(wrapped.get_base_model(), text(), layers=2)
    assert bridge_model(wrapped.merge_and_unload(), text(), layers=2)


def test_weights_must_be_whole_and_of_floating_point():
    large = llama()
    large.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(24, 16, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.up_proj.*floating point, got torch.int8"
    ):
        bridge_model(large, text(), layers=2)
    large = llama()
    large.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model\.norm\.weight must be in memory"):
        bridge_model(large, text(), layers=2)
    large = llama()
    large.config.quantization_config = dict(quant_method="bitsandbytes")
    with pytest.raises(ValueError, match="must not be quantised"):
        bridge_model(large, text(), layers=2)


def test_models_of_other_kinds_are_refused():
    t5 = T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=64, d_model=16, num_layers=2, num_heads=4, d_ff=24, d_kv=4)
    )
    with pytest.raises(ValueError, match="one stack"):
        bridge_model(t5, text(), layers=1)
    with pytest.raises(ValueError, match="one stack"):
        bridge_model(torch.nn.Linear(2, 2), text(), layers=1)


class ByDepth(T.LlamaForCausalLM):
    """Each layer has something that others lack."""

    def __init__(self, config):
        super().__init__(config)
        for depth, layer in enumerate(self.model.layers):
            if depth == 1:
                layer.scale = torch.nn.Parameter(torch.ones(1))
            elif depth == 2:
                layer.gate = torch.nn.Linear(1, 1)
            layer.mlp.scales = torch.nn.Parameter(torch.ones(3 if depth == 3 else 1))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (1, "layer 1: it is LlamaDecoderLayer with scale in the large model, but LlamaDecoder"),
        (2, "layer 2: gate is Linear with weight, bias in the large model, but missing"),
        (3, r"layers\.3\.mlp\.scales must have the shape \(1,\) in a bridge, got \(3,\)"),
    ],
)
def test_layers_that_a_bridge_lacks_at_their_depth_are_refused(layer, said):
    large = ByDepth(T.LlamaConfig(**LLAMA))
    assert bridge_model(large, None, layers=[0])
    with pytest.raises(ValueError, match=said):
        bridge_model(large, None, layers=[layer])


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_a_first_layer_without_a_norm_stays_the_first(layers):
    large = T.ModernBertForMaskedLM(
        T.ModernBertConfig(**SIZES, intermediate_size=24, pad_token_id=0)
    )
    with pytest.raises(ValueError, match=r"layer 1: attn_norm is LayerNorm with weight.*Identity"):
        bridge_model(large, None, layers=layers)
    assert bridge_model(large, None, layers=[0, *layers])


class AlwaysFour(T.LlamaForCausalLM):
    def __init__(self, config):
        config.num_hidden_layers = 4
        super().__init__(config)


def test_the_config_must_say_how_many_layers_there_are():
    with pytest.raises(ValueError, match=r"layers=\[0, 2\]: LlamaConfig does not set"):
        bridge_model(AlwaysFour(T.LlamaConfig(**LLAMA)), None, layers=[0, 2])


def test_the_config_must_be_read_as_it_is_written(monkeypatch):
    change = classmethod(lambda kind, values: kind(**{**values, "rms_norm_eps": 0.5}))
    large = llama()
    monkeypatch.setattr(T.LlamaConfig, "from_dict", change)
    with pytest.raises(ValueError, match="LlamaConfig would be read with another rms_norm_eps"):
        bridge_model(large, None, layers=[0, 2])


def test_models_of_several_parts_are_refused():
    vision = dict(SIZES, num_hidden_layers=2, intermediate_size=16, image_size=28, patch_size=14)
    config = T.Gemma3Config(text_config=dict(LLAMA, head_dim=8), vision_config=vision)
    large = T.Gemma3ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"one model of text, got one with a Gemma3Config"):
        bridge_model(large, None, layers=[0, 2])
