"""HybridTrainer with coupling: its training step is back-propagated at perturbed points too."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from tiny_llama import DATA, arguments, lora  # noqa: E402
from torch import nn  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ZO = dict(lr=1e-3, mu=1e-2)


def trainer(folder, accumulate, hybrid):
    options = dict(gradient_accumulation_steps=accumulate, max_grad_norm=0.5, max_steps=2)
    return HybridTrainer(
        lora(), arguments(folder, **options), train_dataset=DATA, zo=ZO, hybrid=hybrid
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_as_a_plain_loop(perturbation, accumulate, tmp_path):
    hybrid = dict(coupling=0.5, estimator="one_sided", perturbation=perturbation)
    done = trainer(tmp_path, accumulate, hybrid)
    done.train()
    model = lora().train()
    groups = hybrid_param_groups(model, zo=ZO, verbose=False)
    optimizer = HybridZOFO(groups, lr=0.1, seed=1, **hybrid)
    again = trainer(tmp_path, accumulate, hybrid)
    transformers.set_seed(1)
    data = list(copy.copy(again).get_train_dataloader())
    for step in range(2):
        for batch in data[step * accumulate : (step + 1) * accumulate]:
            optimizer.backward(lambda batch=batch: model(**batch).loss / accumulate)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(done.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # what is compared depends on coupling
    other = trainer(tmp_path, accumulate, {**hybrid, "coupling": 0.0})
    other.train()
    adapters = [
        (a - b).abs().max()
        for (name, a), b in zip(model.named_parameters(), other.model.parameters(), strict=True)
        if "lora_B" in name
    ]
    assert max(adapters) > 1e-4
