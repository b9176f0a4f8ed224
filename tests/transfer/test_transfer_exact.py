"""A carried adapter does to the large model what it did to the small one, where they are one."""

import copy

import families
import peft
import pytest
import torch
from families import logits

from zofo_optim.transfer import transfer_adapter

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = families.texts()
UNSEEN = families.texts(1, seed=9)[0]


def check_same(large, small, tolerance=1e-3):
    """By what the adapter changes, which is a tenth of the logits at least."""
    with small.disable_adapter():
        before = logits(small, UNSEEN)
    wanted = logits(small, UNSEEN)
    assert (wanted - before).norm() > 0.1 * before.norm()
    error = (logits(large, UNSEEN) - wanted).norm() / (wanted - before).norm()
    assert error < tolerance


def carry(small, large, batches=TEXTS, **options):
    model, report = transfer_adapter(small, large, batches, **options)
    return model.eval(), report


PAIRS = {
    "rotated": families.rotated,
    "padded": families.padded,
    "widened": families.widened,
    "widened, rotated": lambda model: families.widened(model, seed=1),
    "double units": lambda model: families.widened(model, seed=1, units=True),
}
UNSCALED = ["rotated", "padded"]
"""Where the bases are related by a semi-orthogonal matrix, the only kind that procrustes finds."""


@pytest.mark.parametrize(
    ("pair", "width"),
    [(pair, "least_squares") for pair in PAIRS] + [(pair, "procrustes") for pair in UNSCALED],
)
def test_lora_in_another_basis(pair, width):
    plain = families.llama()
    large = PAIRS[pair](plain)
    small = families.with_lora(plain, target_modules=EVERY)
    model, report = carry(small, large, width=width)
    check_same(model, small)
    assert report.layers == {0: 0, 1: 1}
    assert len(report.rows) == 2 * len(EVERY)


@pytest.mark.parametrize("rank", ["rank_pattern", "rslora", "layers_to_transform"])
def test_options_of_lora(rank):
    """By names of layers that the large model has elsewhere."""
    options = {
        "rank_pattern": dict(
            rank_pattern={"layers.1.self_attn.q_proj": 2, "k_proj": 3},
            alpha_pattern={"layers.0.mlp.down_proj": 1, r"layers\.1\..*v_proj": 9},
        ),
        "rslora": dict(use_rslora=True, r=3, lora_alpha=2),
        "layers_to_transform": dict(layers_to_transform=[1]),
    }[rank]
    plain = families.llama()
    large, true = families.deeper(plain, at=(0, 2))
    small = families.with_lora(plain, target_modules=EVERY, **options)
    model, _ = carry(small, large, layers=true)
    check_same(model, small)


@pytest.mark.parametrize("pair", ["rotated", "widened, rotated"])
def test_feed_forwards_that_widen(pair):
    """Their units are seen after the non-linearity: outputs fill no more than the inputs do."""
    plain = families.llama(intermediate=40)
    large = PAIRS[pair](plain)
    small = families.with_lora(plain, target_modules=EVERY)
    model, _ = carry(small, large)
    check_same(model, small)


def test_a_gate_is_seen_at_its_activation():
    """The large model has the other sign in ``up`` and ``down``: products differ, gates do not."""
    plain = families.llama(intermediate=40)
    large = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in large.model.layers:
            layer.mlp.up_proj.weight.neg_()
            layer.mlp.down_proj.weight.neg_()
    torch.testing.assert_close(logits(large, UNSEEN), logits(plain, UNSEEN))
    small = families.with_lora(plain, target_modules=["gate_proj", "up_proj"])
    model, _ = carry(small, families.rotated(large))
    check_same(model, small)


def test_a_feed_forward_in_two_parts():
    """BERT's ``intermediate`` and ``output``; units in another order."""
    plain = families.bert(intermediate=64)
    large = families.permuted(plain)
    small = families.with_lora(plain, task="SEQ_CLS", target_modules=["intermediate.dense"])
    model, report = carry(small, large, families.texts(40))
    check_same(model, small, tolerance=5e-3)
    assert max(row.output_error for row in report.rows if row.kind == "lora") < 1e-3


def test_what_widens_is_refused():
    """Where no layer reads its units: query, key and value in one."""
    plain = families.gpt2()
    small = families.with_lora(plain, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn.* 48 outputs, more than inputs"):
        transfer_adapter(small, families.gpt2(), TEXTS)


@pytest.mark.parametrize(
    "options", [dict(init_lora_weights="pissa"), dict(use_dora=True), dict(bias="lora_only")]
)
def test_lora_that_is_not_a_change_alone(options):
    """PiSSA takes its first B A out of the small base model; the large one's still has it."""
    small = families.with_lora(families.llama(), target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        transfer_adapter(small, families.llama(), TEXTS)


def test_an_explicit_map():
    plain = families.llama(layers=3)
    large, true = families.deeper(plain, at=(0, 2, 3))
    small = families.with_lora(plain, target_modules=["q_proj", "v_proj"])
    model, report = carry(small, families.rotated(large), layers=true)
    check_same(model, small)
    assert report.layers == true


def test_the_map_by_similarity():
    """Is the true one: a layer that adds nothing is not what the small model's layer is like."""
    plain = families.llama(layers=3)
    large, true = families.deeper(plain, at=(0, 2, 3))
    small = families.with_lora(plain, target_modules=["q_proj", "v_proj"])
    model, report = carry(small, families.rotated(large), layers="similar")
    assert report.layers == true
    check_same(model, small)


def test_the_head_of_a_decoder():
    plain = families.llama(labels=3)
    small = families.with_lora(plain, task="SEQ_CLS", target_modules=EVERY)
    large = families.rotated(families.llama(labels=3))
    with torch.no_grad():
        large.score.weight.normal_()
    model, _ = carry(small, large)
    check_same(model, small)


@pytest.mark.parametrize("pair", [families.permuted, families.doubled])
def test_the_heads_of_an_encoder(pair):
    plain = families.bert()
    large = pair(plain)
    small = families.with_lora(plain, task="SEQ_CLS", target_modules="all-linear")
    families.within_outputs(small, TEXTS)
    with torch.no_grad():
        large.classifier.weight.normal_()
        large.classifier.bias.normal_()
    model, _ = carry(small, large, families.texts(40))
    check_same(model, small, tolerance=5e-3)  # the last head's map has a row a text


def test_conv1d():
    plain = families.gpt2()
    large = copy.deepcopy(plain)
    small = families.with_lora(plain, target_modules=["c_proj", "c_fc"], fan_in_fan_out=True)
    families.within_outputs(small, TEXTS)
    model, _ = carry(small, large)
    check_same(model, small)


@pytest.mark.parametrize("batches", [TEXTS, None])
def test_models_of_the_same_units(batches):
    """With or without text; what widens too."""
    plain = families.gpt2()
    large = copy.deepcopy(plain)
    small = families.with_lora(
        plain, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    model, report = carry(small, large, batches, width="same")
    assert torch.equal(logits(model, UNSEEN), logits(small, UNSEEN))
    errors = {row.output_error for row in report.rows}
    assert errors == ({None} if batches is None else {0.0})


def test_saved_and_loaded(tmp_path):
    """By peft alone, into a fresh copy of the large model."""
    plain = families.llama(labels=3)
    small = families.with_lora(plain, task="SEQ_CLS", target_modules=EVERY)
    large = families.deeper(families.rotated(families.llama(labels=3)), at=(1,))[0]
    fresh = copy.deepcopy(large)
    model, _ = carry(small, large)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(logits(loaded, UNSEEN), logits(model, UNSEEN))
