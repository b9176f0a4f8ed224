"""Small models, methods, and what their steps really take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from experiments.measure import peak_memory, stored_bytes
from zofo_optim import HybridZOFO, example_losses_of, hybrid_param_groups
from zofo_optim.memory.quantized import unquantized
from zofo_optim.memory.torchao_weights import quantize
from zofo_optim.names import within_peft

BATCH = 8, 128
_SIZES: dict[str, Any] = dict(
    vocab_size=4000, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
    num_attention_heads=4, use_cache=False,
)  # fmt: skip


def _llama() -> Any:
    return transformers.LlamaConfig(**_SIZES, architectures=["LlamaForCausalLM"])


def _bert() -> Any:
    return transformers.BertConfig(**_SIZES, architectures=["BertForSequenceClassification"])


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=4000, n_embd=256, n_layer=6, n_head=4, n_positions=128, use_cache=False,
        bos_token_id=1, eos_token_id=1, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


def _opt() -> Any:
    return transformers.OPTConfig(
        vocab_size=4000, hidden_size=256, ffn_dim=1024, num_hidden_layers=6,
        num_attention_heads=4, word_embed_proj_dim=256, max_position_embeddings=128,
        use_cache=False, architectures=["OPTForCausalLM"],
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": _llama,
    "BERT": _bert,
    "GPT-2": _gpt2,
    "OPT": _opt,
}
_STREAMED = dict(perturbation="streamed")
_LOW_RANK = dict(_STREAMED, structure="low_rank")
_PER_EXAMPLE = dict(_LOW_RANK, directions="per_example")
_ADAMW = dict(fo_optimizer="adamw")
_CHECKPOINTED = dict(gradient_checkpointing=True)
_SIDE, _FROZEN, _COUPLED = dict(quantized="low_rank"), dict(quantized="frozen"), dict(coupling=0.1)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zo, in place": ("zo", {}),
    "zo, streamed": ("zo", _STREAMED),
    "zo, low rank": ("zo", _LOW_RANK),
    "zo, per example": ("zo", _PER_EXAMPLE),
    "zo, side updates": ("zo", _SIDE),
    "zo, side updates, streamed": ("zo", _SIDE | _STREAMED),
    "zo, side updates, per example": ("zo", _SIDE | _PER_EXAMPLE),
    "zo, integers frozen": ("zo", _FROZEN),
    "hybrid, in place": ("hybrid", {}),
    "hybrid, streamed": ("hybrid", _STREAMED),
    "hybrid, low rank": ("hybrid", _LOW_RANK),
    "hybrid, checkpointed": ("hybrid", _CHECKPOINTED),
    "hybrid, coupled": ("hybrid", _COUPLED),
    "hybrid, coupled, checkpointed": ("hybrid", _COUPLED | _CHECKPOINTED),
    "hybrid, coupled, streamed": ("hybrid", _COUPLED | _STREAMED),
    "hybrid, coupled, low rank": ("hybrid", _COUPLED | _LOW_RANK),
    "hybrid, side updates": ("hybrid", _SIDE),
    "hybrid, side updates, checkpointed": ("hybrid", _SIDE | _CHECKPOINTED),
    "hybrid, integers frozen": ("hybrid", _FROZEN),
    "lora, SGD": ("lora", {}),
    "lora, AdamW": ("lora", _ADAMW),
    "lora, AdamW, checkpointed": ("lora", _ADAMW | _CHECKPOINTED),
    "fo, SGD": ("fo", {}),
    "fo, AdamW": ("fo", _ADAMW),
    "fo, AdamW, checkpointed": ("fo", _ADAMW | _CHECKPOINTED),
    "fo, AdamW, in backward": ("fo", dict(_ADAMW, optimizer_in_backward=True)),
}
"""By name: the method and the options of ``estimate_memory``."""
_HYBRID = ("perturbation", "structure", "directions", "optimizer_in_backward", "coupling")
INTEGERS = ("int8", "int4", "int8 (torchao)", "int4 (torchao)")


def weights_of(method: str, options: dict[str, Any], model: str = "Llama") -> tuple[str, ...]:
    """Formats that a method is measured with.

    Biases of quantised layers have no direction for each example: BERT and others have such.
    """
    if "quantized" in options and "directions" in options and model != "Llama":
        return ()
    if "quantized" in options:
        return ("int4", "int8 (torchao)")
    adamw = method == "lora" and options.get("fo_optimizer") == "adamw"
    in_place = "perturbation" not in options and "coupling" not in options
    if adamw or (method in ("zo", "hybrid") and in_place):
        return ("fp32", "bf16", *INTEGERS)
    return ("fp32", "bf16") if method == "fo" or options.get("directions") else ("fp32",)


def format_of(weights: str) -> Any:
    """What ``estimate_memory`` takes for such a name: it, or a configuration of torchao's."""
    if not weights.endswith(" (torchao)"):
        return weights
    from torchao import quantization

    if weights.startswith("int8"):
        return quantization.Int8WeightOnlyConfig()
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=quantization.PerGroup(16),
    )


class Measured(NamedTuple):
    """Bytes."""

    first: int
    """Peak of the first step, in which the perturbation is verified."""
    later: int
    """Peak of the second."""


def loaded(config: Any, weights: str, device: torch.device, folder: str | None = None) -> nn.Module:
    """A model of random weights, in its storage format.

    Args:
        config: of transformers.
        weights: of ``estimate_memory``.
        device: where it lives.
        folder: for its files, where it is loaded by bitsandbytes.
    """
    torch.manual_seed(0)
    dtype = dict(fp32=torch.float32, fp16=torch.float16).get(weights, torch.bfloat16)
    kind = getattr(transformers, config.architectures[0])
    made: nn.Module = kind(config).to(dtype)
    if weights.endswith(" (torchao)"):
        quantize(made, unquantized(made), format_of(weights))
    if weights in ("int8", "int4"):
        assert folder is not None
        made.save_pretrained(folder)  # type: ignore[operator]
        bits: dict[str, Any] = (
            dict(load_in_8bit=True) if weights == "int8" else dict(load_in_4bit=True)
        )
        if weights == "int4":
            bits |= dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        how = transformers.BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]
        return kind.from_pretrained(  # type: ignore[no-any-return]
            folder, quantization_config=how, dtype=dtype, device_map={"": device}
        )
    return made.to(device)


def measured(
    config: Any,
    method: str,
    options: dict[str, Any],
    weights: str = "fp32",
    device: str = "cpu",
    folder: str | None = None,
) -> Measured:
    """Two steps of a method, and their peaks.

    Args:
        config: of transformers.
        method, options, weights: of ``estimate_memory``.
        device: where to train.
        folder: see :func:`loaded`.
    """
    where = torch.device(device)
    before = _allocated(where)
    model = with_adapter(loaded(config, weights, where, folder), method, options)
    optimizer, step = training(model, config, method, options, weights, BATCH)
    hidden = -before if where.type == "cuda" else _scales(model)
    first = peak_memory(step, model, optimizer, where)
    optimizer.zero_grad()
    return Measured(first + hidden, peak_memory(step, model, optimizer, where) + hidden)


def _allocated(device: torch.device) -> int:
    """Bytes of a GPU that were there before, such as the workspace of products."""
    if device.type != "cuda":
        return 0
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    gc.collect()
    return int(torch.cuda.memory_allocated(device))


def with_adapter(model: Any, method: str, options: dict[str, Any]) -> Any:
    """The model as it trains by the method."""
    if method in ("hybrid", "lora"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig())
    else:
        model.requires_grad_(method == "fo")
    if options.get("gradient_checkpointing"):
        base: Any = within_peft(model)
        base.gradient_checkpointing_enable({"use_reentrant": False})  # transformers 4 has it True
    return model.train()


def training(
    model: Any,
    config: Any,
    method: str,
    options: dict[str, Any],
    weights: str,
    batch_size: tuple[int, int],
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """The optimizer, and what does a step of it.

    Args:
        model: of :func:`with_adapter`.
        config, method, options, weights: see :func:`measured`.
        batch_size: rows and tokens.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, batch_size, generator=generator).to(model.device)
    of_rows = config.architectures[0].endswith("ForSequenceClassification")
    batch = dict(input_ids=ids, labels=ids[:, 0] % 2 if of_rows else ids)
    adamw = options.get("fo_optimizer") == "adamw"
    kind: Any = torch.optim.AdamW if adamw else torch.optim.SGD
    if method == "lora":
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    else:
        hybrid = {name: options[name] for name in _HYBRID if name in options}
        if hybrid.get("optimizer_in_backward"):
            hybrid["nonfinite"] = "raise"
        groups = hybrid_param_groups(
            model,
            zo=None if method == "fo" else dict(lr=1e-7, mu=1e-2),
            fo=dict(lr=1e-3) if method != "zo" else None,
            directions=hybrid.get("directions", "shared"),
            quantized=options.get("quantized", "scales") if weights in INTEGERS else None,
            verbose=False,
        )
        optimizer = HybridZOFO(groups, fo_optimizer=kind, **hybrid)
    per_example = options.get("directions") == "per_example"

    def closure() -> Any:
        return example_losses_of(model, batch) if per_example else model(**batch).loss

    def step() -> None:
        optimizer.zero_grad()
        if method == "lora":
            closure().backward()
            optimizer.step()
        else:
            optimizer.step(closure)

    return optimizer, step


def _scales(model: nn.Module) -> int:
    """Of quantised weights, which are no parameters."""
    found = []
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        found += [] if state is None else [state.absmax, state.code]
        scale = getattr(p, "SCB", None)
        found += [] if scale is None else [scale]
    return stored_bytes(found)
