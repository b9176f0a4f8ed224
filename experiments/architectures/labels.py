"""Labels that a class may take: the first that its forward accepts, else its output is the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .batches import EXAMPLES, LABELS, Batch, field, generator
from .image_text import randn

TARGETS = ("next_sentence_label", "sentence_order_label", "sentence_image_labels", "matched_label")
"""One class for each example, beside the labels of its tokens."""


def labels_for(model: Any, names: set[str], batch: Batch) -> Iterator[Batch]:
    """One set of labels after the other, by the names of a forward's arguments; at last none."""
    beside = {name: torch.tensor([0, 1]) for name in TARGETS if name in names}
    if "mask_labels" in names:
        yield mask_labels(batch)
    if "start_positions" in names:
        yield {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([4, 6])}
        yield {
            "start_positions": torch.tensor([[1], [2]]),
            "end_positions": torch.tensor([[4], [6]]),
        }
    if "target_values" in names:
        yield {"target_values": torch.tensor([0, 1])}
        yield {"target_values": randn(EXAMPLES, field(model.config, "num_targets", default=1))}
    if "future_values" in names:
        yield {"future_values": future(model)}
    for kind in KINDS if "labels" in names else ():
        labels = kind(model, batch)
        if labels is not None:
            yield {"labels": labels, **beside}
    yield beside
    if beside:
        yield {}


def mask_labels(batch: Batch) -> Batch:
    """Two segments in each image: a half, and the other."""
    *_, height, width = next(v for k, v in batch.items() if k.startswith("pixel_values")).shape
    left = (torch.arange(width) < width // 2).float().expand(height, width)
    masks = torch.stack([left, 1 - left])
    return {
        "mask_labels": [masks.clone() for _ in range(EXAMPLES)],
        "class_labels": [torch.tensor([0, 1]) for _ in range(EXAMPLES)],
    }


def future(model: Any) -> torch.Tensor:
    config = model.config
    length = field(config, "prediction_length", "horizon_length", default=8)
    if hasattr(config, "num_input_channels"):
        return randn(EXAMPLES, length, config.num_input_channels)
    return randn(EXAMPLES, length)


def _tokens(model: Any, batch: Batch) -> Any:
    ids = batch.get("input_ids")
    if ids is None:
        return None
    if model.config.model_type in ("electra", "funnel"):  # was it replaced?
        return ids % 2
    special = [
        getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")
    ]
    labels = torch.where(torch.isin(ids, torch.tensor([s for s in special if s])), -100, ids)
    beside = batch.get("visual_embeds")  # regions are no words
    if beside is None or ids.dim() != 2:
        return labels
    return torch.cat([labels, torch.full(beside.shape[:2], -100)], 1)


def _phrases(model: Any, batch: Batch) -> Any:
    """Which region each token is about."""
    if "region_to_phrase_position" not in batch:
        return None
    shape = (*batch["region_to_phrase_position"].shape, batch["visual_embeds"].shape[1])
    return torch.rand(shape, generator=generator()).softmax(-1)


def _boxes(model: Any, batch: Batch) -> Any:
    """Two objects in each image, with masks."""
    if "pixel_values" not in batch:
        return None
    boxes = torch.tensor([[0.3, 0.4, 0.3, 0.5], [0.6, 0.5, 0.5, 0.4]])
    masks = mask_labels(batch)["mask_labels"]
    return [
        {"class_labels": torch.tensor([0, 1]), "boxes": boxes.clone(), "masks": masks[k]}
        for k in range(EXAMPLES)
    ]


def _boxes_of_one_kind(model: Any, batch: Batch) -> Any:
    labels = _boxes(model, batch)
    return labels and [{**one, "class_labels": torch.tensor([0, 0])} for one in labels]


def _mask(model: Any, batch: Batch) -> Any:
    pixels = _pixels(model, batch)
    return None if pixels is None else (pixels > 0).float()


def _frames(model: Any, batch: Batch) -> Any:
    """A number for each class of each frame of audio."""
    if "AudioFrame" not in type(model).__name__:
        return None
    logits = model(**batch).logits
    kinds = torch.arange(logits.shape[1]) % logits.shape[-1]
    return torch.eye(logits.shape[-1])[kinds].repeat(EXAMPLES, 1, 1)


def _examples(model: Any, batch: Batch) -> Any:
    return torch.tensor([0, 1])


def _several(model: Any, batch: Batch) -> Any:
    """A number for each class of each example."""
    return torch.eye(field(model.config, "num_labels", default=LABELS))[:EXAMPLES]


def _pixels(model: Any, batch: Batch) -> Any:
    if "pixel_values" not in batch:
        return None
    *_, height, width = batch["pixel_values"].shape
    return torch.randint(0, LABELS, (EXAMPLES, height, width), generator=generator())


def _colours(model: Any, batch: Batch) -> Any:
    """An image for each."""
    if "pixel_values" not in batch:
        return None
    return torch.rand(batch["pixel_values"].shape, generator=generator())


def _spectra(model: Any, batch: Batch) -> Any:
    """A spectrum of eight frames, of speech to come."""
    bins = getattr(model.config, "num_mel_bins", None)
    return None if bins is None else randn(EXAMPLES, 8, bins)


def _words(model: Any, batch: Batch) -> Any:
    """Short texts, of sound."""
    size = field(model.config, "vocab_size", default=32)
    return torch.randint(1, min(int(size), 30), (EXAMPLES, 4), generator=generator())


def _binary(model: Any, batch: Batch) -> Any:
    ids = batch.get("input_ids")
    return None if ids is None else ids % 2


KINDS: tuple[Callable[[Any, Batch], Any], ...] = (
    _phrases,
    _boxes,
    _boxes_of_one_kind,
    _pixels,
    _mask,
    _colours,
    _spectra,
    _frames,
    _tokens,
    _binary,
    _words,
    _examples,
    _several,
)
"""In the order in which they are offered: what fits few classes first."""
