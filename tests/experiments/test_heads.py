"""First heads of encoders: zero-shot from prompts, or a probe of the frozen features."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_models import quick_collections

from experiments import classification, heads, models, tasks
from experiments.forms import FORMS


@pytest.fixture(scope="module")
def encoder_data():
    base, tokenizer = models.load_model(models.default_model(), FORMS["sentiment"], torch.float32)
    rows = tasks.read("sentiment", tasks.DEMO_DATA, "train")[:100]
    examples = FORMS["sentiment"].examples(rows)
    data = classification.Encoded(examples, tokenizer, torch.device("cpu"))
    return base, tokenizer, data.fixed_batches(32)


def test_probe_sets_the_last_layer_to_what_it_fitted(encoder_data):
    """On features with an obvious answer the probe is right everywhere, scaling and all."""
    base, _, batches = encoder_data
    features, _ = heads.head_features(base, batches[:1])
    rule = features @ torch.randn(384, generator=torch.Generator().manual_seed(0))
    batch = {**batches[0], "labels": (rule > rule.median()).long()}
    heads.fit_probe(base, [batch])
    assert classification.evaluate(base, [batch]).accuracy == 1.0


def test_prompt_head_tells_good_from_bad_without_labels(encoder_data):
    base, tokenizer, batches = encoder_data
    unlabelled = [{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in batches]
    prompts = classification.LAYOUTS["sentiment"].prompts
    heads.set_prompt_head(base, tokenizer, prompts, unlabelled)
    assert classification.evaluate(base, batches).accuracy > 0.6
    with pytest.raises(models.ModelError, match="prompts for 2 labels"):
        heads.set_prompt_head(base, tokenizer, (("good",),), unlabelled)


@pytest.mark.parametrize("labels", [2, 3])
def test_probe_is_the_regression_of_scikit_learn(labels):
    """Folding the scaling into the layer, and two labels into two rows, changes no probability."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(90, 5, generator=generator) + 1
    y = (x[:, :labels] + torch.randn(90, labels, generator=generator)).argmax(1)
    model = Linear(labels)
    c = heads.fit_probe(model, [dict(x=x, labels=y)])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    expected = probe.fit(x.numpy(), y.numpy()).predict_proba(x.numpy())
    found = model.layer(x).softmax(1).detach().numpy()
    assert abs(found - expected).max() < 1e-3
    assert (found.argmax(1) == y.numpy()).mean() > 0.6


def test_probe_needs_two_examples_of_each_label():
    x = torch.randn(5, 5)
    with pytest.raises(models.ModelError, match="each label, got 1 of number 2: use --head random"):
        heads.fit_probe(Linear(3), [dict(x=x, labels=torch.tensor([0, 0, 1, 1, 2]))])


class Linear(torch.nn.Module):
    """An encoder that is its head alone."""

    def __init__(self, labels):
        super().__init__()
        self.layer = torch.nn.Linear(5, labels)
        self.config = SimpleNamespace(num_labels=labels)

    def forward(self, x):
        return self.layer(x)
