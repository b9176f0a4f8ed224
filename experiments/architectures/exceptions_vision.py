"""What other single kinds of models of images need beside the general rules, and why."""

from __future__ import annotations

from .special import DIM, DROP, NO_DEFAULT, Special

POINTS = 64
VISION: dict[str, Special] = {
    "hgnet_v2": Special(
        DIM,
        {
            "stem_channels": [3, 16, 16],
            "stage_in_channels": [16, 16, 32, 64],
            "stage_mid_channels": [16] * 4,
            "stage_out_channels": [16, 32, 64, 64],
        },
    ),
    "pp_ocrv5_mobile_rec": Special("images are pooled often", {"image_size": 96}),
    "beit for image_modeling": Special("what is masked has a weight", {"use_mask_token": True}),
    "superglue": Special(DIM, {"keypoint_detector_config.descriptor_decoder_dim": 32}),
    "llama4_vision_model": Special(
        DIM,
        {
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_output_dim": 32,
            "projector_input_dim": 32,
        },
    ),
    "depth_pro": Special("hooks are on layers that are there", {"intermediate_hook_ids": [1, 0]}),
    "colqwen2": Special(
        "sections of rotary positions are too long",
        {"vlm_config.text_config.rope_parameters.mrope_section": [2, 1, 1]},
    ),
    "sam3_tracker": Special(
        DIM, {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    ),
    "slanext": Special(DIM, {"post_conv_in_channels": 32}),
    "zoedepth": Special(DIM, {"bottleneck_features": 32}),
    "oneformer": Special(DIM, {"mask_dim": 32, "train_num_points": POINTS}),
    "seggpt": Special(
        "an image stands above its mask",
        {
            "image_size": [128, 64],
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1],
        },
    ),
    "hiera for pretraining": Special(
        NO_DEFAULT, {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    ),
    **{
        f"sapiens2 for {task}": Special(
            NO_DEFAULT,
            {
                "head_config": {
                    "upsample_out_channels": [16, 16],
                    "upsample_kernel_sizes": [4, 4],
                    "conv_out_channels": [16],
                    "conv_kernel_sizes": [1],
                    "scale_conv_out_channels": [8],
                    "scale_conv_kernel_sizes": [1],
                    "scale_final_hidden_sizes": [8, 8],
                }
            },
        )
        for task in ("segmentation", "dense_prediction", "keypoints")
    },
    "efficientloftr": Special(
        DIM,
        {
            "stage_num_blocks": [1, 1, 1, 1],
            "out_features": [16, 16, 32, 32],
            "stage_in_channels": DROP,
            "stage_block_stride": DROP,
            "stage_block_out_channels": DROP,
            "stage_block_in_channels": DROP,
            "fine_fusion_dims": DROP,
            "rope_parameters.partial_rotary_factor": 2.0,
        },
    ),
    **{
        f"{kind} for segmentation": Special(
            "four layers give features", {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
        )
        for kind in ("beit", "data2vec-vision")
    },
    "dpt": Special(
        "four layers give features", {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
    ),
    **{
        f"{kind} for image_modeling": Special(
            "follows from the other widths", {"hidden_size": DROP, "num_layers": DROP}
        )
        for kind in ("swin", "swinv2")
    },
    **{
        kind: Special(
            DIM,
            {
                "vision_config.num_pos_feats": 16,
                "mask_decoder_config.vit_dim": 32,
                "vision_config.output_channels": 32,
                "prompt_encoder_config.image_size": 64,
                "prompt_encoder_config.image_embedding_size": 4,
            },
        )
        for kind in ("sam", "sam_hq")
    },
    "align": Special(DIM, {"projection_dim": 128}),
    "blip-2 for zero_shot_image_classification": Special(
        "texts are read", {"qformer_config.use_qformer_text_input": True, "image_token_index": None}
    ),
    "blip-2 for text_features": Special(
        "texts are read", {"qformer_config.use_qformer_text_input": True}
    ),
    "bridgetower": Special(
        "a head has 64 numbers",
        {
            "hidden_size": 64,
            "text_config.hidden_size": 64,
            "vision_config.hidden_size": 64,
            "num_attention_heads": 4,
            "contrastive_hidden_size": 32,
            "logit_scale_init_value": 2.6592,
        },
    ),
    "tvp": Special(DIM, {"visual_prompt_size": 16, "max_img_size": 64, "num_frames": 2}),
    "vilt for image_and_text": Special(
        NO_DEFAULT, {"num_images": 2, "modality_type_vocab_size": 3}
    ),
    "pp_lcnet_v4": Special(DIM, {"stem_channels": [3, 48, 96], "stage_out_channels": DROP}),
    "mask2former": Special(
        DIM, {"feature_size": 32, "mask_feature_size": 32, "train_num_points": POINTS}
    ),
    **{
        kind: Special("masks are compared at many points", {"train_num_points": POINTS})
        for kind in ("eomt", "eomt_dinov3")
    },
}
"""By ``model_type``."""
