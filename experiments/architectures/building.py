"""A tiny model of a class, with random weights of a fixed seed, all of them different from 0."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from .batches import LABELS, Batch
from .classes import Case, class_of
from .exceptions import SPECIAL_CASES
from .fitting import fitting_batch
from .shrinking import shrunk
from .special import DROP

LARGEST = 20_000_000
"""Parameters of a model that still counts as tiny."""
SPREAD = 0.08
"""Standard deviation of what is added to every initial weight."""


OF_LABELS = (
    "sequence_classification",
    "image_classification",
    "audio_classification",
    "token_classification",
    "segmentation",
    "object_detection",
    "video_classification",
    "audio_frames",
)
"""Tasks whose classes are a few of ours."""


class NotBuilt(RuntimeError):
    """A class cannot be built tiny; the message says why."""


def build(case: Case) -> tuple[Any, Batch]:
    """The model, in evaluation mode, and a batch that it takes.

    Raises:
        NotBuilt: there is none, for the reason that the message gives.
    """
    kind = class_of(case)
    try:
        config = config_for(case)
    except Exception as error:
        raise NotBuilt(f"no tiny configuration: {first_line(error)}") from error
    model = _instance(kind, config)
    randomize(model)
    model.eval()
    try:
        with torch.no_grad():
            return model, fitting_batch(case, model, loss_of)
    except Exception as error:
        raise NotBuilt(f"forward of a batch of ours: {first_line(error)}") from error


def config_for(case: Case) -> Any:
    """The default configuration, made small."""
    kind = getattr(class_of(case), "config_class", None) or CONFIG_MAPPING[case.model_type]
    default = kind()
    fields = shrunk(default.to_dict())
    for name in ("transformers_version", "model_type", "architectures"):
        fields.pop(name, None)
    for key, part in fields.items():
        if key.endswith("backbone_config") and part:
            _set_special(part, part.get("model_type", ""))
    _set_special(fields, kind.model_type)
    _set_special(fields, f"{kind.model_type} for {case.task}")
    if case.task in OF_LABELS:
        fields.pop("id2label", None)
        fields.pop("label2id", None)
        fields["num_labels"] = LABELS
    config = kind(**fields)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if hasattr(config, "is_decoder"):
        config.is_decoder = case.task == "causal_lm"
    for part in [config, *nested_configs(config)]:
        part.use_cache = False
        if hasattr(part, "pad_token_id") and part.pad_token_id is None:
            part.pad_token_id = 0
    return config


def nested_configs(config: Any) -> list[Any]:
    from transformers import PretrainedConfig  # version 5 spells it PreTrainedConfig, too

    return [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]


def _set_special(fields: dict[str, Any], model_type: str) -> None:
    if model_type in SPECIAL_CASES:
        for path, value in SPECIAL_CASES[model_type].fields.items():
            _set(fields, path, value if value is DROP else copy.deepcopy(value))


def _set(fields: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for key in outer:
        fields = fields.setdefault(key, {})
    if value is DROP:
        fields.pop(last, None)
    else:
        fields[last] = value


def _instance(kind: Any, config: Any) -> Any:
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    except Exception:
        size = 0  # some look at values while they are made
    if size > LARGEST:
        raise NotBuilt(f"not tiny: {size:,} parameters")
    torch.manual_seed(0)
    try:
        model = kind(config)
    except Exception as error:
        raise NotBuilt(f"construction: {first_line(error)}") from error
    return model.float()


def randomize(model: Any) -> None:
    """Noise on every weight, so that none of those that begin as 0 hides a use of another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(SPREAD * torch.randn(p.shape, generator=generator))


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """The model's own loss; where it has none, the mean square of its first floating output."""
    output = model(**batch)
    loss = own_loss(output)
    if loss is None:
        loss = next(v for v in _tensors(output) if v.is_floating_point() and v.numel())
        loss = loss.float().square().mean()
    if not torch.isfinite(loss).all():
        raise ValueError(f"the loss is {loss.detach().mean().item()}")
    return loss.mean()


def own_loss(output: Any) -> torch.Tensor | None:
    """Which the model computed from labels, or from its inputs."""
    loss = getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.is_floating_point() else None


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """One after the other, also in nested outputs."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def first_line(error: BaseException) -> str:
    """Of an error, with its kind, for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:240]
