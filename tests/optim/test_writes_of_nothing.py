"""What sets a parameter to itself in a forward pass is no write: weights move as if it were not."""

import copy

import pytest
import torch
from conftest import same_bits
from streamed_models import randn, tokens
from torch import nn
from torch.nn.utils import parametrize

from zofo_kernels._torch_compat import unwritten_by_parametrizing
from zofo_optim import HybridZOFO, hybrid_param_groups

INPUT = randn(5, 4)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self):
        return self.second(self.first(INPUT).tanh()).square().sum()


class Converting(Plain):
    """As the routers of Switch Transformers do, which ask for a type that they have."""

    def forward(self):
        self.second.to(torch.float32)
        return super().forward()


class Same(nn.Module):
    def forward(self, weight):
        return weight + 0.0


class Parametrizing(Plain):
    """As peft does in each forward of an adapter of a bare parameter, such as experts have."""

    def forward(self):
        parametrize.register_parametrization(self.second, "weight", Same())
        try:
            return super().forward()
        finally:
            parametrize.remove_parametrizations(self.second, "weight", leave_parametrized=False)


def trained(model, **options):
    model.requires_grad_(False)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-2, mu=2.0**-7), verbose=False)
    optimizer = HybridZOFO(groups, distribution="rademacher", seed=3, **options)
    for _ in range(2):
        optimizer.step(lambda: model())
    return model


@pytest.mark.parametrize("kind", [Converting, Parametrizing])
@pytest.mark.parametrize(
    "options",
    [
        dict(perturbation="in_place"),
        dict(perturbation="streamed"),
        dict(perturbation="streamed", structure="low_rank"),
    ],
    ids=str,
)
def test_setting_a_parameter_to_itself(kind, options):
    expected, found = trained(Plain(), **options), trained(kind(), **options)
    before = Plain()
    for name, p in found.named_parameters():
        if "structure" in options:  # a weight that is read is made, and its product rounds
            torch.testing.assert_close(p, expected.get_parameter(name))
        else:
            assert same_bits(p, expected.get_parameter(name)), name
        assert not same_bits(p, before.get_parameter(name).detach()), name


class Setting(Plain):
    """Sets a parameter to what is not itself: another one's content, or its own, changed."""

    def __init__(self, changed):
        super().__init__()
        self.changed = changed

    def forward(self):
        weight = self.second.weight
        converted = weight.to(torch.float32)
        if self.changed:
            converted.mul_(2)
        weight.data = converted if self.changed else self.first.weight[:2, :3].contiguous()
        return super().forward()


@pytest.mark.parametrize("changed", [False, True])
def test_other_content_is_refused(changed):
    model = Setting(changed).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"must not write to .*'second\.weight'"):
        trained(model, perturbation="streamed")
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_torch_is_left_as_it_was():
    """Also where blocks overlap without being nested, as those of threads do."""
    before = parametrize._maybe_set
    first, second = unwritten_by_parametrizing(), unwritten_by_parametrizing()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert parametrize._maybe_set != before
    second.__exit__(None, None, None)
    assert parametrize._maybe_set is before


def test_peft_adapters_of_bare_parameters():
    """LoRA of experts: the first-order gradients are those of backward alone."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=40,
        use_cache=False,
    )
    torch.manual_seed(0)
    base = transformers.MixtralForCausalLM(config)
    if not hasattr(peft.LoraConfig(), "target_parameters"):
        pytest.skip("this peft has no adapters of parameters")
    names = [n for n, _ in base.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))]
    if not names:
        pytest.skip("experts are modules here")
    options = dict(r=2, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    ids = tokens(2, 6, high=40)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for perturbation in ("in_place", "streamed"):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        groups = hybrid_param_groups(twin, zo=dict(lr=1e-3), fo=dict(lr=0.1), verbose=False)
        optimizer = HybridZOFO(groups, perturbation=perturbation)
        optimizer.backward(lambda twin=twin: twin(input_ids=ids, labels=ids).loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(twin.get_parameter(name).grad, gradient)
        optimizer.step()
