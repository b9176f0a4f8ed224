"""A batch of two examples with labels that fits a class's forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .classes import Case
from .fields import IMAGE, SPECIAL

EXAMPLES, LENGTH, LABELS = 2, 8, 3
Batch = dict[str, Any]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def text_ids(vocabulary: int, length: int = LENGTH) -> Tensor:
    """Of no special token."""
    low = min(SPECIAL, vocabulary // 2)
    return torch.randint(low, vocabulary, (EXAMPLES, length), generator=generator())


def parameters_of(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def field(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the configuration or a nested one has."""
    nested = [
        part
        for key in (
            "vlm_config",
            "text_config",
            "vision_config",
            "audio_config",
            "encoder",
            "decoder",
        )
        if (part := getattr(config, key, None)) is not None and not isinstance(part, (int, str))
    ]
    for part in [config, *nested]:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def batch_for(case: Case, model: Any, image_tokens: int = 4) -> Batch:
    """Inputs and labels for ``model(**batch)``.

    Args:
        case: what the class is for.
        model: an instance.
        image_tokens: of each example, in tasks of images and text.
    """
    return MAKERS[case.task](model, parameters_of(model), image_tokens)


def texts(model: Any, names: set[str]) -> Batch:
    vocabulary = field(model.config, "vocab_size", "src_vocab_size", default=128)
    ids = text_ids(vocabulary if isinstance(vocabulary, int) else 128)
    end = field(model.config, "eos_token_id")
    if isinstance(end, int) and 0 < end < ids.max():
        ids[:, -1] = end  # some classify what stands there
    batch: Batch = {"input_ids": ids}
    if "attention_mask" in names:
        batch["attention_mask"] = torch.ones_like(ids)
    if "bbox" in names:
        batch["bbox"] = torch.tensor([1, 2, 5, 6]).expand(EXAMPLES, LENGTH, 4).contiguous()
    return batch


def _language(model: Any, names: set[str], _: int) -> Batch:
    if model.config.model_type.startswith("musicgen"):  # a row for each codebook
        books = model.config.num_codebooks
        rows = text_ids(model.config.vocab_size).repeat(books, 1)
        return {"input_ids": rows, "labels": rows.reshape(EXAMPLES, books, -1).transpose(1, 2)}
    batch = texts(model, names)
    return batch | {"labels": batch["input_ids"].clone()}


def _seq2seq(model: Any, names: set[str], count: int) -> Batch:
    batch = _language(model, names, count)
    if "labels" not in names and "decoder_input_ids" in names:
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def _sequence(model: Any, names: set[str], _: int) -> Batch:
    return texts(model, names) | {"labels": torch.tensor([0, 1])}


def _token(model: Any, names: set[str], _: int) -> Batch:
    batch = texts(model, names)
    return batch | {"labels": batch["input_ids"] % LABELS}


def _question(model: Any, names: set[str], _: int) -> Batch:
    batch = texts(model, names)
    if model.config.model_type == "longformer":  # a question, and an answer after two separators
        batch["input_ids"][:, [2, 3, -1]] = model.config.sep_token_id
    return batch | {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([4, 6]),
    }


def image_size(config: Any) -> tuple[int, int]:
    size = field(config, "image_size", default=IMAGE)
    while isinstance(size, (list, tuple)) and isinstance(size[0], (list, tuple)):
        size = size[0]
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def _image(model: Any, names: set[str], count: int) -> Batch:
    from .image_text import image_text_batch

    labels = {"labels": torch.tensor([0, 1])}
    if "input_ids" in names and "pixel_values" not in names:
        return texts(model, names) | labels
    if "input_ids" in names or "spatial_shapes" in names:
        batch = image_text_batch(model, names, count)
        kept = {key: value for key, value in batch.items() if key in names and key != "labels"}
        return kept if model.config.model_type == "shieldgemma2" else kept | labels  # of words
    pixels = torch.randn(
        EXAMPLES,
        field(model.config, "num_channels", default=3),
        *image_size(model.config),
        generator=generator(),
    )
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def sound(model: Any, names: set[str], _: int) -> Batch:
    labels = torch.tensor([0, 1])
    if "input_features" in names:
        bins = field(model.config, "num_mel_bins", "feature_projection_input_dim", default=16)
        frames = 2 * field(model.config, "max_source_positions", default=16)
        shape = (
            (EXAMPLES, bins, frames)
            if hasattr(model.config, "max_source_positions")
            and ("whisper" in model.config.model_type)
            else (EXAMPLES, 32, bins)
        )
        return {"input_features": torch.randn(shape, generator=generator()), "labels": labels}
    if hasattr(model.config, "max_length") and hasattr(model.config, "frequency_stride"):
        shape = (EXAMPLES, model.config.max_length, model.config.num_mel_bins)
        return {"input_values": torch.randn(shape, generator=generator()), "labels": labels}
    return {"input_values": torch.randn(EXAMPLES, 4000, generator=generator()), "labels": labels}


def _image_text(model: Any, names: set[str], count: int) -> Batch:
    from .image_text import image_text_batch

    return image_text_batch(model, names, count)


MAKERS = {
    "causal_lm": _language,
    "seq2seq_lm": _seq2seq,
    "masked_lm": _language,
    "sequence_classification": _sequence,
    "token_classification": _token,
    "question_answering": _question,
    "image_classification": _image,
    "image_text_to_text": _image_text,
    "audio_classification": sound,
}
