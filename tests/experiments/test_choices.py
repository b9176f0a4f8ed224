"""The choice tasks: templates, tokens, scores; the real files where they are."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from conftest import needs_transformers_5
from small_models import base_model, word_tokenizer

from experiments.choices import (
    Choice,
    ChoiceData,
    copa,
    mean_log_likelihood,
    option_loss,
    sst2,
    wic,
    winogrande,
)
from experiments.files import DataError
from experiments.forms import FORMS
from experiments.tasks import read

DATA = os.environ.get("ZOFO_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="ZOFO_DATA does not name the data folder")


def whole(choice):
    return [prompt + text for prompt, text in choice.options]


def test_templates():
    assert whole(sst2("a fine film ", 1)) == [
        "a fine film It was terrible",
        "a fine film It was great",
    ]
    cause = copa("My body cast a shadow.", ("The sun was rising.", "I ran."), "cause", 0)
    assert whole(cause) == [
        "My body cast a shadow because the sun was rising.",
        "My body cast a shadow because I ran.",
    ]
    effect = copa("It rained.", ("Streets got wet.", "I'm dry."), "effect", 0)
    assert whole(effect) == ["It rained so streets got wet.", "It rained so I'm dry."]
    blank = winogrande("Ann beat Bea as _ was fast.", ("Ann", "Bea"), 0)
    assert blank.options == (
        ("Ann beat Bea as Ann", " was fast."),
        ("Ann beat Bea as Bea", " was fast."),
    )
    asked = wic("bank", "A river bank.", "A rich bank.", 0)
    assert whole(asked)[0].endswith("Yes, No?\nA river bank.\nA rich bank.\nNo")


def test_choices_of_rows():
    row = dict(premise="It rained.", choice1="A.", choice2="B.", question="effect", label=1, idx=3)
    assert FORMS["copa"].choices([row]) == [copa("It rained.", ("A.", "B."), "effect", 1)]
    row = dict(word="bank", sentence1="a", sentence2="b", label=0, start1=0)
    assert FORMS["wic"].choices([row]) == [wic("bank", "a", "b", 0)]
    row = dict(sentence="X _ Y", option1="p", option2="q", label=1)
    assert FORMS["winogrande"].choices([row]) == [winogrande("X _ Y", ("p", "q"), 1)]
    assert FORMS["sst2"].choices([dict(sentence="s", label=0)]) == [sst2("s", 0)]
    assert whole(FORMS["sst2-sentences"].choices([dict(sentence="s t ", label=1)])[0]) == ["s t"]
    with pytest.raises(DataError, match=r"winogrande: no example in .*no blank"):
        FORMS["winogrande"].choices([dict(row, sentence="no blank")])


@pytest.fixture(scope="module")
def data():
    pairs = [
        Choice((("w3 w4 w5", " w6"), ("w3 w4", " w7 w8 w9")), 1),
        Choice((("w10", " w11 w12"), ("w10 w13 w14 w15", " w16")), 0),
    ]
    return ChoiceData(pairs, word_tokenizer())


def test_labels_are_the_continuation_of_the_right_option(data):
    batch = data.batch([0, 1])
    assert batch["input_ids"].tolist() == [[3, 4, 7, 8, 9], [10, 11, 12, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, 11, 12, -100, -100]]


def test_scores_are_mean_log_probabilities(data):
    """Against a loop over single tokens, without padding."""
    model = base_model().eval()
    found = mean_log_likelihood(model, data.batch([0, 1]))
    for score, (ids, count) in zip(found, (data.options[0][1], data.options[1][0]), strict=True):
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(ids) - count, len(ids))
        expected = sum(logs[i - 1, ids[i]] for i in places) / count
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)
    loss = option_loss(model, data.batch([0, 1]))
    torch.testing.assert_close(loss, -found.mean())


def test_scores(data):
    """Whatever the batches are: the option of the highest score is chosen."""
    model = base_model().train()
    found = [
        [mean_log_likelihood(model, data._padded([option])).item() for option in options]
        for options in data.options
    ]
    chosen = [s.index(max(s)) for s in found]
    loss = -sum(s[label] for s, label in zip(found, data.labels, strict=True)) / 2
    for batch_size in (1, 3, 16):
        scores = data.score(model, batch_size=batch_size)
        assert scores.accuracy == sum(a == b for a, b in zip(chosen, data.labels, strict=True)) / 2
        assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert model.training
    for batch_size in (1, 2):
        assert data.mean_loss(model, batch_size=batch_size) == pytest.approx(loss, rel=1e-5)
    assert data.mean_loss(model, 1) == pytest.approx(-found[0][1], rel=1e-5)
    assert data.score(model, first=1).loss == pytest.approx(-found[0][1], rel=1e-5)


def test_long_prompts_are_cut_at_the_left():
    pairs = [Choice((("w3 " * 20 + "w4", " w5 w6"), ("w3", " w4")), 0)]
    data = ChoiceData(pairs, word_tokenizer(), max_length=5)
    assert data.options[0][0] == ([3, 3, 4, 5, 6], 2)


def test_training_on_options_is_learnt(data):
    from zofo_optim import HybridZOFO

    model = base_model()
    optimizer = HybridZOFO(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        optimizer.step(lambda: option_loss(model, data.batch([0, 1])))
    assert data.score(model).accuracy == data.score(model).f1 == 1


@needs_transformers_5
@needs_data
def test_a_pretrained_model_scores_the_real_files():
    """A model of children's stories knows a little of what follows from what."""
    folder = Path(DATA) / "models" / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    accuracy = (
        ChoiceData(FORMS["copa"].choices(read("copa", DATA, "dev")), tokenizer)
        .score(model)
        .accuracy
    )
    assert 0.4 < accuracy < 0.8
