"""Offloaded weights train as those in memory do, to the bit."""

import copy
import mmap
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from torch import nn

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tiny_llama import DATA, TOKENS, arguments, base_model, lora  # noqa: E402

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    Journal,
    example_losses_of,
    hybrid_param_groups,
    load_base_weights,
    replay,
    save_base_weights,
)
from zofo_optim.offload import in_turn, maps, offload_weights  # noqa: E402
from zofo_optim.trainer import HybridTrainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="offloading needs Linux"),
]


@pytest.fixture(autouse=True)
def any_folder(monkeypatch):
    """Where temporary files are in memory, all but the peak of memory can be tested."""
    monkeypatch.setattr(maps, "_IN_MEMORY", ())


OPTIONS = {
    "full": {},
    "rademacher, one-sided": dict(distribution="rademacher", estimator="one_sided"),
    "low rank": dict(structure="low_rank"),
    "per example": dict(structure="low_rank", directions="per_example"),
    "coupled": dict(coupling=0.5),
}
CASES = [("LoRA", name) for name in OPTIONS]
CASES += [("base", name) for name in OPTIONS if name != "coupled"]  # with first-order groups
MADE = {"base": lambda: base_model().requires_grad_(False), "LoRA": lora}


def trained(model, steps=3, **options):
    per_example = options.get("directions") == "per_example"
    hybrid = any(p.requires_grad for p in model.parameters())
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=1e-3, mu=1e-3, weight_decay=0.1),
        **dict(fo=dict(lr=1e-2)) if hybrid else {},
        verbose=False,
        directions=options.get("directions", "shared"),
    )
    optimizer = HybridZOFO(groups, perturbation="streamed", **options)
    for _ in range(steps):
        optimizer.step(closure_of(model, per_example))
    return optimizer


def closure_of(model, per_example=False):
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    return lambda: example_losses_of(model, batch) if per_example else model(**batch).loss


def assert_same(model, other):
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert same_bits(p, theirs[name]), name


def assert_offloaded(model):
    for name, p in model.named_parameters():
        assert in_turn.is_offloaded(p) is not p.requires_grad, name
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


# ---- the same results ---------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "options"), CASES)
def test_a_model_in_memory(made, options, tmp_path, monkeypatch):
    monkeypatch.setattr(in_turn, "_PIECE", 1 << 10)  # updates cut every weight
    expected, model = MADE[made](), MADE[made]()
    offload = offload_weights(model, folder=tmp_path)
    assert_offloaded(model)
    assert offload.count == sum(not p.requires_grad for p in model.parameters())
    trained(expected, **OPTIONS[options])
    trained(model, **OPTIONS[options])
    assert_same(model, expected)


def test_sixteen_bits(tmp_path, monkeypatch):
    """Rounding bits too belong to elements, not to parts."""
    monkeypatch.setattr(in_turn, "_PIECE", 1 << 10)
    expected, model = (base_model().requires_grad_(False).bfloat16() for _ in range(2))
    offload_weights(model, folder=tmp_path)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_the_trainer_and_checkpointed_layers(tmp_path):
    def made():
        model = lora()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        return model

    expected, model = made(), made()
    offload_weights(model, folder=tmp_path)
    for one in (expected, model):
        HybridTrainer(
            one,
            arguments(tmp_path, gradient_checkpointing=True),
            train_dataset=DATA,
            zo=dict(lr=1e-3, mu=1e-3),
            hybrid=dict(perturbation="streamed"),
        ).train()
    assert_same(model, expected)


def test_a_module_whose_weight_another_one_reads(tmp_path):
    """Attention computes with its output layer's weight, and never calls that layer."""

    def made():
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).requires_grad_(False)

    expected, model = made(), made()
    offload_weights(model, folder=tmp_path)
    x = torch.linspace(-1, 1, 48).view(3, 2, 8)
    for one in (expected, model):
        groups = hybrid_param_groups(one, zo=dict(lr=1e-3), verbose=False)
        optimizer = HybridZOFO(groups, perturbation="streamed")
        for _ in range(2):
            optimizer.step(lambda: one(x).square().mean())  # noqa: B023
    assert_same(model, expected)


def test_a_copy_is_in_memory(tmp_path):
    model = base_model().requires_grad_(False)
    offload_weights(model, folder=tmp_path)
    other = copy.deepcopy(model)
    assert not any(map(in_turn.is_offloaded, other.parameters()))
    trained(other)
    assert_same(model, base_model())


def test_optimizers_that_have_the_parameters_keep_them(tmp_path):
    model = base_model().requires_grad_(False)
    before = [id(p) for p in model.parameters()]
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    offload_weights(model, folder=tmp_path)
    assert [id(p) for p in model.parameters()] == before
    assert all(map(in_turn.is_offloaded, groups[0]["params"]))


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


def test_an_adapter_above_what_accelerate_has_offloaded(tmp_path):
    expected, model = lora(), lora()
    accelerate.cpu_offload(model.get_base_model().model.layers[1].mlp, execution_device="cpu")
    offload_weights(model, folder=tmp_path)
    assert_offloaded(model)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def empty(config, dtype=torch.float32):
    with accelerate.init_empty_weights():
        return transformers.LlamaForCausalLM(config).to(dtype)


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


# ---- saving, journal, errors --------------------------------------------------------------------


def test_journal_and_saving(tmp_path):
    model = lora()
    start = copy.deepcopy(model)
    offload_weights(model, folder=tmp_path)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3, mu=1e-3), fo=dict(lr=1e-2), verbose=False)
    optimizer = HybridZOFO(groups, perturbation="streamed")
    journal = Journal(tmp_path / "run.zofo").attach(optimizer)
    for _ in range(3):
        optimizer.step(closure_of(model))
    journal.close()
    save_base_weights(optimizer, model, tmp_path / "tuned")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for load in (load_base_weights, lambda other, _: replay(other, tmp_path / "run.zofo")):
        other = copy.deepcopy(start)
        load(other, tmp_path / "tuned")
        theirs = dict(other.named_parameters())
        for name, p in model.named_parameters():
            assert name not in frozen or same_bits(p, theirs[name]), name

    again = copy.deepcopy(start)  # a journal replays into offloaded weights too
    offload_weights(again, folder=tmp_path)
    replay(again, tmp_path / "run.zofo")
    for name, p in again.named_parameters():
        assert name not in frozen or same_bits(p, dict(model.named_parameters())[name]), name


def test_save_pretrained(tmp_path):
    model = accelerate.cpu_offload(base_model().requires_grad_(False), execution_device="cpu")
    offload_weights(model, folder=tmp_path)
    trained(model)
    model.save_pretrained(tmp_path / "tuned")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", range(1, 6))
def test_a_closure_that_raises(error, call, tmp_path):
    """Also within the first step's verification, which writes to weights."""
    model = base_model().requires_grad_(False)
    offload_weights(model, folder=tmp_path)
    optimizer = trained(model, steps=0)
    calls = iter(range(1, 100))

    def closure():
        loss = closure_of(model)()
        if next(calls) == call:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert_same(model, base_model())


# ---- the private file ---------------------------------------------------------------------------


def mapped():
    """Bytes of this process's maps of files without a name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith("(deleted)")]
    return sum(int(high, 16) - int(low, 16) for low, high in ends)


def test_the_file_has_no_name_and_goes_with_the_model(tmp_path):
    before = mapped()
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, folder=tmp_path)
    assert os.listdir(tmp_path) == []
    assert mapped() >= before + offload.nbytes
    del offload, model
    assert mapped() == before


def test_pages_that_are_dropped_are_not_lost(tmp_path):
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, folder=tmp_path)
    weight = model.lm_head.weight
    weight.add_(1)
    offload.drop()
    assert same_bits(weight, base_model().lm_head.weight + 1)


def test_hooks_can_be_removed(tmp_path):
    model = base_model().requires_grad_(False)
    offload = offload_weights(model, folder=tmp_path)
    assert any(module._forward_hooks for module in model.modules())
    offload.remove()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    expected = base_model().requires_grad_(False)
    trained(expected)
    trained(model)
    assert_same(model, expected)


def test_merged_pages(tmp_path):
    one = maps.new_map(tmp_path, 10 * mmap.PAGESIZE)
    size = mmap.PAGESIZE
    some = [maps.Pages(one, 4 * size, 5 * size), maps.Pages(one, 0, size)]
    some += [maps.Pages(one, size, 3 * size), maps.Pages(one, 2 * size, 3 * size)]
    found = maps.merged(some)
    assert [(p.start // size, p.stop // size) for p in found] == [(0, 3), (4, 5)]
    last = one.tensor(10 * size - 4, [1], torch.float32)
    assert maps.pages_of(last) == maps.Pages(one, 9 * size, 10 * size)
    assert maps.pages_of(torch.ones(3)) is None


# ---- refused ------------------------------------------------------------------------------------


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
        (base_model, ValueError, "must have frozen weights that are not offloaded yet"),
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
