"""The methods of `finetune.py`: the base by zeroth order, an adapter by first order, or both.

And the bound of them all: everything by first order.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
)
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from zofo_optim import hybrid_param_groups

from .heads import last_linear
from .models import ModelError, Problem


@dataclass(frozen=True)
class Method:
    """Whether the base trains, by zeroth or by first order; and the adapter, by first order."""

    zo_base: bool
    adapter: str | None
    fo_base: bool = False

    @property
    def first_order(self) -> bool:
        return self.fo_base or self.adapter is not None


ADAPTERS = ("prompt", "prefix", "lora")
METHODS: dict[str, Method] = {
    "zo": Method(zo_base=True, adapter=None),
    **{
        f"{kind}-{adapter}": Method(zo_base=kind == "hybrid", adapter=adapter)
        for adapter in ADAPTERS
        for kind in ("fo", "hybrid")
    },
    "fo": Method(zo_base=False, adapter=None, fo_base=True),
}
PAPER_METHODS = tuple(name for name in METHODS if name != "fo")
"""Those that the paper compares; full fine-tuning takes several times their memory."""


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA's alpha is twice its rank; `targets` and `layers` empty: peft's choice, all."""

    rank: int = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    tokens: int = 5


def prepare(
    method: Method,
    problem: Problem,
    adapter: AdapterOptions,
    *,
    zo: Mapping[str, Any],
    fo: Mapping[str, Any],
    include: Sequence[str],
    directions: str = "shared",
    quantized: str | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A copy of the base model set up for the method, and the parameter groups of its optimizer.

    It lies on the CPU.

    `zo`: everything, an encoder's head included, is frozen and learns by zeroth order; `fo`:
    everything by first order. With an adapter, it (and the head) learns by first order;
    first-order groups come first.

    Draws from torch's global generator; the same adapter at the same seed, in FO and hybrid.

    Raises:
        ModelError: `include` matches nothing.
    """
    model: nn.Module = copy.deepcopy(problem.base)
    if method.adapter is None:
        model.requires_grad_(method.fo_base)
    else:
        model = _adapted(method.adapter, problem, model, adapter)
    try:
        groups = hybrid_param_groups(
            model,
            zo=zo if method.zo_base else None,
            fo=fo,
            include=include if method.zo_base else (),
            directions=directions,
            quantized=quantized,
            verbose=False,
        )
    except ValueError as error:
        raise ModelError(f"--include: {error}") from error
    kept = [group for group in groups if group["mode"] == "fo" or method.zo_base]
    return model, sorted(kept, key=lambda group: group["mode"])


def _adapted(kind: str, problem: Problem, model: Any, options: AdapterOptions) -> nn.Module:
    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    if not problem.causal:
        head = last_linear(model)[0].split(".")[0]
        common = {"task_type": TaskType.SEQ_CLS, "modules_to_save": [head]}
    config: PeftConfig
    if kind == "lora":
        config = LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            lora_dropout=options.dropout,
            target_modules=list(options.targets) or None,
            layers_to_transform=list(options.layers) or None,
            **common,
        )
    elif kind == "prompt":
        # real words to start from, as Lester et al. 2021 and MeZO do
        config = PromptTuningConfig(
            num_virtual_tokens=options.tokens, prompt_tuning_init="SAMPLE_VOCAB", **common
        )
    else:
        config = PrefixTuningConfig(num_virtual_tokens=options.tokens, **common)
    _check_length(kind, problem, options.tokens)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a renamed attribute
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"--lora-targets, --lora-layers: {error}") from error
    if kind == "prefix":
        _start_prefix(adapted, problem, options.tokens)
    return adapted


def _check_length(kind: str, problem: Problem, tokens: int) -> None:
    most = getattr(problem.base.config, "max_position_embeddings", None)
    longest = max(max(part.lengths) for part in (problem.train, problem.dev, problem.test))
    if kind != "lora" and most is not None and tokens + longest > most:
        raise ModelError(
            f"--tokens must leave room for rows of {longest} tokens in the model's {most} "
            f"positions, got {tokens}"
        )


@torch.no_grad()
def _start_prefix(model: Any, problem: Problem, tokens: int) -> None:
    """From the keys and values of random real words, as MeZO does; of zeros for an encoder."""
    if not problem.causal:
        model.prompt_encoder[model.active_adapter].embedding.weight.zero_()
        return
    words = torch.randint(len(problem.tokenizer), (1, tokens))
    with model.disable_adapter():
        cache = model(input_ids=words, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(
        model, past_key_values=cache, num_virtual_tokens=tokens
    )


def trained_parameters(groups: Sequence[Mapping[str, Any]], mode: str) -> list[Tensor]:
    """Those of the groups of one mode."""
    return [p for group in groups if group["mode"] == mode for p in group["params"]]


def save(method: Method, model: Any, problem: Problem, folder: Path) -> dict[str, str]:
    """Save what the method trained under `folder`; ends the life of `model` as a peft model.

    `model/` (no adapter) is a whole transformers model. `adapter/` is a peft adapter, with an
    encoder's head. `base/` is there when the base changed under an adapter: the adapter belongs on
    that base, and its configuration says so.
    """
    saved: dict[str, str] = {}
    folder = folder.resolve()  # so that the adapter finds its base from anywhere
    for name, value in problem.switched.items():
        setattr(model.config, name, value)
    if method.adapter is None:
        saved["model"] = str(folder / "model")
        model.save_pretrained(saved["model"])
        problem.tokenizer.save_pretrained(saved["model"])
        return saved
    saved["adapter"] = str(folder / "adapter")
    if method.zo_base:
        saved["base"] = str(folder / "base")
        model.peft_config["default"].base_model_name_or_path = saved["base"]
    model.save_pretrained(saved["adapter"], save_embedding_layers=False)
    if method.zo_base:
        _without_adapter(method, model).save_pretrained(saved["base"])
        problem.tokenizer.save_pretrained(saved["base"])
    return saved


def _without_adapter(method: Method, model: Any) -> Any:
    """The base model as it was before peft wrapped it, but trained."""
    if method.adapter == "lora":
        return model.unload()
    base = model.get_base_model()
    for name, child in list(base.named_children()):
        if isinstance(child, ModulesToSaveWrapper):
            setattr(base, name, child.original_module)
    return base
