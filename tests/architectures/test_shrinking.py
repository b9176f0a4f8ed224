"""Tiny configurations: what the rules make of fields."""

import pytest

pytest.importorskip("transformers")

from experiments.architectures.fields import HEADS, HIDDEN, LAYERS, SPECIAL, kept_layers
from experiments.architectures.shrinking import shrunk

LLAMA = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=11008,
    vocab_size=32000,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)


def test_fields_shrink_and_the_rest_stays():
    small = shrunk(LLAMA)
    assert (small["hidden_size"], small["num_hidden_layers"]) == (HIDDEN, LAYERS)
    assert small["num_attention_heads"] == HEADS
    assert small["num_key_value_heads"] == HEADS // 2  # still fewer than heads
    assert small["rms_norm_eps"] == 1e-6
    assert small["tie_word_embeddings"] is False
    assert shrunk(LLAMA | dict(num_key_value_heads=32))["num_key_value_heads"] == HEADS


def test_nothing_grows():
    assert shrunk({"hidden_size": 8, "vocab_size": 10}) == {"hidden_size": 8, "vocab_size": 10}


def test_nested_configurations_shrink_too():
    small = shrunk({"text_config": LLAMA, "id2label": {0: "a", 1: "b"}})
    assert small == {"text_config": shrunk(LLAMA), "id2label": {0: "a", 1: "b"}}


def test_one_layer_of_each_kind_is_kept():
    kinds = ["sliding"] * 5 + ["full"] + ["sliding"] * 5 + ["full"]
    config = dict(num_hidden_layers=12, layer_types=kinds, depth_scales=list(range(12)))
    small = shrunk(config)
    assert kept_layers(config) == [0, 5]
    assert small["layer_types"] == ["sliding", "full"]
    assert small["depth_scales"] == [0, 5]
    assert small["num_hidden_layers"] == 2


def test_fields_by_layer_follow_their_layers():
    config = dict(
        num_hidden_layers=6,
        layer_types=["sliding"] * 5 + ["full"],
        per_layer_config={5: {"head_dim": 512}},
    )
    assert shrunk(config)["per_layer_config"] == {1: {"head_dim": 8}}


def test_special_tokens_keep_apart_below_those_of_texts():
    small = shrunk(
        {
            "pad_token_id": 0,
            "image_token_id": 151655,
            "text_config": {"image_token_id": 151655, "video_token_id": 151656},
        }
    )
    assert small["pad_token_id"] == 0
    assert small["image_token_id"] == small["text_config"]["image_token_id"]
    assert small["image_token_id"] != small["text_config"]["video_token_id"]
    assert 0 < small["image_token_id"] < SPECIAL


def test_indices_of_layers_are_there():
    assert shrunk({"vision_feature_layers": [-2, 6, 30]})["vision_feature_layers"] == [-2, 1]


def test_a_backbone_keeps_as_many_outputs():
    """Of stages, which stay; of layers, of which there are then as many."""
    stages = {"depths": [3, 4, 6, 3], "out_features": ["stage2", "stage4"], "out_indices": [2, 4]}
    layers = {"num_hidden_layers": 12, "out_features": ["stage3", "stage6", "stage9", "stage12"]}
    small = shrunk({"backbone_config": stages})["backbone_config"]
    assert small == {
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage4"],
        "out_indices": None,
    }
    small = shrunk({"backbone_config": layers})["backbone_config"]
    assert small["num_hidden_layers"] == 4
    assert small["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
