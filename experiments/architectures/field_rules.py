"""Which fields of configurations become small, by their names, and how."""

from __future__ import annotations

import re

from .fields import (
    EXPERTS,
    HEAD,
    HEADS,
    IMAGE,
    INNER,
    KINDS,
    LAYERS,
    PATCH,
    POSITIONS,
    VOCABULARY,
    Rule,
    fixed,
    is_list,
    key_value_heads,
    kinds,
    layer_indices,
    layers,
    number_of_layers,
    to,
    width,
)

RULES: list[Rule] = [
    ("|".join(KINDS), kinds),
    (r"rotary_dim", to(HEAD)),
    (r"encoder_hash_byte_group_vocab", to(32)),
    (r"hidden_size_per_layer_input", to(8)),
    (r"num_feat_extract_layers|num_conv_layers|num_adapter_layers", lambda v, c: v),
    (r"patch_embed_hidden_size|in_channels", lambda v, c: width(v, c) if is_list(v) else v),
    ("num_kv_shared_layers", to(0)),  # each kind of layer needs one that owns what is shared
    ("kv_source_layers", lambda v, c: list(range(number_of_layers(c)))),
    # layers
    (
        r"(?!num_)\w*(out_indices|visual_indexes|block_indexes|attn_indexes|layers_indices|target_layers"
        r"|attention_layers|feature_layers?|layer_ids?|attn_idxs|moe_layers|_out_features_idx"
        r"|mlp_only_layers|full_attn_layers|rope_scaling_layers|vision_layer)",
        layer_indices,
    ),
    (
        r"(conf_)?(num_|n_)?(\w+_)?(layers?|depths?|hidden_layers)(_per_stack)?|num_blocks|depth"
        r"|stage_num_blocks|stage_numb_of_layers|num_block_repeats|n_attn_blocks|resampler_depth"
        r"|num_layers_per_stage|block_sizes|block_repeats|num_self_attends_per_block"
        r"|layers_per_block|num_conv_layers",
        layers,
    ),
    # periods of layers
    (
        r"attn_layer_period|expert_layer_period|full_attention_interval|\w*sliding_window_pattern"
        r"|cross_attention_frequency|global_attn_every_n_layers|no_rope_layer_interval"
        r"|layer_group_size|attn_layer_indices_period",
        to(2),
    ),
    (
        r"attn_layer_offset|expert_layer_offset|decoder_sparse_step|encoder_sparse_step"
        r"|first_k_dense_replace|num_dense_layers|moe_layer_start_index"
        r"|interleave_moe_layer_step|cross_layer_interval|moe_layer_interval",
        to(1),
    ),
    (r"moe_layer_end_index|max_window_layers", to(LAYERS)),
    # heads
    ("num_attention_heads_per_layer", to(HEADS)),
    ("head_dim", lambda v, c: HEAD),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", to(8)),
    (
        r"(num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|n_kv_heads"
        r"|num_global_key_value_heads)",
        key_value_heads,
    ),
    (r"linear_num_key_heads|linear_num_heads", to(2)),
    (r"index_n_heads|linear_num_value_heads", to(4)),
    (
        r"\w*(heads|n_head|num_heads|num_attention_heads_per_layer)",
        lambda v, c: to(2)(v, c) if isinstance(v, (list, tuple)) else to(HEADS)(v, c),
    ),
    (r"mamba_(d_)?head(_)?dim|mamba_d_head|mamba_headdim", to(8)),
    (r"qk_head_dim", fixed(2 * HEAD)),
    (
        r"\w*head_dim|\w*head_size|kv_channels|dim_head|d_head|d_kv|qk_nope_head_dim|key_dim"
        r"|query_pre_attn_scalar|v_head_dim|resampler_dim_head",
        to(HEAD),
    ),
    (r"\w*lora_rank|\w*_rank|hc_lowrank", to(8)),
    # widths
    (
        r"(\w+_)?intermediate_size\w*|\w*ffn_dim\w*|\w*ffn_hidden_size|d_ff|d_inner|dff|dim_ff|mlp_dim"
        r"|feed_forward_size|shared_experts?_\w*size|share_expert_dim|\w*filter_size"
        r"|projector_hidden_size|ffn_hidden|\w*projection_hidden_\w+",
        to(INNER),
    ),
    (
        r"\w*hidden_sizes?|\w*hidden_dim|d_model|n_embd|\w*emb(ed)?_dims?|emb_dim|dim|\w*embedding_size"
        r"|\w*embedding_dim|\w*emb_size|out_hidden_size|\w*projection_dim|\w*proj_dim"
        r"|\w*proj_size|projection_size|encoder_dim|\w*output_dim|\w*input_dim|output_size"
        r"|\w*channels(?<!num_channels)(?<!in_channels)(?<!audio_channels)|base_channels"
        r"|lru_width|width|num_filters|d_latents|conv_dim|\w*_out_channels|tdnn_dim|hidden_channels"
        r"|pooler_output_size|classifier_hidden_size|bottleneck_\w*size|adapter_\w+_dim"
        r"|word_embed_proj_dim|mm_hidden_size|d_rel|conv_bias_dim|hidden_size_global",
        width,
    ),
    # tokens
    (r"vocab_size(_per_layer_input)?|\w+_vocab_size", to(VOCABULARY)),
    (
        r"\w*position_embeddings|n_positions|n_ctx|max_seq_len|max_\w+_positions|context_length"
        r"|model_max_length|seq_len|max_sequence_length|max_position",
        to(POSITIONS),
    ),
    (
        r"\w*sliding_window\w*|attention_chunk_size|local_attention|\w*window_len|attention_window_size"
        r"|\w*chunk_length|keep_window_size",
        to(8),
    ),
    (r"(mamba_)?chunk_size|index_topk|index_block_size|segment_means_seq_len|num_landmarks", to(8)),
    # experts
    (r"num_experts_per_tok(en)?|\w*top_?k(_experts)?|moe_k|num_selects", to(2)),
    (
        r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups|num_groups",
        to(1),
    ),
    (r"\w*(num|n)_?\w*experts|expert_num|zero_expert_num|num_expert", to(EXPERTS)),
    # state spaces
    (r"\w*state_size|mamba_d_state|ssm_state_size", to(8)),
    (r"mamba_d_ssm", to(64)),
    (r"mamba_dt_rank|time_step_rank", fixed(4)),
    # images
    (r"window_size", lambda v, c: to(2 if isinstance(v, int) and v <= 32 else 2 * PATCH)(v, c)),
    (r"image_grid_pinpoints", lambda v, c: [[IMAGE, IMAGE]]),
    (r"(max_|min_)?ima?ge?_size|resolution|crop_size|input_image_size", to(IMAGE)),
    (r"patch_size", lambda v, c: to(PATCH)(v, c)),
    (r"mm_tokens_per_image|vision_soft_tokens_per_image|image_seq_length|num_image_tokens", to(4)),
    (r"num_query_tokens|num_latents|latent_query_num|resampler_n(um)?_latents", to(4)),
    (r"num_position_embeddings", to(64)),
    (r"pos_emb_height|pos_emb_width", to(8)),
    # sound
    (r"num_mel_bins|feature_size|n_mel_bins", to(16)),
    (r"upsample_initial_channel", to(64)),
    (r"num_conv_pos_embeddings", to(8)),
    (r"num_conv_pos_embedding_groups", to(2)),
    (r"codebook_size|num_embeddings|codevector_dim|num_codevectors_per_group", to(32)),
    (r"mrope_section", lambda v, c: [2, 1, 1] if isinstance(v, (list, tuple)) else v),
    (r"long_factor|short_factor", lambda v, c: v[: HEAD // 2] if isinstance(v, list) else v),
    (r"original_max_position_embeddings", to(POSITIONS)),
]
PATTERNS = [(re.compile(pattern), rule) for pattern, rule in RULES]
