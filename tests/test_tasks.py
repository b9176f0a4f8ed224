"""The tasks' rows: files, the hub, the protocol; and what encoders make of them."""

import json
import os

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

transformers = pytest.importorskip("transformers")

import tasks  # noqa: E402
from choices import CHOICES  # noqa: E402
from choices import choices as choices_of  # noqa: E402
from classification import LAYOUTS, Encoded, Example, examples, logits  # noqa: E402
from scores import scores  # noqa: E402
from tasks import DataError, protocol, read  # noqa: E402

DATA = os.environ.get("ZOFO_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="ZOFO_DATA does not name the data folder")

COPA = dict(premise="It rained.", choice1="A.", choice2="B.", question="effect", label=1)
WINOGRANDE = dict(sentence="X _ Y", option1="p", option2="q", answer="2")


def tsv(folder, split, rows):
    folder.mkdir(exist_ok=True)
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def test_every_task_has_both_forms():
    assert set(CHOICES) == set(tasks.TASKS)
    assert set(LAYOUTS) == {name for name, task in tasks.TASKS.items() if task.scored}


def test_files_of_each_form(tmp_path):
    tsv(tmp_path, "train", [("fine \u2028film", 1), ("bad", 0)])
    assert read("sst2", tmp_path, "train") == [
        dict(sentence="fine \u2028film", label=1),
        dict(sentence="bad", label=0),
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps(COPA) + "\n")
    assert read("copa", tmp_path, "train") == [COPA]
    (tmp_path / "train_m.jsonl").write_text(json.dumps(WINOGRANDE) + "\n")
    assert read("winogrande", tmp_path, "train") == [dict(WINOGRANDE, label=1)]
    (tmp_path / "train.data.txt").write_text("bank\tN\t0-1\tA bank .\tBanks .\n")
    (tmp_path / "train.gold.txt").write_text("T\n")
    row = dict(word="bank", sentence1="A bank .", sentence2="Banks .", label=1)
    assert read("wic", tmp_path, "train") == [row]


def test_a_folder_of_the_tasks_name_is_found(tmp_path):
    tsv(tmp_path / "sst2", "dev", [("good", 1)])
    for task in ("sst2", "sst2-sentences"):
        assert read(task, tmp_path, "dev") == [dict(sentence="good", label=1)]


@pytest.mark.parametrize(
    ("task", "file", "text", "message"),
    [
        ("sst2", "train.tsv", "text\tlabel\nfine\t1\n", r"header must name sentence and label"),
        ("sst2", "train.tsv", "hello", r"header must name sentence and label, got \['hello'\]"),
        ("sst2", "train.tsv", "sentence\tlabel\nfine\t2\n", r"line 2: label must be one of .*'2'"),
        ("sst2", "train.tsv", "sentence\tlabel\nfine\n", "line 2: 2 cells expected, got 1"),
        ("copa", "train.jsonl", "{}\n", r"line 1: copa needs the text 'premise', got None"),
        ("copa", "train.jsonl", json.dumps(COPA) + "\nno json\n", "line 2: no JSON"),
        ("winogrande", "train_m.jsonl", json.dumps({**WINOGRANDE, "answer": ""}), "answer must be"),
        ("wic", "train.data.txt", "a\tb\n", "no such file"),
    ],
)
def test_bad_files(task, file, text, message, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read(task, tmp_path, "train")


def test_bad_encoding(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(DataError, match=r"train\.tsv: must be UTF-8"):
        read("sst2", tmp_path, "train")


def test_bad_wic_files(tmp_path):
    (tmp_path / "train.data.txt").write_text("a\tb\n")
    (tmp_path / "train.gold.txt").write_text("T\nF\n")
    with pytest.raises(DataError, match="1 answers expected, got 2"):
        read("wic", tmp_path, "train")
    (tmp_path / "train.gold.txt").write_text("T\n")
    with pytest.raises(DataError, match="5 cells expected, got 2"):
        read("wic", tmp_path, "train")
    (tmp_path / "train.data.txt").write_text("bank\tN\t0-1\ta\tb\n")
    (tmp_path / "train.gold.txt").write_text("X\n")
    with pytest.raises(DataError, match="got 'X'"):
        read("wic", tmp_path, "train")


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="task must be one of"):
        read("squad", tmp_path, "train")
    with pytest.raises(ValueError, match="split must be"):
        read("copa", tmp_path, "test")
    with pytest.raises(DataError, match="no such folder"):
        read("copa", tmp_path / "nowhere", "train")


def test_rows_of_the_hub(monkeypatch):
    """A data set of the hub is read by the same checks."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        rows = {"train": [COPA] * 3, "validation": [dict(COPA, label=0)]}[split]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("copa", "hub", "train") == [COPA] * 3
    assert read("copa", "hub", "dev") == [dict(COPA, label=0)]
    assert asked == [
        ("aps/super_glue", "copa", "train"),
        ("aps/super_glue", "copa", "validation"),
    ]
    with pytest.raises(DataError, match=r"winogrande, row 1: .*'sentence'"):
        read("winogrande", "hub", "train")

    def unreachable(*name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"aps/super_glue/copa: cannot be loaded \(no network\)"):
        read("copa", "hub", "train")


def test_default_source(monkeypatch, tmp_path):
    assert tasks.default_source("sentiment") == tasks.DEMO_DATA
    monkeypatch.setenv("ZOFO_DATA", str(tmp_path))
    assert tasks.default_source("wic") == tmp_path
    monkeypatch.delenv("ZOFO_DATA")
    with pytest.raises(DataError, match="environment variable ZOFO_DATA"):
        tasks.default_source("wic")


def test_protocol(tmp_path):
    tsv(tmp_path, "train", [(f"s{i}", i % 2) for i in range(40)])
    tsv(tmp_path, "dev", [(f"t{i}", i % 2) for i in range(9)])
    sizes = dict(train=20, dev=5, test=7)
    first = protocol("sst2", tmp_path, seed=1, **sizes)
    assert first == protocol("sst2", tmp_path, seed=1, **sizes)
    assert first != protocol("sst2", tmp_path, seed=2, **sizes)
    assert [len(part) for part in first] == [20, 5, 7]
    sentences = [row["sentence"] for part in first for row in part]
    assert len(set(sentences)) == len(sentences)
    # One may be larger than the other; what there is too little of is shared.
    parts = protocol("sst2", tmp_path, seed=1, train=4, dev=20, test=1)
    assert [len(part) for part in parts] == [4, 20, 1]
    few = protocol("sst2", tmp_path, seed=1, train=1000, dev=15, test=1000)
    assert [len(part) for part in few] == [25, 15, 9]
    half = protocol("sst2", tmp_path, seed=1)
    assert [len(part) for part in half] == [20, 20, 9]


def test_one_label_cannot_be_learned(tmp_path):
    for split in ("train", "dev"):
        tsv(tmp_path, split, [("fine", 1), ("good", 1), ("great", 1)])
    with pytest.raises(DataError, match="must have two labels"):
        protocol("sst2", tmp_path, seed=0)
    assert len(protocol("sst2-sentences", tmp_path, seed=0)[0]) == 2


def test_no_examples(tmp_path):
    tsv(tmp_path, "train", [("fine", 1), ("bad", 0)])
    tsv(tmp_path, "dev", [])
    with pytest.raises(DataError, match="no test examples"):
        protocol("sst2", tmp_path, seed=0)


def test_demo_data_is_balanced_and_has_no_duplicates():
    parts = [read("sentiment", tasks.DEMO_DATA, split) for split in ("train", "dev")]
    assert [len(part) for part in parts] == [400, 100]
    for rows in parts:
        assert sum(row["label"] for row in rows) * 2 == len(rows)
    sentences = [
        "".join(filter(str.isalnum, r["sentence"].lower())) for part in parts for r in part
    ]
    assert len(set(sentences)) == len(sentences)


# ---- what encoders read -------------------------------------------------------------------------


def test_layouts():
    assert examples("sst2", [dict(sentence="s ", label=1)]) == [Example((("s",),), 1)]
    row = dict(word="bank", sentence1="a", sentence2="b", label=0)
    assert examples("wic", [row]) == [Example((("bank: a", "b"),), 0)]
    question = "It rained. What happened as a result?"
    assert examples("copa", [COPA]) == [Example(((question, "A."), (question, "B.")), 1)]
    row = dict(WINOGRANDE, label=1)
    assert examples("winogrande", [row]) == [Example((("X", "p Y"), ("X", "q Y")), 1)]
    with pytest.raises(DataError, match="winogrande: no example"):
        examples("winogrande", [dict(row, sentence="no blank")])


class Tiny(torch.nn.Module):
    """Logits of a row of text: of its length, as many as told."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids, attention_mask, **kwargs):
        length = attention_mask.sum(1, keepdim=True).float()
        found = length * torch.arange(1, self.outputs + 1)
        return type("Output", (), dict(logits=found.to(torch.bfloat16)))


@pytest.fixture(scope="module")
def tokenizer():
    from tiny_llama import word_tokenizer

    return word_tokenizer()


def test_classification_has_one_row_an_example(tokenizer):
    data = Encoded([Example((("w3 w4",),), 1), Example((("w5",),), 0)], tokenizer, CPU)
    batch = data.batch([0, 1])
    assert batch["input_ids"].tolist() == [[3, 4], [5, 0]]
    assert batch["labels"].tolist() == [1, 0]
    found = logits(Tiny(2), batch)
    assert found.tolist() == [[2.0, 4.0], [1.0, 2.0]]
    assert found.dtype == torch.float32
    assert data.lengths == [2, 1]


def test_multiple_choice_has_one_row_an_option(tokenizer):
    """The logit of the longer option is higher: a softmax over an example's options."""
    two = Example((("w3", "w4 w5"), ("w3", "w4")), 0)
    data = Encoded([two, Example((("w3", "w4"), ("w3", "w4 w5 w6")), 0)], tokenizer, CPU)
    batch = data.batch([0, 1])
    assert batch["input_ids"].shape == (4, 4)
    assert logits(Tiny(1), batch).tolist() == [[3.0, 2.0], [2.0, 4.0]]
    loss = data.loss(Tiny(1), batch)
    log = torch.nn.functional.softplus
    expected = (log(torch.tensor(-1.0)) + log(torch.tensor(2.0))) / 2
    torch.testing.assert_close(loss, expected)
    found = data.score(Tiny(1), batch_size=1)
    assert found.accuracy == 0.5
    assert found.loss == pytest.approx(float(expected))
    assert data.score(Tiny(1), first=1).accuracy == 1


CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    labels, chosen = torch.randint(0, 2 + seed % 2, (2, 30), generator=generator).tolist()
    if seed == 4:
        chosen = [0] * 30
    found = scores(chosen, labels, 0.5)
    assert found.loss == 0.5
    assert found.accuracy == pytest.approx(accuracy_score(labels, chosen))
    assert found.f1 == pytest.approx(f1_score(labels, chosen, average="macro"))


@needs_data
@pytest.mark.parametrize(
    ("task", "train", "dev"),
    [("sst2", 67349, 872), ("copa", 400, 100), ("winogrande", 2558, 1267), ("wic", 5428, 638)],
)
def test_the_real_files(task, train, dev):
    for split, count in (("train", train), ("dev", dev)):
        rows = read(task, DATA, split)
        assert len(rows) == count
        assert {row["label"] for row in rows} == {0, 1}
        for choice in choices_of(task, rows):
            assert len(choice.options) == 2
            assert all(prompt and text.strip() for prompt, text in choice.options)
        for example in examples(task, rows):
            assert all(text.strip() for texts in example.rows for text in texts)
    parts = protocol(task, DATA, seed=1)
    assert [len(part) for part in parts] == [min(1000, train - 100), 100, min(1000, dev)]
