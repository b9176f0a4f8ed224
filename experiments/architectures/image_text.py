"""Batches of an image and a text in each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batches import EXAMPLES, LENGTH, Batch, field, generator, image_size, text_ids

TOKEN = ("image_token_id", "image_token_index", "image_patch_id", "img_token_id", "im_patch_id")
GRID = 4
"""Patches along each side, where images come as patches."""


def image_text_batch(model: Any, names: set[str], count: int) -> Batch:
    """Texts that begin with ``count`` tokens of an image, the image, and labels."""
    config = getattr(model.config, "vlm_config", model.config)
    vocabulary = field(config, "vocab_size", default=128)
    token = field(config, *TOKEN)
    token = (
        getattr(getattr(model, "model", model), "image_token_id", token) if token is None else token
    )
    ids = text_ids(vocabulary, LENGTH)
    if token is not None:
        start = field(config, "vision_start_token_id", "image_start_token_id")
        parts = [torch.full((EXAMPLES, count), token), ids]
        if start is not None:
            parts = [torch.full((EXAMPLES, 1), start), *parts]
        ids = torch.cat(parts, 1)
    labels = ids.clone()
    if token is not None:
        labels[ids == token] = -100
    batch: Batch = {"input_ids": ids, "labels": labels}
    if "attention_mask" in names:
        batch["attention_mask"] = torch.ones_like(ids)
    if "qformer_input_ids" in names:
        batch["qformer_input_ids"] = text_ids(vocabulary)
    for kinds in ("mm_token_type_ids", "token_type_ids"):
        if kinds in names and token is not None:
            batch[kinds] = (ids == token).long()
    if "image_attention_mask" in names:
        batch["image_attention_mask"] = torch.ones(*ids.shape, 1, dtype=torch.long)
    if "image_embeds_position_mask" in names:
        batch["image_embeds_position_mask"] = (
            (torch.arange(ids.shape[1]) < 4).expand_as(ids).clone()
        )
    if "bbox" in names:
        batch["bbox"] = torch.tensor([0.1, 0.1, 0.5, 0.6]).expand(*ids.shape, 4).contiguous()
    if "state" in names:
        batch["state"] = randn(EXAMPLES, model.config.max_state_dim)
        batch["actions"] = randn(EXAMPLES, model.config.chunk_size, model.config.max_action_dim)
    return batch | images(model, names)


def text_batch(model: Any, names: set[str]) -> Batch:
    """Texts alone."""
    ids = text_ids(field(model.config, "vocab_size", default=128))
    batch: Batch = {"input_ids": ids, "labels": ids.clone()}
    if "attention_mask" in names:
        batch["attention_mask"] = torch.ones_like(ids)
    for kinds in ("mm_token_type_ids", "token_type_ids"):
        if kinds in names:
            batch[kinds] = torch.zeros_like(ids)
    return batch


def images(model: Any, names: set[str]) -> Batch:
    """One for each example, in the shape that the forward takes, by the names of its arguments."""
    config = getattr(model.config, "vlm_config", model.config)
    vision = getattr(config, "vision_config", None) or config
    kind = config.model_type
    channels = field(vision, "num_channels", "in_channels", default=3)
    channels = channels if isinstance(channels, int) else 3
    patch = _side(field(vision, "patch_size", default=16))
    grids = [name for name in ("image_grid_thw", "grid_thw", "image_grid_hw") if name in names]
    batch: Batch
    if "flattened_patches" in names:
        return {"flattened_patches": _numbered(patch, channels)}
    if grids:
        temporal = field(vision, "temporal_patch_size", "patch_temporal", default=1)
        grid = [1, GRID, GRID] if grids[0].endswith("thw") else [GRID, GRID]
        size = channels * patch * patch * (temporal if isinstance(temporal, int) else 1)
        shape: tuple[int, ...] = (GRID * GRID * EXAMPLES, size)
        if kind in UNFLATTENED:
            shape = (GRID * GRID * EXAMPLES, channels, patch, patch)
        batch = {"pixel_values": randn(*shape), grids[0]: torch.tensor([grid] * EXAMPLES)}
        if "image_merge_sizes" in names:
            batch["image_merge_sizes"] = torch.ones(EXAMPLES, dtype=torch.long)
        return batch
    if "spatial_shapes" in names or kind in PATCHES:
        batch = {"pixel_values": randn(EXAMPLES, GRID * GRID, channels * patch * patch)}
        if "spatial_shapes" in names:
            batch["spatial_shapes"] = torch.tensor([[GRID, GRID]] * EXAMPLES)
        if "pixel_attention_mask" in names:
            batch["pixel_attention_mask"] = torch.ones(EXAMPLES, GRID * GRID, dtype=torch.long)
        return batch
    height, width = image_size(vision)
    shape = (EXAMPLES, channels, height, width)
    if kind in SEVERAL_IMAGES:
        shape = (EXAMPLES, SEVERAL_IMAGES[kind], channels, height, width)
    batch = {"pixel_values": randn(*shape)}
    if "image_sizes" in names and kind not in ("llava", "vipllava"):
        batch["image_sizes"] = torch.tensor([[height, width]] * EXAMPLES)
    if kind in SEVERAL_IMAGES and "pixel_attention_mask" in names:
        batch["pixel_attention_mask"] = torch.ones(EXAMPLES, 1, height, width, dtype=torch.bool)
    if "pixel_values_images" in names:
        return {"pixel_values_images": randn(*shape)}
    if "aspect_ratio_ids" in names:
        tiles = vision.max_num_tiles
        batch["pixel_values"] = randn(EXAMPLES, 1, tiles, channels, height, width)
        batch["aspect_ratio_ids"] = torch.ones(EXAMPLES, 1, dtype=torch.long)
        batch["aspect_ratio_mask"] = torch.ones(EXAMPLES, 1, tiles, dtype=torch.long)
    if "high_res_pixel_values" in names:
        batch["high_res_pixel_values"] = randn(
            EXAMPLES, channels, *image_size(config.high_res_vision_config)
        )
    return batch


UNFLATTENED = ("paddleocr_vl", "kimi_k25")
"""Kinds of models whose patches keep their shape."""
PATCHES = ("fuyu", "molmo2", "neomme")
"""Kinds of models that take an image as flat patches, without its shape."""
SEVERAL_IMAGES = {
    "idefics": 1,
    "idefics2": 1,
    "idefics3": 1,
    "smolvlm": 1,
    "granite_docling": 1,
    "instructblipvideo": 1,
    "modernvbert": 1,
    "inkling_mm_model": 1,
    "llava_next": 2,
    "llava_next_video": 2,
    "llava_onevision": 2,
    "granite4_vision": 2,
}
"""Kinds of models that take several images, or parts of one, for each example: how many."""


def _side(size: Any) -> int:
    return size if isinstance(size, int) else int(size[0])


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def _numbered(patch: int, channels: int) -> Tensor:
    """Patches that begin with their row and column."""
    patches = randn(EXAMPLES, GRID * GRID, 2 + channels * patch * patch)
    places = [[row + 1, column + 1] for row in range(GRID) for column in range(GRID)]
    patches[..., :2] = torch.tensor(places, dtype=torch.float32)
    return patches
