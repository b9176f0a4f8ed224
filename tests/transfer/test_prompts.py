"""Prompts, prefixes and bottlenecks are carried exactly into models that are the same function."""

import copy

import families
import peft
import pytest
import torch

from zofo_optim.transfer import add_bottlenecks, bridge_model, transfer_adapter

TEXTS = families.texts(24)
BATCH = families.texts(1, seed=5)[0]
BATCH["attention_mask"] = torch.ones_like(BATCH["input_ids"])
BATCH["input_ids"] = BATCH["input_ids"].clamp_min(1)


def tuned(model, kind, task="CAUSAL_LM", **options):
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    config = config(task_type=task, num_virtual_tokens=3, **options)
    return families.randomised(peft.get_peft_model(model, config)).eval()


@torch.no_grad()
def answers(model):
    """Logits of the real tokens, which come last; or of the labels."""
    out = model(**BATCH).logits
    return out if out.ndim == 2 else out[:, -BATCH["input_ids"].shape[1] :]


def with_other_heads(model, repeats=1, seed=2):
    """The Llama ``model`` with its values' units rotated and its keys' scaled, by head.

    With ``repeats`` each head of keys and values is there so many times.
    """
    other = families.resized(model, num_key_value_heads=2 * repeats)
    turn = families.orthogonal(4, seed).float()
    weights = model.state_dict()
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if part in ("k_proj", "v_proj"):
            heads = weight.unflatten(0, (2, 4))
            heads = 2 * heads if part == "k_proj" else turn @ heads
            weights[name] = heads.repeat_interleave(repeats, 0).flatten(0, 1)
        elif part == "q_proj":
            weights[name] = weight / 2
        elif part == "o_proj":
            weights[name] = (weight.unflatten(1, (4, 4)) @ turn.T).flatten(1)
    other.load_state_dict(weights)
    return other


LARGE = {
    "the same": copy.deepcopy,
    "rotated": families.rotated,
    "widened": lambda m: families.widened(m, seed=1),
    "other heads": with_other_heads,
    "more heads": lambda m: with_other_heads(m, repeats=2),
}


def check(small, large, plain, rows, **options):
    """The carried adapter does in ``large`` what it does in ``small``, and not nothing."""
    wanted, without = answers(small), answers(plain)
    assert (wanted - without).norm() > 0.05 * without.norm()
    torch.testing.assert_close(answers(large), without, atol=1e-4, rtol=1e-3)
    model, report = transfer_adapter(small, large, TEXTS, **options)
    torch.testing.assert_close(answers(model), wanted, atol=1e-3, rtol=1e-3)
    assert len(report.rows) == rows
    errors = [
        e for row in report.rows for e in (row.input_error, row.output_error) if e is not None
    ]
    assert errors
    assert max(errors) < 1e-3
    assert not any(p.requires_grad for p in model.parameters())
    return model, report


@pytest.mark.parametrize("pair", LARGE)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_do_the_same_in_another_basis(pair, kind):
    plain = families.llama()
    small = tuned(copy.deepcopy(plain), kind)
    rows = {"prompt": 1, "prefix": 4}[kind]
    _, report = check(small, LARGE[pair](plain), plain, rows)
    assert report.layers == ({} if kind == "prompt" else {0: 0, 1: 1})


def test_a_prefix_of_a_perceptron_becomes_a_plain_one(tmp_path):
    plain = families.llama()
    small = tuned(copy.deepcopy(plain), "prefix", prefix_projection=True, encoder_hidden_size=5)
    model, _ = check(small, families.rotated(plain), plain, 4)
    assert not model.peft_config["default"].prefix_projection
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(families.rotated(plain), tmp_path).eval()
    assert torch.equal(answers(again), answers(model))


def test_prefixes_of_a_deeper_model():
    plain = families.llama()
    small = tuned(copy.deepcopy(plain), "prefix")
    large, true = families.deeper(plain, at=(0, 2))
    layers = {0: 0, 2: 1, **true}
    wanted = answers(small)
    model, report = transfer_adapter(small, large, TEXTS, layers=layers)
    assert report.layers == layers
    torch.testing.assert_close(answers(model), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("make", [families.permuted, families.doubled])
def test_encoders_and_their_heads(kind, make):
    plain = families.bert()
    small = tuned(copy.deepcopy(plain), kind, task="SEQ_CLS")
    if kind == "prefix":  # as of words: norms leave a direction out, which text cannot show
        cache = families.transformers.DynamicCache()
        plain.bert(BATCH["input_ids"][:1, :3], past_key_values=cache)
        states = [
            t[0].transpose(0, 1) for layer in cache.layers for t in (layer.keys, layer.values)
        ]
        prefix = torch.stack(states, 1).flatten(1)
        small.prompt_encoder["default"].embedding.weight.data = 2 * prefix - prefix.mean(0)
    large = make(plain)
    wanted = answers(small)
    assert not torch.allclose(wanted, answers(plain), atol=0.05)
    model, report = transfer_adapter(small, large, TEXTS)
    torch.testing.assert_close(answers(model), wanted, atol=2e-3, rtol=1e-3)
    assert [row.kind for row in report.rows][-1] == "head"


def test_factored_embeddings():
    """OPT's are narrower than its layers; peft must be told so."""
    config = families.transformers.OPTConfig(
        vocab_size=48,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=12,
        word_embed_proj_dim=8,
        max_position_embeddings=32,
        pad_token_id=0,
        init_std=0.3,
    )
    plain = families.made(families.transformers.OPTForCausalLM, config, 0)
    check(tuned(copy.deepcopy(plain), "prompt", token_dim=8), copy.deepcopy(plain), plain, 1)


# ---- bottlenecks --------------------------------------------------------------------------------


def bottlenecked(model, targets=("o_proj", "down_proj"), **options):
    return families.randomised(add_bottlenecks(model, targets, 3, **options)).eval()


@pytest.mark.parametrize("pair", ["the same", "rotated", "padded"])
@pytest.mark.parametrize("targets", [("o_proj", "down_proj"), ("self_attn", "mlp")])
def test_bottlenecks_do_the_same_in_another_basis(pair, targets):
    plain = families.llama(intermediate=24)
    small = bottlenecked(copy.deepcopy(plain), targets)
    make = {**LARGE, "padded": families.padded}[pair]
    model, _ = check(small, make(plain), plain, 4)
    assert model.bottlenecks["size"] == 3


def test_bottlenecks_and_a_head():
    plain = families.llama(labels=3)
    small = bottlenecked(copy.deepcopy(plain), ["o_proj"], modules_to_save=["score"], scale=0.5)
    model, report = check(small, families.rotated(plain), plain, 3)
    assert [row.kind for row in report.rows] == ["bottleneck", "bottleneck", "head"]
    assert model.bottlenecks["modules_to_save"] == ["score"]


# ---- bridges ------------------------------------------------------------------------------------


def prefix_of(model, heads=2, size=4):
    """By layer: keys and values, (layers, 2, tokens, heads * size)."""
    saved = model.get_prompt_embedding_to_save("default")
    return saved.unflatten(1, (-1, 2, heads * size)).permute(1, 2, 0, 3)


def test_layers_that_a_bridge_lacks_get_the_prefix_of_the_nearest_by_their_text():
    large = families.llama(layers=4)
    bridge = tuned(bridge_model(copy.deepcopy(large), None, layers=[0, 3]), "prefix")
    model, report = transfer_adapter(bridge, copy.deepcopy(large), TEXTS)
    assert report.layers == {0: 0, 1: 0, 2: 1, 3: 1}
    ours, theirs = prefix_of(bridge), prefix_of(model)
    for layer, kept in ((0, 0), (3, 1)):
        assert torch.equal(theirs[layer], ours[kept])
    for layer, kept in ((1, 0), (2, 1)):
        assert not torch.allclose(theirs[layer], ours[kept], atol=0.1)
    errors = {(row.large, row.kind): row.output_error for row in report.rows}
    assert errors["model.layers.0", "keys"] == 0.0
    with pytest.raises(ValueError, match=r"batches must be given to map layer 'model.layers.1'"):
        transfer_adapter(bridge, copy.deepcopy(large))


def test_prompts_and_bottlenecks_of_a_bridge_stay_as_they_are():
    large = families.llama(layers=4)
    bridge = tuned(bridge_model(large, None, layers=[0, 3]), "prompt")
    model, _ = transfer_adapter(bridge, copy.deepcopy(large))
    saved = (part.get_prompt_embedding_to_save("default") for part in (bridge, model))
    assert torch.equal(*saved)
    bridge = bottlenecked(bridge_model(large, None, layers=[0, 3]))
    model, _ = transfer_adapter(bridge, copy.deepcopy(large))
    state = {name: tensor for name, tensor in model.state_dict().items() if "bottleneck" in name}
    assert len(state) == 16
    ours = bridge.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, ours[name.replace("layers.3", "layers.1")])


# ---- what is refused ----------------------------------------------------------------------------


def refused(kind, large, message, **options):
    make = bottlenecked if kind == "bottleneck" else lambda m: tuned(m, kind)
    small = make(families.llama())
    before = copy.deepcopy(large.state_dict())
    flags = [p.requires_grad for p in large.parameters()]
    with pytest.raises(ValueError, match=message):
        transfer_adapter(small, large, TEXTS, **options)
    after = large.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in after.items())
    assert [p.requires_grad for p in large.parameters()] == flags
    assert not hasattr(large, "bottlenecks")


def test_unequal_widths_cannot_be_the_same():
    wide = families.widened(families.llama())
    refused("prompt", wide, r"layer 'model.embed_tokens' cannot be mapped", width="same")
    refused("bottleneck", wide, r"layer 'model.layers.0.self_attn.o_proj' cannot", width="same")
    more = with_other_heads(families.llama(), repeats=2)
    refused("prefix", more, r"layer 'model.layers.0' cannot .*keys has 16 .* 8", width="same")


def test_every_layer_needs_a_prefix():
    deep = families.llama(layers=3)
    refused("prefix", deep, "each layer of the large model, got none for", layers={0: 0, 2: 1})
    refused("prefix", deep, "take 'nearest'", layers="spread")


def test_heads_that_a_bridge_lacks_cannot_do_without_a_prefix():
    """A key of 0 takes part in the softmax: it is not the same as none."""
    large = families.llama()
    bridge = tuned(bridge_model(large, TEXTS, layers=2, heads=1), "prefix")
    before = answers(large)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0' .* bridge lacks heads of it"):
        transfer_adapter(bridge, large, TEXTS)
    assert torch.equal(answers(large), before)
    whole = tuned(bridge_model(large, TEXTS, layers=2, heads=2), "prefix")
    model, _ = transfer_adapter(whole, large)
    assert torch.equal(answers(model), answers(whole))


def test_other_virtual_tokens_are_refused():
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    small = peft.get_peft_model(families.llama(), config)
    with pytest.raises(ValueError, match=r"LORA, PREFIX_TUNING, PROMPT_TUNING.*got P_TUNING"):
        transfer_adapter(small, families.llama(), TEXTS)
