"""A batch for tasks that have none of their own: what each argument takes, and changes by kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import ARGUMENTS, VIDEOS, video
from .batches import EXAMPLES, LENGTH, Batch, sound, text_ids, texts
from .image_text import image_text_batch, images, randn

WIDE = 64
"""Numbers of each frame of a spectrum, where a configuration does not say it."""
LONG = 12000
"""Of sound: longer, as layers for speakers look far."""
SEPARATOR = 101
"""Of phrases, in BERT's words."""


def inputs(model: Any, names: set[str], count: int) -> Batch:
    """Every argument that there is a rule for.

    Args:
        model: an instance.
        names: of its forward's arguments.
        count: tokens of an image in a text.
    """
    batch: Batch = {}
    if {"pixel_values", "input_ids"} <= names:
        batch = image_text_batch(model, names, count)
        batch.pop("labels", None)
    elif "pixel_values" in names:
        batch = images(model, names)
    elif "input_ids" in names:
        batch = texts(model, names)
    if model.config.model_type in VIDEOS:
        batch["pixel_values"] = video(model)
    if "pixel_values" not in names and names & {"input_values", "input_features"}:
        batch |= {key: value for key, value in sound(model, names, 0).items() if key != "labels"}
    for name, make in ARGUMENTS.items():
        if name in names and name not in batch:
            batch[name] = make(model)
    for pattern, change in NAMED.items():
        if re.search(pattern, type(model).__name__):
            change(model, batch)
    if model.config.model_type in KINDS:
        KINDS[model.config.model_type](model, batch)
    if not re.search("Masked|PreTraining|SegGpt", type(model).__name__):
        batch.pop("bool_masked_pos", None)  # others have no weight for what is masked
    return {key: value for key, value in batch.items() if key in names}


def pairs(value: Tensor) -> Tensor:
    """(examples, 2, ...): the second is another example's."""
    return torch.stack([value, value.flip(0)], 1)


def _choices(model: Any, batch: Batch) -> None:
    batch |= {key: pairs(value) for key, value in batch.items()}


def _two_images(model: Any, batch: Batch) -> None:
    batch["pixel_values"] = pairs(batch["pixel_values"])


def _words_before(model: Any, batch: Batch) -> None:
    batch["decoder_input_ids"] = text_ids(30, 5)


def _all_frames(model: Any, batch: Batch) -> None:
    if "input_features" in batch:
        batch["attention_mask"] = torch.ones(batch["input_features"].shape[:2], dtype=torch.long)


def _long_sound(model: Any, batch: Batch) -> None:
    if "input_values" in batch:
        batch["input_values"] = randn(EXAMPLES, LONG)


NAMED: dict[str, Callable[[Any, Batch], None]] = {
    "MultipleChoice|DoubleHeads": _choices,
    "KeypointMatching|ImagesAndText": _two_images,
    "ForRNNT|ForTDT": _words_before,
    "ForCTC|ForRNNT|ForTDT": _all_frames,
    "XVector": _long_sound,
}
"""What a batch becomes for classes whose name has one of these words."""


def _halves(model: Any, batch: Batch) -> None:
    """Of an image and its mask, which the model puts together."""
    for name in batch:
        if "pixel" in name or name == "prompt_masks":
            batch[name] = batch[name][..., : batch[name].shape[-2] // 2, :]
    height, width = batch["pixel_values"].shape[-2:]
    count = 2 * height * width // model.config.patch_size**2
    batch["bool_masked_pos"] = (torch.arange(count) >= count // 2).expand(EXAMPLES, count)


def _embedded_sound(model: Any, batch: Batch) -> None:
    batch.pop("input_ids", None)
    batch["input_features"] = randn(EXAMPLES, LENGTH, model.config.d_model)


def _wide_sound(model: Any, batch: Batch) -> None:
    batch["input_features"] = randn(EXAMPLES, 32, model.config.input_feat_per_channel)
    batch.pop("attention_mask", None)


def _spectra(model: Any, batch: Batch) -> None:
    batch["input_features"] = randn(EXAMPLES, 32, WIDE)


def _global_attention(model: Any, batch: Batch) -> None:
    """Of the first token."""
    batch["global_attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["global_attention_mask"][..., 0] = 1


def _all_patches(model: Any, batch: Batch) -> None:
    """Of all examples, one after the other."""
    tokens = int((batch["input_ids"][0] == model.config.image_token_id).sum())
    batch["pixel_values"] = batch["pixel_values"][:, :tokens].flatten(0, 1)


def _phrases(model: Any, batch: Batch) -> None:
    """Two, each after a separator."""
    batch["input_ids"][:, [0, 4]] = SEPARATOR


def _one_channel(model: Any, batch: Batch) -> None:
    for name in ("input_values", "input_features"):
        if name in batch:
            batch[name] = batch[name].unsqueeze(1)


def _no_sound(model: Any, batch: Batch) -> None:
    batch.pop("input_values", None)


def _no_attention_mask(model: Any, batch: Batch) -> None:
    batch.pop("attention_mask", None)


def _own_patches(model: Any, batch: Batch) -> None:
    """Of each example beside the other's."""
    batch["pixel_values"] = batch["pixel_values"].unflatten(0, (EXAMPLES, -1))


def _output_alone(model: Any, batch: Batch) -> None:
    """A loss needs the words of a codebook of images."""
    batch.pop("image_attention_mask", None)
    batch["return_loss"] = False


def _cameras(model: Any, batch: Batch) -> None:
    """One of each robot."""
    batch["pixel_values"] = batch["pixel_values"].unsqueeze(1)
    batch["pixel_attention_mask"] = torch.ones(EXAMPLES, 1, dtype=torch.bool)


def _streams(model: Any, batch: Batch) -> None:
    """As long as the text."""
    frames = 8 * batch["input_ids"].shape[1]
    batch["input_features"] = randn(EXAMPLES, batch["input_features"].shape[-1], frames)


def _waves_alone(model: Any, batch: Batch) -> None:
    batch.pop("input_features", None)
    batch["input_values"] = randn(EXAMPLES, LONG)


def _phonemes(model: Any, batch: Batch) -> None:
    batch["input_ids"] = text_ids(model.config.model_config.vocab_size)


def _codes_before(model: Any, batch: Batch) -> None:
    """A row for each codebook."""
    batch.pop("input_values", None)
    decoder = model.config.decoder
    batch["decoder_input_ids"] = text_ids(decoder.vocab_size).repeat(decoder.num_codebooks, 1)


def _chroma_and_codes(model: Any, batch: Batch) -> None:
    _codes_before(model, batch)
    batch["input_features"] = randn(EXAMPLES, 16, model.config.num_chroma)


KINDS: dict[str, Callable[[Any, Batch], None]] = {
    "seggpt": _halves,
    "pop2piano": _embedded_sound,
    "speech_to_text": _wide_sound,
    "colqwen2": _own_patches,
    "flava": _output_alone,
    "granite_speech5_ctc": _spectra,
    "grounding-dino": _phrases,
    "mm-grounding-dino": _phrases,
    "clap_audio_model": _one_channel,
    "mimi_encoder": _one_channel,
    "musicgen": _codes_before,
    "musicgen_melody": _chroma_and_codes,
    "fastspeech2_conformer_with_hifigan": _phonemes,
    "speech-encoder-decoder": _waves_alone,
    "csm": _no_sound,
    "pi0": _cameras,
    "voxtral_realtime": _streams,
    "longformer": _global_attention,
    "neomme": _all_patches,
    "openai-gpt": _no_attention_mask,
}
"""What a batch becomes for some kinds of models."""
