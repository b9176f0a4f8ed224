"""What the code of the pages takes for granted, made when a block names it.

``facebook/opt-125m`` is here a tiny OPT with random weights and a tokenizer of its own, in a hub
cache that holds nothing else: blocks load it by the libraries' own code, without a network.
"""

from __future__ import annotations

import dis
import importlib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

HUB_NAME = "facebook/opt-125m"
TEXTS = [
    "the film was a joy . it was great",
    "i left after ten minutes . it was terrible",
    "a story told with care . it was great",
    "the jokes are old and thin . it was terrible",
]
ROWS = [
    dict(input_ids=row, labels=row)
    for row in torch.randint(3, 60, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
]


def make_tokenizer() -> Any:
    """A tokenizer of words, with all that a causal language model's has."""
    import tokenizers
    import transformers

    words = sorted({word for text in TEXTS for word in text.split()})
    words += [f"w{i}" for i in range(60 - len(words))]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],  # as OPT's own
    )


def make_base(**options: Any) -> Any:
    """The tiny OPT."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **{"dropout": 0.0, **options},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.OPTForCausalLM(config)


def make_model() -> Any:
    """``base_model`` with LoRA."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(make_base(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))


def make_loader() -> Any:
    rows = [{key: torch.tensor(value) for key, value in row.items()} for row in ROWS]
    return torch.utils.data.DataLoader(rows, batch_size=3)


def make_text_dataset() -> Any:
    import datasets

    return datasets.Dataset.from_dict(dict(text=TEXTS))


MAKERS: dict[str, Callable[[], Any]] = {
    "base_model": make_base,
    "model": make_model,
    "loader": make_loader,
    "batch": lambda: next(iter(make_loader())),
    "dataset": lambda: ROWS,
    "text_dataset": make_text_dataset,
    "tokenizer": make_tokenizer,
}


def make_optimizer(model: Any = None) -> Any:
    from zofo_optim import HybridZOFO, hybrid_param_groups

    model = make_model() if model is None else model
    return HybridZOFO(hybrid_param_groups(model, zo=dict(lr=1e-6), fo=dict(lr=1e-3)))


def make_partition() -> Any:
    from zofo_optim.partition import importance_partition

    model, batch = make_model(), next(iter(make_loader()))
    return importance_partition(model, lambda: model(**batch).loss, verbose=False)[1]


def make_folders() -> None:
    """``tuned``, a fine-tune of the tiny OPT."""
    from zofo_optim import save_hybrid

    model = make_model()
    save_hybrid(model, make_optimizer(model), "tuned")


def imported(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


IN_DOCSTRINGS: dict[str, Callable[[], Any]] = {
    **MAKERS,
    "optimizer": make_optimizer,
    "partition": make_partition,
    "importance_partition": imported("zofo_optim.partition", "importance_partition"),
    "hybrid_param_groups": imported("zofo_optim", "hybrid_param_groups"),
    "HybridZOFO": imported("zofo_optim", "HybridZOFO"),
    "AutoModelForCausalLM": imported("transformers", "AutoModelForCausalLM"),
    "LoraConfig": imported("peft", "LoraConfig"),
    "get_peft_model": imported("peft", "get_peft_model"),
    "TrainingArguments": imported("transformers", "TrainingArguments"),
    "name": lambda: HUB_NAME,
}
"""Pages say where names come from; docstrings leave that out."""


def fill_hub(cache: Path) -> None:
    """Put the tiny OPT into a hub cache, as a download would."""
    home = cache / f"models--{HUB_NAME.replace('/', '--')}"
    revision = "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    snapshot = home / "snapshots" / revision
    make_base().save_pretrained(snapshot)
    make_tokenizer().save_pretrained(snapshot)


def global_names(code: types.CodeType) -> Iterable[str]:
    """Names that a block looks up in its surroundings."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from global_names(constant)


def add_names(
    code: types.CodeType,
    names: dict[str, Any],
    makers: Mapping[str, Callable[[], Any]] = MAKERS,
) -> None:
    """Make what a block needs, unless an earlier one has made it."""
    for name in sorted(global_names(code), key="optimizer".__eq__):
        if name in makers and name not in names:
            of_model = makers[name] is make_optimizer and "model" in names
            names[name] = make_optimizer(names["model"]) if of_model else makers[name]()
