"""A Llama of two layers with adapters: its data, its tokenizer, its training arguments."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")  # for TrainingArguments

TOKENS = torch.randint(3, 64, (12, 8), generator=torch.Generator().manual_seed(0))
# no label at the start, which predicts nothing: some versions count it
DATA = [dict(input_ids=row, labels=[-100, *row[1:]]) for row in TOKENS.tolist()]


def base_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def lora(dropout=0.0):
    model = base_model()
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=dropout)
    )


def arguments(folder, **options):
    chosen = dict(
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    return transformers.TrainingArguments(str(folder), **{**chosen, **options})


def word_tokenizer():
    """Words w3 to w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 64)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def vars_of(args):
    names = ["output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "optim"]
    names += ["save_strategy", "logging_steps", "report_to", "disable_tqdm", "use_cpu", "seed"]
    return {name: getattr(args, name) for name in names}
