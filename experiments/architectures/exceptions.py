"""What single kinds of models need beside the general rules, each with its reason."""

from __future__ import annotations

from .exceptions_detection import DETECTION
from .exceptions_vision import VISION
from .special import DIM, DROP, NO_DEFAULT, Special

MROPE = "without a default in the configuration, sections of rotary positions are too long"
SECTIONS = "rope_parameters.mrope_section"
WORDS = {"<image>": 44, "<|extra_200|>": 45, "<|image start|>": 46, "<|image end|>": 47}
PIECES = {"IMGIMG" + "ABCDEFGHIJ"[i // 10] + "ABCDEFGHIJ"[i % 10] + "Z": 12 + i for i in range(32)}
TURNS = {"rope_type": "default", "rope_theta": 1e4}
BY_KIND = {"full_attention": TURNS, "sliding_attention": TURNS}
SPECIAL_CASES: dict[str, Special] = {
    **DETECTION,
    **VISION,
    **{
        kind: Special(MROPE, {f"text_config.{SECTIONS}": [2, 1, 1]})
        for kind in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "paddleocr_vl")
    },
    "glm4v_moe": Special(MROPE, {f"text_config.{SECTIONS}": [1, 1, 0]}),
    "emu3": Special(
        "images are found by a map of words",
        {"vocabulary_map": {**WORDS, **{f"<|visual token {i:06d}|>": 12 + i for i in range(32)}}},
    ),
    "cohere_compass": Special(NO_DEFAULT, {"text_config.rope_parameters": BY_KIND}),
    "cohere_compass_text": Special(NO_DEFAULT, {"rope_parameters": BY_KIND}),
    "diffusion_gemma": Special(
        NO_DEFAULT,
        {
            "text_config.moe_intermediate_size": 32,
            "text_config.num_experts": 4,
            "text_config.top_k_experts": 2,
        },
    ),
    "efficientnet": Special(
        "the last width is that of the last product",
        {"width_coefficient": 1.0, "depth_coefficient": 0.2, "hidden_dim": 1280},
    ),
    "hunyuan_vl": Special(MROPE, {f"text_config.{SECTIONS}": [1, 1, 1, 1]}),
    "instructblipvideo": Special(NO_DEFAULT, {"video_token_index": 40, "video_token_id": 40}),
    "kimi_k25": Special(DIM, {"projection_hidden_size": 32}),
    "llama4": Special(
        DIM,
        {
            "vision_config.intermediate_size": 128,
            "vision_config.vision_output_dim": 32,
            "vision_config.projector_output_dim": 32,
            "vision_config.projector_input_dim": 32,
        },
    ),
    "t5gemma for text_features": Special("texts are only read", {"is_encoder_decoder": False}),
    **{
        f"{kind} for ctc": Special(NO_DEFAULT, {"vocab_size": 32})
        for kind in ("wav2vec2-bert", "wav2vec2-conformer")
    },
    **{
        kind: Special(NO_DEFAULT, {"prediction_length": 4, "context_length": 8})
        for kind in ("autoformer", "informer", "time_series_transformer")
    },
    **{
        kind: Special("groups of channels must fit", {f"{codec}.upsample_groups": 32})
        for kind, codec in (
            ("kyutai_speech_to_text", "codec_config"),
            ("csm", "codec_config"),
            ("moshi", "audio_encoder_config"),
        )
    },
    "moonshine_streaming": Special(
        NO_DEFAULT, {"num_key_value_heads": 4, "num_attention_heads": 4}
    ),
    "fastspeech2_conformer_with_hifigan": Special(DIM, {"vocoder_config.model_in_dim": 16}),
    "fun_asr_nano": Special(DIM, {"adaptor_config.intermediate_size": 8}),
    **{
        kind: Special(DIM, {"flow_head_config.condition_dim": 32})
        for kind in ("gradium_phonon_tts", "pocket_tts")
    },
    "mistral4": Special(DIM, {"head_dim": 16}),
    "mllama": Special(DIM, {"vision_config.vision_output_dim": 64}),
    "muse_glimmer": Special(DIM, {"vision_config.out_hidden_size": 128}),
    "muse_spark": Special(DIM, {"vision_config.out_hidden_size": 128}),
    "pp_formulanet": Special(DIM, {"vision_config.post_conv_in_channels": 32}),
    "qwen3_omni_moe_thinker": Special(
        "only the whole model's has it", {"vision_start_token_id": 30}
    ),
    "lfm2_moe": Special(
        NO_DEFAULT, {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    ),
    "laguna": Special("heads are counted by layer", {"num_attention_heads_per_layer": [4, 4]}),
    "bros": Special(
        "widths of boxes follow from the model's, which must hold eight pairs four times",
        {
            "hidden_size": 64,
            "dim_bbox_sinusoid_emb_2d": DROP,
            "dim_bbox_sinusoid_emb_1d": DROP,
            "dim_bbox_projection": DROP,
        },
    ),
    "chameleon": Special(
        "images are found by a map of words",
        {"vocabulary_map": {**WORDS, **PIECES}, "image_token_id": 44},
    ),
    "deepseek_ocr2": Special(
        NO_DEFAULT,
        {
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.num_experts_per_tok": 2,
        },
    ),
    "dots3_note": Special(
        DIM,
        {
            "text_config.per_layer_config": {},
            "text_config.head_dim": 16,
            "text_config.num_key_value_heads": 4,
        },
    ),
    "dots3_note_text": Special(
        DIM, {"per_layer_config": {}, "head_dim": 16, "num_key_value_heads": 4}
    ),
    "qwen2_5_omni_thinker": Special(
        "only the whole model's configuration has the token, and sections are too long",
        {"vision_start_token_id": 30, f"text_config.{SECTIONS}": [2, 1, 1]},
    ),
    "qwen4_exp": Special(
        NO_DEFAULT, {"text_config.indexer_budget": 8, "text_config.indexer_compress_ratio": 2}
    ),
    "qwen4_exp_text": Special(NO_DEFAULT, {"indexer_budget": 8, "indexer_compress_ratio": 2}),
    "data2vec-vision": Special("indices of layers may not be left out", {"out_indices": [0, 1]}),
    "cvt": Special("rates of a stage are read by its number", {"depth": [1, 2, 3]}),
    "ernie4_5_vl_moe": Special(MROPE, {f"text_config.{SECTIONS}": [1, 1, 2]}),
    "shieldgemma2": Special("answers are words", {"yes_token_index": 60, "no_token_index": 61}),
    "step3p7": Special(NO_DEFAULT, {"text_config.sliding_window": 8}),
    "textnet": Special(DIM, {"stem_out_channels": 16}),
    "aria": Special(
        "queries are listed by numbers of patches", {"projector_patch_to_query_dict": {16: 4}}
    ),
    "blip-2": Special(NO_DEFAULT, {"image_token_index": 40, "image_token_id": 40}),
    "instructblip": Special(NO_DEFAULT, {"image_token_index": 40, "image_token_id": 40}),
    "perceiver": Special(
        "texts are decoded at every position, and widths of images are odd",
        {
            "max_position_embeddings": 8,
            "num_self_attention_heads": 1,
            "num_cross_attention_heads": 1,
        },
    ),
    "glm5_next": Special("keys are pooled in blocks", {"text_config.index_kpool": 4}),
    "blt": Special(
        "hash tables have sizes of their own",
        {"encoder_hash_byte_group_vocab": 32},
    ),
    "deepseek_v2": Special(NO_DEFAULT, {"num_experts_per_tok": 2}),
    "dots1": Special(
        NO_DEFAULT,
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "dbrx": Special(
        "the default lacks rope_theta",
        {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    ),
    "gemma4_assistant": Special("must be 0", {"text_config.hidden_size_per_layer_input": 0}),
    "esm": Special(NO_DEFAULT, {"vocab_size": 64}),
    "lilt": Special("the width must be a multiple of 6 and of 4", {"hidden_size": 48}),
    "layoutlmv3": Special(
        "six parts of positions make up the width",
        {"hidden_size": 48, "coordinate_size": 8, "shape_size": 8, "input_size": 32},
    ),
    "mobilebert": Special(
        "widths of bottlenecks follow from each other",
        {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    ),
    "neomme": Special(
        "M-RoPE turns pairs of axes", {"rope_parameters.full_attention.partial_rotary_factor": 0.5}
    ),
    "gpt_neo": Special(
        "layers are counted in pairs",
        {"attention_types": [[["global", "local"], 1]], "attention_layers": DROP},
    ),
    "led": Special(
        "windows and positions must fit, and texts are padded to whole windows",
        {"attention_window": [8, 8], "max_encoder_position_embeddings": 64},
    ),
    "longformer": Special("windows must fit", {"attention_window": [8, 8]}),
    "mamba2": Special("heads must fill the inner width of 64", {"num_heads": 8, "head_dim": 8}),
    "reformer": Special(
        "the axes of positions multiply to the length, and their widths add up to the model's",
        {
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [16, 16],
            "lsh_attn_chunk_length": 4,
            "local_attn_chunk_length": 4,
            "num_buckets": 2,
            "num_hashes": 1,
            "hash_seed": 0,
        },
    ),
    "xmod": Special("adapters are chosen by language", {"default_language": "en_XX"}),
    "zamba": Special(
        "hybrid layers share weights: there must be two",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
        },
    ),
    "zamba2": Special(
        "the shared attention is twice as wide as the model",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "kv_channels": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
        },
    ),
}
"""By ``model_type``."""
