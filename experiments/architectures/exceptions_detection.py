"""What single kinds of models that find objects need beside the general rules, and why."""

from __future__ import annotations

from .special import DIM, DROP, NO_DEFAULT, Special

WITHOUT_TIMM = "the default backbone is one of timm"
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def resnet(*features: str) -> dict[str, object]:
    """The configuration of a tiny backbone."""
    return {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": list(features or STAGES),
    }


def _tall(long: int, short: int = 1) -> list[int]:
    return [long, short]


def _wide(long: int, short: int = 1) -> list[int]:
    return [short, long]


def _square(long: int, short: int = 1) -> list[int]:
    return [long, long]


INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{what}_{ratio}": [shape(size), 1, shape(size // 2, 0)]
        for ratio, size in (("longratio", 7), ("midratio", 5), ("shortratio", 3))
        for what, shape in (
            ("vertical_long_to_small_conv", _tall),
            ("horizontal_small_to_long_conv", _wide),
            ("symmetric_conv_long", _square),
        )
    },
}
"""Sizes, strides and paddings of convolutions."""
INTRACLASS_FIELDS = {
    "intraclass_block_config": INTRACLASS,
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
HALVING = {
    "backbone_config.out_features": STAGES,
    "backbone_config.stem_channels": [3, 16, 16],
    "backbone_config.block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 16, 2, False]],
        [[3, 16, 32, 2, False]],
        [[3, 32, 32, 2, True]],
    ],
}
"""Of each block: size, widths, stride, and whether it weighs its channels."""
QUERIES = "there are fewer places than objects to look for"
DETECTION: dict[str, Special] = {
    **{
        kind: Special(
            f"{WITHOUT_TIMM}; maps for segments come in eights, of widths and heads",
            {
                "backbone_config": resnet(),
                "num_queries": 5,
                "encoder_attention_heads": 8,
                "decoder_attention_heads": 8,
            },
        )
        for kind in ("detr", "conditional_detr", "dab-detr", "table-transformer")
    },
    "deformable_detr": Special(
        WITHOUT_TIMM, {"backbone_config": resnet(*STAGES[1:]), "num_queries": 5}
    ),
    "omdet-turbo": Special(
        WITHOUT_TIMM, {"backbone_config": resnet(*STAGES[1:]), "num_queries": 5}
    ),
    **{
        kind: Special(
            DIM,
            {
                "encoder_in_channels": [32, 64, 64],
                "decoder_in_channels": [32, 32, 32],
                "num_queries": 5,
            },
        )
        for kind in ("rt_detr", "rt_detr_v2")
    },
    **{
        kind: Special(
            DIM,
            {
                "encoder_in_channels": [32, 64, 64],
                "decoder_in_channels": [32, 32, 32],
                "x4_feat_dim": 16,
                "num_queries": 5,
            },
        )
        for kind in ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4")
    },
    **{
        kind: Special(QUERIES, {"num_queries": 5, "group_detr": 1})
        for kind in ("rf_detr", "grounding-dino", "mm-grounding-dino")
    },
    "pp_doclayout_v2": Special(
        f"{DIM}; thresholds and an order of classes have no default",
        {
            "encoder_in_channels": [32, 64, 64],
            "decoder_in_channels": [32, 32, 32],
            "num_queries": 5,
            "class_thresholds": [0.5, 0.5, 0.5],
            "class_order": [0, 1, 2],
            "reading_order_config.max_2d_position_embeddings": 1024,
        },
    ),
    "lw_detr": Special(
        QUERIES,
        {
            "num_queries": 5,
            "group_detr": 1,
            "projector_scale_factors": [1.0],
            "num_feature_levels": DROP,
            "projector_in_channels": DROP,
        },
    ),
    "pp_ocrv5_server_det": Special(NO_DEFAULT, INTRACLASS_FIELDS),
    **{
        kind: Special("features come from every stage, half as large each", {**HALVING, **more})
        for kind, more in (
            ("pp_ocrv6_small_det", {"layer_list_out_channels": [16, 16, 32, 32]}),
            ("pp_ocrv6_medium_det", INTRACLASS_FIELDS),
        )
    },
}
"""By ``model_type``."""
