"""What cannot be offloaded, and a model that is as before where something fails."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from failing import FailAt  # noqa: E402
from offloaded import (  # noqa: E402, F401
    ON_LINUX,
    any_folder,
    assert_offloaded,
    empty,
)
from tiny_llama import base_model  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402
from zofo_optim.offload import maps, offload_weights, offloading  # noqa: E402

pytestmark = ON_LINUX


def test_in_place_is_refused(tmp_path):
    model = base_model().requires_grad_(False)
    offload_weights(model, folder=tmp_path)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    with pytest.raises(ValueError, match=r"perturbation must be 'streamed'.*embed_tokens"):
        HybridZOFO(groups)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: 3, TypeError, "model must be a torch.nn.Module, got int"),
        (base_model, ValueError, "must have frozen weights, got none that can be offloaded"),
        (lambda: empty(base_model().config), ValueError, "model must have data for 'model.embed"),
        (
            lambda: nn.Linear(2, 2, dtype=torch.complex64).requires_grad_(False),
            ValueError,
            "plain frozen weights",
        ),
    ],
)
def test_models_that_cannot_be(make, error, said, tmp_path):
    with pytest.raises(error, match=re.escape(said)):
        offload_weights(make(), folder=tmp_path)


def test_twice(tmp_path):
    model = base_model().requires_grad_(False)
    offload_weights(model, folder=tmp_path)
    with pytest.raises(ValueError, match="not offloaded yet"):
        offload_weights(model, folder=tmp_path)


def test_quantised_weights(tmp_path):
    quantised = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64).requires_grad_(False)
    with pytest.raises(ValueError, match=r"quantised and sharded ones cannot be.*bitsandbytes"):
        offload_weights(nn.Sequential(quantised, nn.Linear(2, 2)), folder=tmp_path)


def test_checkpoints_that_do_not_fit(tmp_path):
    config = base_model().config
    with pytest.raises(FileNotFoundError, match=r"checkpoint must be a folder with model"):
        offload_weights(empty(config).requires_grad_(False), tmp_path, folder=tmp_path)
    base_model().save_pretrained(tmp_path / "mine")
    config.intermediate_size += 1
    model = empty(config).requires_grad_(False)
    with pytest.raises(ValueError, match=r"must have the model's shapes, got .*mlp"):
        offload_weights(model, tmp_path / "mine", folder=tmp_path)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_a_folder_in_memory(monkeypatch):
    monkeypatch.setattr(maps, "_IN_MEMORY", ("tmpfs",))
    with pytest.raises(ValueError, match=r"folder must be on a disk, got '/dev/shm'.*tmpfs"):
        offload_weights(base_model().requires_grad_(False), folder="/dev/shm")


def test_a_disk_that_is_full(tmp_path):
    with pytest.raises(OSError, match="folder must have room for"):
        maps.new_map(tmp_path, 1 << 50)
    assert os.listdir(tmp_path) == []


def test_tensors_that_share_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[1].weight = nn.Parameter(model[0].weight.data, requires_grad=False)
    before = model[0].weight
    with pytest.raises(ValueError, match=r"share memory, got '0\.weight' and '1\.weight'"):
        offload_weights(model)
    assert model[0].weight is before


def test_views_of_one_buffer_that_do_not_overlap_move():
    whole = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer, part in zip(model, whole.split(4), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    offload_weights(model)
    assert torch.equal(torch.cat([layer.weight for layer in model]), whole)


def test_gaps_between_elements_are_refused():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    model[0].weight.data = torch.randn(4, 8)[:, ::2]
    with pytest.raises(ValueError, match=r"without gaps.*'0\.weight'.*strides \(8, 2\)"):
        offload_weights(model)


# ---- all or nothing -----------------------------------------------------------------------------


def accelerated(folder):
    """Tied weights, of which accelerate has some, and a checkpoint of others on the meta device."""
    config = base_model().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config)
    whole.save_pretrained(folder)
    model = empty(config)
    model.model.layers[1] = whole.model.layers[1]
    model.requires_grad_(False).model.norm.requires_grad_(True)
    accelerate.cpu_offload(model.model.layers[1], execution_device="cpu")
    return model


def state_of(model):
    """All that offloading changes, by identity."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inner = value if isinstance(value, dict) else {}
            found[name, key] = id(value), {k: id(v) for k, v in inner.items()}
    memory = [p.is_meta or p.data_ptr() for p in model.parameters()]
    return found, memory, [p.requires_grad for p in model.parameters()]


def test_an_error_at_any_torch_call(tmp_path):
    model = accelerated(tmp_path / "mine")
    before = state_of(model)
    place, failed = 1, 0
    while True:
        try:
            with FailAt(place, MemoryError):
                offload_weights(model, tmp_path / "mine", folder=tmp_path)
        except MemoryError:
            assert state_of(model) == before, place
            place, failed = place + 5, failed + 1
        else:
            break
    assert failed > 20
    assert state_of(model) != before
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_checks_come_before_changes(tmp_path):
    """Tying included, which a shape that is wrong comes after."""
    model = accelerated(tmp_path / "mine")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        torch.empty(3, 3, device="meta"), requires_grad=False
    )
    before = state_of(model)
    with pytest.raises(ValueError, match=r"must have the model's shapes, got .*mlp"):
        offload_weights(model, tmp_path / "mine", folder=tmp_path)
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["_checked", "_set"])
def test_ctrl_c(where, monkeypatch, tmp_path):
    """While weights are copied nothing has changed; the change itself is not cut off."""
    model = accelerated(tmp_path / "mine")
    before = state_of(model)
    do, calls = getattr(offloading, where), iter(range(100))

    def interrupted(*args):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return do(*args)

    monkeypatch.setattr(offloading, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        offload_weights(model, tmp_path / "mine", folder=tmp_path)
    if where == "_checked":
        assert state_of(model) == before
    else:
        assert_offloaded(model)
