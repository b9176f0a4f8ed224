"""Bridges of a model that has learnt something."""

import os
from pathlib import Path

import pytest
import torch

from zofo_optim.transfer.bridge import bridge_model

transformers = pytest.importorskip("transformers")
FOLDER = os.environ.get("ZOFO_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="ZOFO_DATA is not set")


@pytest.fixture(scope="module")
def stories():
    """The model, and texts of two kinds: to prune on, and others."""
    folder = Path(FOLDER) / "models" / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    start = torch.full((48, 1), model.config.bos_token_id)
    texts = model.generate(start, do_sample=True, max_new_tokens=48, pad_token_id=0)
    return model, [dict(input_ids=part) for part in texts[:32].split(16)], texts[32:]


def error(model, bridge, texts):
    """Of the last hidden states, relative."""
    with torch.no_grad():
        ours, theirs = (each.model(texts).last_hidden_state for each in (model, bridge))
    return float((theirs - ours).norm() / ours.norm())


@pytest.mark.parametrize(("options", "most"), [(dict(units=0.5), 0.9), (dict(heads=2), 0.95)])
def test_fitting_again_brings_other_texts_closer(stories, options, most):
    model, batches, others = stories
    cut, fitted = (
        error(model, bridge_model(model, batches, layers=5, **options, refit=refit), others)
        for refit in (False, True)
    )
    assert fitted < most * cut


def test_influential_layers_bring_other_texts_closer_than_most(stories):
    model, batches, others = stories
    chosen = error(model, bridge_model(model, batches, layers=4), others)
    without = [[k for k in range(5) if k != gone] for gone in range(5)]
    errors = [error(model, bridge_model(model, None, layers=kept), others) for kept in without]
    assert chosen < sum(errors) / len(errors)
    assert sorted(errors).index(chosen) <= 1
