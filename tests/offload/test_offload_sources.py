"""Weights come from where accelerate keeps them, and from checkpoints."""

import copy

import pytest
import torch
from conftest import same_bits
from torch import nn

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module  # noqa: E402
from offloaded import (  # noqa: E402, F401
    ON_LINUX,
    OPTIONS,
    any_folder,
    assert_offloaded,
    assert_same,
    closure_of,
    empty,
    trained,
)
from tiny_llama import base_model, lora  # noqa: E402

from zofo_optim.offload import offload_weights  # noqa: E402

pytestmark = ON_LINUX


def disk(model, folder):
    places = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(places, "cpu") | {"model.layers.1": "disk"}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


ACCELERATED = {
    "disk": disk,
    "all on disk": lambda model, folder: accelerate.disk_offload(
        model, str(folder), execution_device="cpu"
    ),
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "buffers too": lambda model, folder: accelerate.cpu_offload(
        model, execution_device="cpu", offload_buffers=True
    ),
    "modules at once": lambda model, folder: accelerate.cpu_offload(
        model, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"]
    ),
}


@pytest.mark.parametrize("kind", ACCELERATED)
def test_what_accelerate_has_offloaded(kind, tmp_path):
    tied = kind in ("disk", "cpu")

    def make():
        torch.manual_seed(0)
        config = copy.deepcopy(base_model().config)
        config.tie_word_embeddings = tied
        return transformers.LlamaForCausalLM(config).requires_grad_(False)

    expected, model = make(), ACCELERATED[kind](make(), tmp_path / "theirs")
    offload_weights(model, folder=tmp_path)
    assert_offloaded(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert not hasattr(model, "hf_device_map")
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_from_pretrained_with_a_device_map(tmp_path):
    """Nothing is loaded but what the map has in memory; the user's files stay as they are."""
    base_model().save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "model.safetensors"
    before = file.read_bytes()
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "mine",
        device_map=places | {"model.rotary_emb": "cpu", "lm_head": "disk"},
        offload_folder=str(tmp_path / "theirs"),
    )
    offload_weights(model.requires_grad_(False), folder=tmp_path)
    assert_offloaded(model)
    expected = base_model().requires_grad_(False)
    trained(expected)
    trained(model)
    assert_same(model, expected)
    assert file.read_bytes() == before


class Counting(ModelHook):
    """A hook of a user's own."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs

    def detach_hook(self, module):
        raise AssertionError("it was not to be taken off")


def test_hooks_of_users_stay(tmp_path):
    model = disk(base_model().requires_grad_(False), tmp_path / "theirs")
    own = [Counting() for _ in range(4)]
    layers = model.model.layers
    layers[1].mlp._hf_hook = SequentialHook(own[0], layers[1].mlp._hf_hook)
    first = layers[1].self_attn.q_proj
    first._hf_hook = SequentialHook(SequentialHook(first._hf_hook, own[1]), own[2])
    add_hook_to_module(layers[0].self_attn.q_proj, own[3])
    offload_weights(model, folder=tmp_path)
    assert_offloaded(model, own)
    expected = base_model().requires_grad_(False)
    trained(expected)
    trained(model)
    assert_same(model, expected)
    calls = {hook.calls for hook in own}
    assert len(calls) == 1
    assert calls.pop() >= 6
    model.to("cpu")  # without a warning of accelerate's
    assert "to" not in vars(model)


def test_an_adapter_above_what_accelerate_has_offloaded(tmp_path):
    expected, model = lora(), lora()
    accelerate.cpu_offload(model.get_base_model().model.layers[1].mlp, execution_device="cpu")
    offload_weights(model, folder=tmp_path)
    assert_offloaded(model)
    trained(expected)
    trained(model)
    assert_same(model, expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint(shards, tmp_path):
    """It is read into the private file, converted, and stays as it is."""
    whole = base_model()
    size = sum(p.nbytes for p in whole.parameters())
    whole.save_pretrained(tmp_path / "mine", max_shard_size=-(-size // shards) + 1)
    files = sorted((tmp_path / "mine").glob("*.safetensors"))
    assert (len(files) > 1) is (shards > 1)
    before = [file.read_bytes() for file in files]
    model = empty(whole.config, torch.bfloat16).requires_grad_(False)
    offload_weights(model, tmp_path / "mine", folder=tmp_path)
    expected = whole.requires_grad_(False).bfloat16()
    assert_same(model, expected)
    trained(expected)
    trained(model)
    assert_same(model, expected)
    assert [file.read_bytes() for file in files] == before


def test_a_checkpoint_of_the_base_model_and_a_new_head(tmp_path):
    """Names with and without the base model's prefix; what requires gradients comes to memory."""
    base_model().model.save_pretrained(tmp_path / "mine")
    model = empty(base_model().config).requires_grad_(False)
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    model.model.norm.requires_grad_(True)
    offload_weights(model, tmp_path / "mine", folder=tmp_path)
    assert_offloaded(model)
    assert same_bits(model.model.norm.weight, base_model().model.norm.weight)
    trained(model)


def test_a_checkpoint_of_the_model_within_an_adapter(tmp_path):
    """peft's names have parts that those of the checkpoint have not."""
    expected = lora()
    base_model().save_pretrained(tmp_path / "mine")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    model = peft.get_peft_model(empty(base_model().config), config)
    with pytest.raises(ValueError, match=r"lora_A.* offload the base model first"):
        offload_weights(model, tmp_path / "mine", folder=tmp_path)
    adapter = {n: p.clone() for n, p in expected.state_dict().items() if "lora" in n}
    model.load_state_dict(adapter, strict=False, assign=True)
    offload_weights(model, tmp_path / "mine", folder=tmp_path)
    assert_offloaded(model)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_an_adapter_around_tied_weights_on_the_meta_device(tmp_path):
    config = base_model().config
    config.tie_word_embeddings = True
    model = peft.get_peft_model(empty(config), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="offload the base model before you add it"):
        offload_weights(model, tmp_path, folder=tmp_path)
