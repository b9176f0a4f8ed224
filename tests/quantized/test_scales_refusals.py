"""Quantised weights are refused unless it is said what becomes of them, and other formats are."""

import pytest
import torch
from quantized_models import NAMES, layers, network
from torch import nn

from zofo_optim import hybrid_param_groups

ZO = dict(lr=0.1, mu=1e-2)


def groups_of(model, quantized="scales"):
    return hybrid_param_groups(model, zo=ZO, quantized=quantized, verbose=False)


@pytest.mark.parametrize("kind", NAMES)
def test_quantised_weights_are_refused_unless_said(kind):
    model = network(kind)
    match = r"quantised.*quantized='scales'.*quantized='frozen'.*exclude=.*'0.weight' is one"
    with pytest.raises(ValueError, match=match):
        hybrid_param_groups(model, zo=ZO, verbose=False)


class OtherLinear(nn.Module):
    """As GPTQ and AWQ hold weights: integers and scales in buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(4))


class Hqq(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("module", [OtherLinear, Hqq])
def test_other_libraries(module):
    model = nn.Sequential(nn.Linear(4, 4), module()).requires_grad_(False)
    match = rf"must be quantised by bitsandbytes .* got a {module.__name__} that holds .* in '1'"
    with pytest.raises(ValueError, match=match):
        groups_of(model)
    (group,) = groups_of(model, quantized="frozen")
    assert group["param_names"] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("module", [OtherLinear, Hqq])
def test_other_libraries_are_refused_unless_said_or_left_out(module):
    model = nn.Sequential(nn.Linear(4, 4), module()).requires_grad_(False)
    match = rf"quantized= says .* got a {module.__name__} .* in '1'.*'low_rank'.*'frozen'.*exclude="
    with pytest.raises(ValueError, match=match):
        groups_of(model, quantized=None)
    with pytest.raises(ValueError, match=match):
        hybrid_param_groups(model[1:2], zo=ZO, verbose=False)
    for options in (dict(exclude=r"1\."), dict(include=r"^0\.")):
        (group,) = hybrid_param_groups(model, zo=ZO, verbose=False, **options)
        assert group["param_names"] == ["0.weight", "0.bias"]


def test_codebooks_of_floats_alone_are_no_quantised_weight():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    model[0].codebooks = nn.Parameter(torch.ones(4), requires_grad=False)
    assert len(groups_of(model, quantized=None)[0]["params"]) == 3
    model[0].register_buffer("codes", torch.zeros(4, dtype=torch.int8))
    with pytest.raises(ValueError, match="holds 'codebooks' in '0'"):
        groups_of(model, quantized=None)


def test_a_model_without_quantised_weights_has_no_scales():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"got one without quantised weights: leave quantized out"):
        groups_of(model)


@pytest.mark.parametrize("quantized", ["scales", "low_rank", "frozen"])
def test_weights_keep_their_layout_in_eval(quantized):
    """Also those whose scales do not learn."""
    model = network("nf4")
    model.append(nn.Linear(32, 32)).requires_grad_(False)
    for layer in layers(model)[:2]:
        layer.support_avx512bf16_for_cpu = True
    hybrid_param_groups(model, zo=ZO, quantized=quantized, exclude=r"^2\.", verbose=False)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers(model)[:2])


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quanto", "fp8", "compressed-tensors"])
def test_other_methods_of_transformers(method):
    model = network("nf4")
    model.config = nn.Module()
    model.config.quantization_config = {"quant_method": method}
    match = f"got one of quant_method='{method}': load it unquantised, .*quantized='low_rank'"
    with pytest.raises(ValueError, match=match):
        groups_of(model)


def test_quanto():
    quanto = pytest.importorskip("optimum.quanto", reason="not installed")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quanto.quantize(model, weights=quanto.qint8, exclude="1")
    quanto.freeze(model)
    model.requires_grad_(False)
    match = r"weights that cannot be perturbed .*unquantised.*'frozen'.*'0.weight' is one"
    for quantized in (None, "scales"):
        with pytest.raises(ValueError, match=match):
            groups_of(model, quantized=quantized)
    groups = groups_of(model, quantized="frozen")
    assert "0.weight" not in groups[0]["param_names"]


def test_float8():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    eight = model[0].weight.detach().to(torch.float8_e4m3fn)
    model[0].weight = nn.Parameter(eight, requires_grad=False)
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*'frozen'.*'0.weight' is one"):
        groups_of(model)
    (group,) = groups_of(model, quantized="frozen")
    assert group["param_names"] == ["0.bias", "1.weight", "1.bias"]


def test_activations_that_are_quantised_too():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
    with pytest.raises(ValueError, match=r"cannot be perturbed.*'0.weight' is one"):
        groups_of(model)


def int4_for_gpus():
    """As ``Int4WeightOnlyConfig`` makes it where its kernels are installed."""
    from torchao.quantization import Int4Tensor

    parts = torch.zeros(64, 32, dtype=torch.int8), torch.ones(2, 64), torch.zeros(2, 64)
    return Int4Tensor(*parts, block_size=[1, 32], shape=torch.Size((64, 64)))


def int4_with_activations():
    """As the CPU's ``Int8DynamicActivationInt4WeightConfig`` makes it."""
    weight = layers(network("int4 cpu"))[0].weight
    weight.act_mapping_type = "symmetric"
    return weight


@pytest.mark.parametrize("make", [int4_for_gpus, int4_with_activations])
def test_other_int4_of_torchao(make):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    model[0].weight = nn.Parameter(make(), requires_grad=False)
    with pytest.raises(ValueError, match=r"Int4\w*Tensor.*'low_rank'.*'frozen'.*'0.weight' is one"):
        groups_of(model)
    (group,) = groups_of(model, quantized="frozen")
    assert group["param_names"] == ["0.bias", "1.weight", "1.bias"]
