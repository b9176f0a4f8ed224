"""Inputs by the names of a forward's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batches import EXAMPLES, LENGTH, field, image_size, text_ids
from .image_text import images, randn

FRAMES = 2
"""Of a video, where its model does not say how many."""
REGIONS = 4
"""Features of objects in an image."""
VIDEOS = ("timesformer", "videomae", "vivit", "tvp")
"""Kinds of models whose pixel values are a video's."""


def video(model: Any) -> Tensor:
    """(examples, frames, channels, height, width)."""
    frames = field(model.config, "num_frames", "frames_per_clip", default=FRAMES)
    channels = field(model.config, "num_channels", "in_chans", default=3)
    return randn(EXAMPLES, frames, channels, *image_size(model.config))


def patches_of(config: Any) -> Any:
    """Along both sides of an image."""
    patch = field(config, "patch_size", "patch_stride", default=16)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    height, width = image_size(getattr(config, "image_config", config))
    return (height // patch) * (width // patch)


def masked_patches(model: Any) -> Tensor:
    """Every second patch; of videos, of every tube of frames."""
    config = model.config
    count = patches_of(config)
    if config.model_type in VIDEOS:
        count *= config.num_frames // config.tubelet_size
    return (torch.arange(count) % 2).bool().expand(EXAMPLES, count).contiguous()


def series(model: Any) -> Tensor:
    """(examples, time, channels), or (examples, time) where a series is one number."""
    config = model.config
    length = field(config, "context_length", default=32)
    if config.model_type.startswith("timesfm"):
        return randn(EXAMPLES, length)
    if hasattr(config, "num_time_features"):
        length += max(config.lags_sequence)
        return randn(EXAMPLES, length)
    return randn(EXAMPLES, length, config.num_input_channels)


def time_features(model: Any) -> Tensor:
    config = model.config
    return randn(
        EXAMPLES, config.context_length + max(config.lags_sequence), config.num_time_features
    )


def regions(model: Any, *names: str) -> Tensor:
    return randn(EXAMPLES, REGIONS, field(model.config, *names))


def _zeros(*shape: int) -> Callable[[Any], Tensor]:
    return lambda model: torch.zeros(shape, dtype=torch.long)


ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "return_loss": lambda model: True,
    "bool_masked_pos": masked_patches,
    "pixel_values_videos": video,
    "past_values": series,
    "past_time_features": time_features,
    "past_observed_mask": lambda model: torch.ones_like(series(model)),
    "future_time_features": lambda model: randn(
        EXAMPLES, model.config.prediction_length, model.config.num_time_features
    ),
    "hidden_states": lambda model: images(model, set())["pixel_values"],  # so they call images
    "input_points": lambda model: torch.tensor([[[[20.0, 30.0]]]] * EXAMPLES),
    "prompt_depth": lambda model: randn(EXAMPLES, 1, 16, 16).abs(),
    "prompt_pixel_values": lambda model: images(model, set())["pixel_values"],
    "prompt_masks": lambda model: images(model, set())["pixel_values"],
    "visual_embeds": lambda model: regions(model, "visual_embedding_dim"),
    "visual_attention_mask": lambda model: torch.ones(EXAMPLES, REGIONS, dtype=torch.long),
    "visual_feats": lambda model: regions(model, "visual_feat_dim"),
    "visual_pos": lambda model: regions(model, "visual_pos_dim").sigmoid(),
    "entity_ids": lambda model: torch.tensor([[1, 2]] * EXAMPLES),
    "entity_attention_mask": lambda model: torch.ones(EXAMPLES, 2, dtype=torch.long),
    "entity_position_ids": lambda model: torch.tensor([[[1, 2], [3, -1]]] * EXAMPLES),
    "entity_start_positions": lambda model: torch.tensor([[1, 3]] * EXAMPLES),
    "entity_end_positions": lambda model: torch.tensor([[2, 3]] * EXAMPLES),
    "task_inputs": lambda model: text_ids(100, model.config.task_seq_len),
    "classes_structure": lambda model: torch.tensor([2] * EXAMPLES),
    "classes_input_ids": lambda model: text_ids(100, 4).repeat(2, 1),
    "classes_attention_mask": lambda model: torch.ones(2 * EXAMPLES, 4, dtype=torch.long),
    "tasks_input_ids": lambda model: text_ids(100, 4),
    "tasks_attention_mask": lambda model: torch.ones(EXAMPLES, 4, dtype=torch.long),
    "attack_input_ids": lambda model: text_ids(model.config.vocab_size),
    "backbone_last_hidden_state": lambda model: randn(EXAMPLES, model.config.backbone_hidden_size),
    "mc_token_ids": lambda model: torch.tensor([LENGTH - 1] * EXAMPLES),
    "question_positions": lambda model: torch.tensor([[1], [2]]),
    "region_to_phrase_position": _zeros(EXAMPLES, LENGTH + REGIONS),
    "langs": _zeros(EXAMPLES, LENGTH),
}
"""By name."""
