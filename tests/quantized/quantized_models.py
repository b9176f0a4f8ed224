"""Small models in each format of quantised weights, made and read by the format's own library."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zofo_optim.quantized import Scales

bnb = pytest.importorskip("bitsandbytes", reason="quantised weights need bitsandbytes")
pytest.importorskip("torchao", reason="quantised weights need torchao")

from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_  # noqa: E402
from torchao.quantization.granularity import PerGroup  # noqa: E402

try:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig as Int4OnCpu
except ImportError:  # its name in older versions
    from torchao.prototype.int4_opaque_tensor import Int4WeightOnlyOpaqueTensorConfig as Int4OnCpu

INT4 = torch.int4  # type: ignore[attr-defined]  # torch does not list it
FORMATS = {
    "nf4": dict(quant_type="nf4", compress_statistics=False),
    "nf4 double": dict(quant_type="nf4", compress_statistics=True),
    "fp4": dict(quant_type="fp4", compress_statistics=False),
    "bnb int8": None,
    "torchao int8": Int8WeightOnlyConfig(version=2),
    "intx int8": IntxWeightOnlyConfig(weight_dtype=torch.int8),
    "intx int4": IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(32)),
    "int4 cpu": Int4OnCpu(group_size=32, set_inductor_config=False),
}
NAMES = {"nf4": "weight.absmax", "nf4 double": "weight.absmax", "fp4": "weight.absmax"}
NAMES |= {"bnb int8": "SCB"}
NAMES |= dict.fromkeys(("torchao int8", "intx int8", "intx int4"), "weight.scale")
NAMES |= {"int4 cpu": "weight.scale_and_zero"}


def network(kind, dtype=torch.float32, sizes=(64, 64, 32), train=True):
    """Two frozen quantised layers, "0" and "2"; without bias, so that scales alone learn."""
    torch.manual_seed(0)
    layers = [nn.Linear(n, m, bias=False) for n, m in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to(dtype)
    return quantised(model, kind, dtype).train(train)


def quantised(model, kind, dtype=torch.float32):
    if kind.startswith(("nf4", "fp4", "bnb")):
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear:
                model.set_submodule(name, _of_bnb(layer, kind, dtype))
    else:
        quantize_(model, FORMATS[kind])
    return model.requires_grad_(False)


def _of_bnb(layer, kind, dtype):
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    if kind == "bnb int8":
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, **FORMATS[kind])
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def dequantised(layer):
    """The weight as the format's own library has it."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, bnb.nn.Int8Params):
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scale)
    if hasattr(weight, "scale_and_zero"):  # its only operation is a product
        return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype), weight).t()
    return weight.dequantize()


def scales(model):
    """By name."""
    return {every[0].name: every[0].tensor for every in Scales(model)}


def replaced(layer, kind):
    """Give a layer other tensors of its scales, as moving to another device does."""
    if kind.startswith(("nf4", "fp4")):
        layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.clone()
    elif kind == "bnb int8":
        holder = layer.weight if layer.weight.SCB is not None else layer.state
        holder.SCB = holder.SCB.clone()
    else:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def batch(rows=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 64, generator=generator)


def losses(model, x):
    return model(x).square().mean(1)
