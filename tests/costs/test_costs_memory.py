"""Predicted peaks against measured ones, and what optimizers keep."""

import pytest
import torch
from costed_models import choices, made, step_peak, step_peak_in_backward
from torch import nn

from experiments.measure import growth
from zofo_optim.costs import costs_of
from zofo_optim.costs.memory import LiveBytes
from zofo_optim.costs.trial import Trials

transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config)
    return model, lambda: model(input_ids=IDS, labels=IDS).loss


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_attention_heads=2)
    model = transformers.BertForSequenceClassification(config).eval()
    return model, lambda: model(input_ids=IDS, labels=LABELS).loss


CASES = [
    (llama, torch.optim.SGD, dict(lr=1e-3, momentum=0.9)),
    (llama, torch.optim.AdamW, dict(lr=1e-3)),
    (bert, torch.optim.Adafactor, dict(lr=1e-3)),
]


@pytest.mark.parametrize(("make", "factory", "options"), CASES)
def test_peaks_are_those_of_a_real_step(make, factory, options):
    model, closure = make()
    costs = costs_of(model, closure, fo_optimizer=factory, fo=options)
    names = [t.name for t in costs.tensors]
    for chosen in (*choices(names, 1), names[:1]):
        real = step_peak(model, closure, chosen, factory, **options)
        assert costs.peak(chosen) == pytest.approx(real, rel=0.01)
    real = step_peak_in_backward(model, closure, names, factory, **options)
    assert costs.peak(names, in_backward=True) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("make", [llama, bert])
def test_an_evaluation_without_gradients(make):
    model, closure = make()
    costs = costs_of(model, closure)
    with torch.no_grad():
        assert costs.forward_bytes == pytest.approx(growth(closure).most, rel=0.01)
    assert costs.peak([]) == costs.weights_bytes + costs.forward_bytes
    name = costs.tensors[0].name
    held = costs.tensors[0].gradient_bytes
    beside = costs.weights_bytes + costs.forward_bytes + held
    assert costs.peak([name], evaluations=True) == max(costs.peak([name]), beside)


def test_gradients_applied_in_the_backward_take_less():
    model, closure = llama()
    costs = costs_of(model, closure, fo_optimizer=torch.optim.AdamW)
    names = [t.name for t in costs.tensors]
    largest = max(t.gradient_bytes for t in costs.tensors)
    less = sum(t.gradient_bytes for t in costs.tensors) - largest
    assert costs.bytes(names) - costs.bytes(names, in_backward=True) == less
    assert costs.peak(names, in_backward=True) <= costs.peak(names)


@pytest.mark.parametrize(
    ("factory", "options", "state"),
    [
        (torch.optim.SGD, dict(lr=0.1), 0),
        (torch.optim.SGD, dict(lr=0.1, momentum=0.9), 60),
        (torch.optim.AdamW, {}, 2 * 60 + 4),
        (torch.optim.Adagrad, {}, 60 + 4),
        (torch.optim.Adafactor, {}, 4 * (3 + 5) + 4),
    ],
)
def test_state_of_an_optimizer(factory, options, state):
    assert Trials(factory, options).of(torch.zeros(3, 5)).state == state


def test_state_has_the_parameters_dtype():
    assert Trials(torch.optim.AdamW, {}).of(torch.zeros(3, 5, dtype=torch.bfloat16)).state == 64


def test_an_optimizer_that_reads_its_values_is_tried_on_the_cpu():
    class Reading(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    assert p.grad.norm().item() == 0
            return super().step(closure)

    assert Trials(Reading, dict(momentum=0.9)).of(torch.zeros(3, 5)).state == 60


def test_live_bytes_count_storages_once():
    with LiveBytes() as watch:
        x = torch.zeros(4, 4)
        y = x.t()[1:]
        z = x + 1
        assert watch.now == 2 * 64
        del x
        assert watch.now == 2 * 64  # y sees it
        del y
        z.add_(1)
        assert watch.now == 64
        del z
    assert (watch.now, watch.most) == (0, 128)


def test_views_that_are_written_to():
    model = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 2)])
    x = torch.randn(4, 3)

    def closure():
        whole = torch.zeros(4, 8)
        whole[1:3] = model[0](x)[1:3]
        return model[1](whole).square().mean()

    costs = costs_of(model, closure)
    names = [t.name for t in costs.tensors]
    for chosen in choices(names, 3):
        real = step_peak(model, closure, chosen, torch.optim.SGD, lr=0.1)
        assert costs.peak(chosen) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("name", ["mixtral", "dora"])
def test_operations_that_cannot_run_on_meta_have_stand_ins(name):
    pytest.importorskip("peft")
    model, closure = made(name)
    costs = costs_of(model, closure)
    for chosen in choices([t.name for t in costs.tensors], 2):
        real = step_peak(model, closure, chosen, torch.optim.SGD, lr=1e-3)
        assert costs.peak(chosen) == pytest.approx(real, rel=0.1)
