"""Losses of the examples of a batch, (B,), whose mean is the loss that transformers computes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .names import unwrapped, within_peft

TOKEN_TASKS = ("causal_lm", "seq2seq_lm", "masked_lm", "token_classification")
"""A label a token."""
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
"""What "sequence_classification" may be: ``config.problem_type``, by its names there."""
TASKS = (*TOKEN_TASKS, "sequence_classification", *PROBLEMS)

OF_ELEMENTS = ("multi_label_classification", "regression")
"""A number for each logit; these have no num_items_in_batch."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_ENDINGS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForTokenClassification": "token_classification",
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "sequence_classification",
    "ForAudioClassification": "sequence_classification",
    "ForVideoClassification": "sequence_classification",
}
"""How names of transformers' classes end that have such a loss."""

_compared: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""The tasks for which a model's own loss was found to be the mean of ours."""


def example_losses(
    outputs: Any,
    labels: Tensor,
    task: str,
    *,
    virtual_tokens: int = 0,
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The losses of the examples of a batch, from a model's outputs and the labels.

    Their mean is the loss that transformers computes of the batch, and so are its gradients.

    In transformers every label of a batch counts alike, so an example counts by its labels: of B
    examples with N labels, one has B / N times the sum over its own labels as its loss. It is 0 for
    an example without any, and NaN for all where the whole batch has none.

    A row of ``labels`` is an example: texts that are packed into one row are one.

    Args:
        outputs: logits, or what has them as ``.logits``. Call the model without labels, or it
            computes its own loss too, at the cost of as much memory again.
        labels: as the model takes them.
        task: ``"causal_lm"`` (position t is scored against label t + 1), ``"seq2seq_lm"``,
            ``"masked_lm"``, ``"token_classification"`` or ``"sequence_classification"``. The last
            is ``"regression"`` for one logit a row, ``"single_label_classification"`` for labels
            of int64 or int32, and else ``"multi_label_classification"``; give one of these names
            where the model's ``config.problem_type`` does.
        virtual_tokens: by how many positions a prompt in front makes logits longer than labels, as
            in prompt tuning and P-tuning of causal language models; in prefix tuning it is 0.
        num_items_in_batch: N, where it is not the number of labels in this batch: the Trainer
            counts those of all batches that it accumulates.
        label_smoothing: as ``label_smoothing_factor`` of ``TrainingArguments``.
        ignore_index: the label that does not count.

    Returns:
        Losses of shape (B,), in fp32, or fp64 for fp64 logits.

    Raises:
        TypeError: there are no logits, or labels are of another kind than the task's.
        ValueError: logits and labels do not fit together, there is a loss of the whole batch
            beside (``aux_loss``), or an option is not possible, or has no use in the task.

    Example:
        >>> inputs = {name: value for name, value in batch.items() if name != "labels"}
        >>> losses = example_losses(model(**inputs), batch["labels"], "causal_lm")
    """
    _check_task(task)
    logits = _logits_of(outputs)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if task == "sequence_classification":
        task = _problem(logits.shape[-1], labels)
    _check_shapes(logits, labels, task, virtual_tokens)
    labels = labels.to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if task in OF_ELEMENTS:
        _check_unused(task, num_items_in_batch, label_smoothing)
        loss = F.mse_loss if task == "regression" else F.binary_cross_entropy_with_logits
        wanted = labels.reshape(logits.shape).to(logits.dtype)
        return loss(logits, wanted, reduction="none").mean(1)
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels must be integers with task={task!r}, got dtype {labels.dtype}")
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be a number in [0, 1), got {label_smoothing!r}")
    labels = labels.long()
    if task in TOKEN_TASKS:  # a label a position: to cut the logits instead would copy them
        shift = int(task == "causal_lm")
        labels = F.pad(labels, (virtual_tokens, shift), value=ignore_index)[:, shift:]
    else:
        labels = labels.reshape(-1, 1)
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        reduction="none",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    count = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.view(labels.shape).sum(1) * _share(len(labels), count, losses)


def example_losses_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    task: str | None = None,
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The losses of the examples of a batch, from a transformers model: see :func:`example_losses`.

    The model runs without its labels, so that it computes no loss of its own. The first time it
    runs with them, and its loss is compared with the mean of these. Decoder inputs are made from
    labels as the model would, and the prompts of peft are allowed for.

    Args:
        model: of transformers, or a peft model of one.
        batch: the arguments of the model, with ``labels``.
        task: see :func:`example_losses`; by default what the model's class says.
        num_items_in_batch, label_smoothing: see :func:`example_losses`; they also act where the
            model's own loss has no use for them.

    Returns:
        Losses of shape (B,), in fp32, or fp64 for fp64 logits.

    Raises:
        TypeError, ValueError: see :func:`example_losses`. Also: ``batch`` has no labels, the
            model's class does not tell the task, or the model computes another loss.

    Example:
        >>> losses = example_losses_of(model, batch)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inputs, labels = _split(batch)
    base = _base_of(model)
    task = task_of(model, labels, task)
    compared = _compared.setdefault(model, set())
    compare = task not in compared
    if task == "seq2seq_lm":
        add_decoder_inputs(base, inputs, labels)
    outputs = model(**inputs, labels=labels) if compare else model(**inputs)
    logits = _logits_of(outputs)
    theirs = _own_loss(outputs, base) if compare else None
    del outputs  # with what the model's own loss keeps for its backward, and caches
    virtual_tokens = _virtual_tokens(model, logits, labels, task)
    if theirs is not None:
        with torch.no_grad():
            ours = example_losses(logits, labels, task, virtual_tokens=virtual_tokens).mean()
        if _agree(ours, theirs, task, base):
            compared.add(task)
    return example_losses(
        logits,
        labels,
        task,
        virtual_tokens=virtual_tokens,
        num_items_in_batch=num_items_in_batch,
        label_smoothing=label_smoothing,
    )


def _check_task(task: Any) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")


def _logits_of(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    if isinstance(outputs, Tensor):
        logits = outputs
    elif isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    if not isinstance(logits, Tensor):
        raise TypeError(
            "outputs must be logits or have them as .logits, got "
            f"{type(outputs).__name__}, without any; a forward that is patched to save their "
            "memory, or return_dict=False, leaves them out"
        )
    if not logits.is_floating_point():
        raise TypeError(f"logits must be real numbers, got dtype {logits.dtype}")
    if getattr(outputs, "aux_loss", None) is not None:
        raise ValueError(
            "outputs must not have an aux_loss, which is of the whole batch and no example's: "
            "set output_router_logits=False in the model's config"
        )
    return logits


def _problem(classes: int, labels: Tensor) -> str:
    """As transformers decides where ``config.problem_type`` is None."""
    if classes == 1:
        return "regression"
    if labels.dtype in (torch.int64, torch.int32):
        return "single_label_classification"
    return "multi_label_classification"


def _check_shapes(logits: Tensor, labels: Tensor, task: str, virtual_tokens: int) -> None:
    given = f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}"
    if isinstance(virtual_tokens, bool) or not isinstance(virtual_tokens, int):
        raise TypeError(f"virtual_tokens must be an int, got {virtual_tokens!r}")
    if virtual_tokens < 0 or (virtual_tokens and task not in TOKEN_TASKS):
        raise ValueError(
            f"virtual_tokens must be 0 or more, and 0 with tasks of whole rows, got "
            f"{virtual_tokens} with task={task!r}"
        )
    rank = 3 if task in TOKEN_TASKS else 2
    if logits.dim() != rank:
        wanted = "(B, T, classes)" if rank == 3 else "(B, classes)"
        raise ValueError(f"logits must have shape {wanted} with task={task!r}, got {given}")
    batch, classes = logits.shape[0], logits.shape[-1]
    if labels.shape[:1] != (batch,):
        raise ValueError(f"logits and labels must have the same number of rows, got {given}")
    if task in TOKEN_TASKS:
        further = logits.shape[1] - labels.shape[-1]
        if labels.dim() == 2 and further == virtual_tokens:
            return
        advice = ""
        if labels.dim() == 2 and further > 0 and virtual_tokens == 0:
            advice = f"; if a prompt of {further} tokens is in front, pass virtual_tokens={further}"
        raise ValueError(
            f"labels must have shape (B, T), one for each of the logits' T positions behind "
            f"virtual_tokens={virtual_tokens}, got {given}{advice}"
        )
    if task == "single_label_classification":
        possible = [(batch,), (batch, 1)]
    else:
        possible = [(batch, classes)]
        if task == "regression" and classes == 1:
            possible.append((batch,))
    if tuple(labels.shape) not in possible:
        shapes = " or ".join(map(str, possible))
        raise ValueError(f"labels must have shape {shapes} with task={task!r}, got {given}")


def _check_unused(task: str, num_items_in_batch: Any, label_smoothing: Any) -> None:
    for name, value, unset in (
        ("num_items_in_batch", num_items_in_batch, num_items_in_batch is None),
        ("label_smoothing", label_smoothing, label_smoothing == 0),
    ):
        if not unset:
            raise ValueError(
                f"{name} has no use with task={task!r}, whose loss is a mean over all elements, "
                f"got {value!r}"
            )


def _share(rows: int, count: int | Tensor, losses: Tensor) -> float | Tensor:
    """B / N; waits for no device."""
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(
                "num_items_in_batch must be an int or have one element, got shape "
                f"{tuple(count.shape)}"
            )
        return rows / count.reshape(()).to(losses.device, losses.dtype)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"num_items_in_batch must be an int or a tensor, got {count!r}")
    if count < 1:
        raise ValueError(f"num_items_in_batch must be at least 1, got {count}")
    return rows / count


# ---- of a model --------------------------------------------------------------------------------


def _split(batch: Any) -> tuple[dict[str, Any], Tensor]:
    """The model's inputs without labels, and the labels."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping with labels, got {type(batch).__name__}")
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    if not isinstance(labels, Tensor):
        raise TypeError(f"batch must have labels, a tensor, got {type(labels).__name__}")
    for name in ("num_items_in_batch", "shift_labels"):
        if name in inputs:
            raise ValueError(f"batch must not have {name}, which only a model's own loss reads")
    return inputs, labels


def _base_of(model: nn.Module) -> Any:
    """The transformers model in what torch.compile, DDP and peft put around it, in any order."""
    return unwrapped(within_peft(unwrapped(model)))


def task_of(model: nn.Module, labels: Tensor, task: str | None = None) -> str:
    """The task of a model with such labels, by its class unless given, and by its config.

    Of sequence classification, which of the three.
    """
    base = _base_of(model)
    task = _by_class(base) if task is None else task
    _check_task(task)
    if task == "sequence_classification":
        config = base.config
        task = getattr(config, "problem_type", None) or _problem(config.num_labels, labels)
        _check_task(task)
    return task


def _by_class(base: Any) -> str:
    for cls in type(base).__mro__:
        if cls.__name__.endswith("ForConditionalGeneration"):
            return "seq2seq_lm" if base.config.is_encoder_decoder else "causal_lm"
        for ending, task in _ENDINGS.items():
            if cls.__name__.endswith(ending):
                return task
    raise ValueError(
        f"task must be given for a {_name(base)}, whose class does not say which it is; there are "
        f"{TASKS}"
    )


def add_decoder_inputs(base: Any, inputs: dict[str, Any], labels: Tensor) -> None:
    """What models make of labels themselves, and would lack without them."""
    inputs.setdefault("use_cache", False)
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return
    make = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if make is None:
        raise ValueError(
            f"batch must have decoder_input_ids, as {_name(base)} has no method that "
            "makes them from labels"
        )
    inputs["decoder_input_ids"] = make(labels)


def _virtual_tokens(model: nn.Module, logits: Tensor, labels: Tensor, task: str) -> int:
    """How many positions of the logits are those of peft's prompt."""
    config = getattr(unwrapped(model), "active_peft_config", None)
    prompt: int = getattr(config, "num_virtual_tokens", None) or 0
    if task not in TOKEN_TASKS or logits.dim() != 3 or labels.dim() != 2:
        return 0
    return prompt if logits.shape[1] - labels.shape[1] == prompt else 0  # a prefix adds none


def _own_loss(outputs: Any, base: Any) -> Tensor:
    loss = getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"model must return a loss for labels, as .loss; {_name(base)} does not")
    return loss.detach().reshape(())


def _agree(ours: Tensor, theirs: Tensor, task: str, base: Any) -> bool:
    """Whether the losses are equal, or an error; False where there is nothing to compare."""
    if not bool(torch.isfinite(theirs)):
        return False
    within = max(1e-4, 4 * torch.finfo(theirs.dtype).eps)
    ours, theirs = ours.double(), theirs.double().to(ours.device)
    if bool((ours - theirs).abs() <= within * (theirs.abs() + 0.01)):
        return True
    raise ValueError(
        f"the loss of {_name(base)} must be the mean of its examples' losses with task={task!r}, "
        f"got {theirs.item():.6g} against {ours.item():.6g}: it computes another loss; take its "
        "logits and compute losses of shape (B,) yourself"
    )


def _name(base: Any) -> str:
    return type(base).__name__
