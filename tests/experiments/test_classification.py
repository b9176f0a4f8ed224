"""What encoders read of each task, and the loss and scores of classification and choices."""

import pytest
import torch
from small_models import word_tokenizer
from test_tasks import COPA, WINOGRANDE

from experiments.classification import Encoded, Example, logits
from experiments.files import DataError
from experiments.forms import FORMS


def test_layouts():
    assert FORMS["sst2"].examples([dict(sentence="s ", label=1)]) == [Example((("s",),), 1)]
    row = dict(word="bank", sentence1="a", sentence2="b", label=0)
    assert FORMS["wic"].examples([row]) == [Example((("bank: a", "b"),), 0)]
    question = "It rained. What happened as a result?"
    assert FORMS["copa"].examples([COPA]) == [Example(((question, "A."), (question, "B.")), 1)]
    row = dict(WINOGRANDE, label=1)
    assert FORMS["winogrande"].examples([row]) == [Example((("X", "p Y"), ("X", "q Y")), 1)]
    with pytest.raises(DataError, match="winogrande: no example"):
        FORMS["winogrande"].examples([dict(row, sentence="no blank")])


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
    loss = data.losses(Tiny(1), batch).mean()
    log = torch.nn.functional.softplus
    expected = (log(torch.tensor(-1.0)) + log(torch.tensor(2.0))) / 2
    torch.testing.assert_close(loss, expected)
    found = data.score(Tiny(1), batch_size=1)
    assert found.accuracy == 0.5
    assert found.loss == pytest.approx(float(expected))
    assert data.score(Tiny(1), first=1).accuracy == 1


CPU = torch.device("cpu")
