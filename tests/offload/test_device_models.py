"""What a model is whose weights visit a device."""

import copy
import gc
import io
import os

import pytest
import torch

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from offloaded import ON_LINUX, any_folder, assert_same, closure_of, trained  # noqa: E402
from tiny_llama import base_model, lora  # noqa: E402
from visited import Pretended, pretended, visiting  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402
from zofo_optim.offload import device_visits, maps, offload_weights, offloading  # noqa: E402
from zofo_optim.offload.in_turn import is_offloaded  # noqa: E402
from zofo_optim.offload.target import Target  # noqa: E402

pytestmark = ON_LINUX
__all__ = ["any_folder", "pretended"]  # fixtures
LAYERS = ["LlamaDecoderLayer"]


@pytest.mark.parametrize("how", ["copied", "pickled"])
@pytest.mark.parametrize("file", [False, True])
def test_copies_of_the_model_are_in_memory(how, file, tmp_path, monkeypatch):
    monkeypatch.setattr(offloading, "Target", Target if file else Pretended)
    model = lora()
    offload_weights(model, folder=tmp_path if file else None, device="cpu")
    if how == "copied":
        other = copy.deepcopy(model)
    else:
        torch.save(model, saved := io.BytesIO())
        saved.seek(0)
        other = torch.load(saved, weights_only=False)
    assert not any(map(is_offloaded, other.parameters()))
    expected = lora()
    trained(expected)
    trained(other)
    assert_same(other, expected)
    assert_same(model, lora())


def test_an_adapter_that_is_added_afterwards(monkeypatch):
    """Offloading once more places it, and leaves the rest as it is."""
    monkeypatch.setattr(offloading, "_is_there", lambda tensor, target: is_offloaded(tensor))
    base = base_model()
    first = offload_weights(base.requires_grad_(False), device="cpu")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    before = {id(p): p.data_ptr() for p in model.parameters()}
    second = offload_weights(model, device="cpu")
    assert (first.count > 0, second.count, second.nbytes) == (True, 0, 0)
    assert before == {id(p): p.data_ptr() for p in model.parameters()}
    expected = base_model()
    torch.manual_seed(0)
    expected = peft.get_peft_model(expected, config)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_memory_is_shared_with_forked_processes():
    """Else each would have a copy of pinned pages."""
    memory = maps.HostMemory.of(4, torch.device("cpu"))
    tensor = memory.tensor(0, [1], torch.int32)
    child = os.fork()
    if child == 0:
        tensor.fill_(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert tensor.item() == 7


def test_the_memory_goes_with_the_model():
    gc.collect()
    before, visiting_before = len(maps._memories), len(device_visits._every)
    model = visiting(base_model().requires_grad_(False))
    closure_of(model)()
    assert len(maps._memories) == before + 1
    del model
    gc.collect()
    assert len(maps._memories) == before
    assert len(device_visits._every) == visiting_before


def test_hooks_can_be_removed():
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, device="cpu")
    offload.drop()
    offload.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same(model, base_model())


def test_in_place_is_refused():
    model = visiting(base_model().requires_grad_(False))
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    with pytest.raises(ValueError, match="perturbation must be 'streamed'"):
        HybridZOFO(groups)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(device="cpu", blocks="LlamaDecoderLayer"), TypeError, "blocks must be a list"),
        (dict(device="cpu", blocks=[1]), TypeError, "blocks must be a list"),
        (dict(device="nowhere"), ValueError, "device must be one that torch can use"),
        (dict(device="meta"), ValueError, "device must compute"),
    ],
)
def test_arguments(options, error, said):
    with pytest.raises(error, match=said):
        offload_weights(base_model().requires_grad_(False), **options)


def test_blocks_on_the_cpu(monkeypatch):
    monkeypatch.setattr(offloading, "Target", Target)
    with pytest.raises(ValueError, match="blocks must be None on the CPU"):
        offload_weights(base_model().requires_grad_(False), blocks=LAYERS)
