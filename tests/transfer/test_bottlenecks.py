"""Bottleneck adapters: what they compute, what they leave alone, and their files."""

import copy
import pickle

import families
import peft
import pytest
import torch
from families import logits
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.transfer import transfer_adapter
from zofo_optim.transfer.bottleneck_files import (
    FILE,
    bottleneck_state,
    load_bottlenecks,
    save_bottlenecks,
)
from zofo_optim.transfer.bottlenecks import (
    Bottleneck,
    adapters_of,
    add_bottlenecks,
    without_bottlenecks,
)

BATCH = families.texts(1)[0]
HOULSBY = ("o_proj", "down_proj")


def adapted(model=None, targets=HOULSBY, size=3, **options):
    model = add_bottlenecks(model or families.llama(), targets, size, **options)
    return families.randomised(model).eval()


# ---- the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_a_bottleneck_is_its_formula(activation):
    adapter = families.randomised(Bottleneck(6, 3, activation, scale=0.5))
    h = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    inner = getattr(nn.functional, activation, getattr(torch, activation, None))(
        h @ adapter.down.weight.T + adapter.down.bias
    )
    wanted = h + 0.5 * (inner @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(adapter(h), wanted)


def test_it_starts_as_the_identity_and_learns():
    adapter = Bottleneck(6, 3)
    h = torch.randn(4, 6)
    assert torch.equal(adapter(h), h)
    adapter(h).square().sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0


def test_sixteen_bit_rows_stay_so():
    adapter = families.randomised(Bottleneck(6, 3))
    h = torch.randn(4, 6).bfloat16()
    torch.testing.assert_close(adapter(h), adapter(h.float()).bfloat16(), rtol=1e-2, atol=1e-2)
    assert adapter(h).dtype == torch.bfloat16


def test_bad_arguments_of_the_module():
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        Bottleneck(4, 0)
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'softmax'"):
        Bottleneck(4, 2, "softmax")


# ---- in a model ---------------------------------------------------------------------------------


def test_the_base_keeps_its_function_and_its_names():
    plain = families.llama()
    before, keys = logits(plain, BATCH), list(plain.state_dict())
    model = add_bottlenecks(plain, HOULSBY, 3)
    assert model is plain
    assert torch.equal(logits(model, BATCH), before)
    assert [k for k in model.state_dict() if ".bottleneck." not in k] == keys
    assert model.bottlenecks == {
        "target_modules": ["o_proj", "down_proj"],
        "size": 3,
        "activation": "gelu",
        "scale": 1.0,
        "modules_to_save": [],
    }


def test_what_trains_and_where_it_is():
    model = add_bottlenecks(
        families.llama(labels=3), r".*layers\.1\.mlp", 3, modules_to_save=["score"]
    )
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    place = "model.layers.1.mlp.bottleneck"
    parts = [f"{place}.{a}.{b}" for a in ("down", "up") for b in ("weight", "bias")]
    assert trains == [*parts, "score.weight"]
    assert list(adapters_of(model)) == ["model.layers.1.mlp"]


def test_the_first_of_a_tuple_is_adapted():
    """Attention returns (output, weights); its last layer is linear, so both places agree."""
    by_module = adapted(targets=["self_attn"])
    by_linear = adapted(targets=["o_proj"])
    for a, b in zip(adapters_of(by_module).values(), adapters_of(by_linear).values(), strict=True):
        b.load_state_dict(a.state_dict())
    assert torch.equal(logits(by_module, BATCH), logits(by_linear, BATCH))
    assert not torch.equal(logits(by_module, BATCH), logits(families.llama(), BATCH))


def test_they_can_be_put_aside_and_asked_for_again():
    model, plain = adapted(), families.llama()
    with without_bottlenecks(model):
        assert torch.equal(logits(model, BATCH), logits(plain, BATCH))
    after = logits(model, BATCH)
    assert not torch.allclose(after, logits(plain, BATCH))
    again = add_bottlenecks(plain, **model.bottlenecks)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, BATCH), after)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_adapters_of_its_own(copied):
    model = adapted()
    before = logits(model, BATCH)
    other = copied(model)
    assert torch.equal(logits(other, BATCH), before)
    for adapter in adapters_of(other).values():
        nn.init.zeros_(adapter.up.weight)
    assert torch.equal(logits(model, BATCH), before)
    assert not torch.equal(logits(other, BATCH), before)


def test_sixteen_bit_models_train_them_in_single_precision():
    model = adapted(families.llama().bfloat16())
    dtypes = {p.dtype for a in adapters_of(model).values() for p in a.parameters()}
    assert dtypes == {torch.float32}
    assert logits(model, BATCH).dtype == torch.bfloat16


def test_hybrid_steps_train_the_base_and_the_adapters():
    model = add_bottlenecks(families.llama(), HOULSBY, 3)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-6), fo=dict(lr=0.1), verbose=False)
    names = {g["mode"]: set(g["param_names"]) for g in groups}
    assert names["fo"] == set(bottleneck_state(model))
    optimizer = HybridZOFO(groups)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = optimizer.step(lambda: model(**BATCH, labels=BATCH["input_ids"]).loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert "model.layers.0.mlp.down_proj.weight" in moved
    assert "model.layers.0.mlp.down_proj.bottleneck.up.weight" in moved


def refusals():
    yield dict(target_modules=["nothing"]), r"target_modules must match .*'nothing'"
    yield dict(target_modules=r".*layers"), r"target_modules must not match 'model.layers'"
    yield dict(modules_to_save=["score"]), r"modules_to_save must name .*'score'"
    yield dict(size=0), r"size must be at least 1"
    yield dict(scale=float("nan")), r"scale must be finite, got nan"


@pytest.mark.parametrize(("options", "message"), list(refusals()))
def test_what_is_refused_changes_nothing(options, message):
    model = families.llama()
    with pytest.raises(ValueError, match=message):
        add_bottlenecks(model, **{"target_modules": HOULSBY, "size": 3, **options})
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())
    add_bottlenecks(model, HOULSBY, 3)
    with pytest.raises(ValueError, match="no bottlenecks yet"):
        add_bottlenecks(model, HOULSBY, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=2.5), r"size must be an int, got 2\.5"),
        (dict(size=True), r"size must be an int, got True"),
        (dict(scale="x"), r"scale must be a number, got 'x'"),
    ],
)
def test_sizes_and_scales_are_numbers(options, message):
    model = families.llama()
    with pytest.raises(TypeError, match=message):
        add_bottlenecks(model, **{"target_modules": HOULSBY, "size": 3, **options})
    assert not adapters_of(model)


def state_of(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    return flags, hooks, set(vars(model))


def test_what_is_to_train_must_be_able_to():
    model = families.llama(labels=3)
    model.score.weight = nn.Parameter(torch.zeros(3, 16, dtype=torch.int8), requires_grad=False)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"floating point, .* got 'score' of torch\.int8"):
        add_bottlenecks(model, HOULSBY, 3, modules_to_save=["score"])
    assert state_of(model) == before


def test_all_are_put_in_or_none(monkeypatch):
    model = families.llama()
    before = state_of(model)
    register, calls = nn.Module.register_forward_hook, []

    def third_fails(module, hook):
        calls.append(module)
        if len(calls) == 3:
            raise MemoryError
        return register(module, hook)

    monkeypatch.setattr(nn.Module, "register_forward_hook", third_fails)
    with pytest.raises(MemoryError):
        add_bottlenecks(model, HOULSBY, 3)
    assert state_of(model) == before


def test_modules_that_are_never_called_are_refused():
    model = nn.TransformerEncoderLayer(8, 2, 8)
    with pytest.raises(ValueError, match=r"not match 'self_attn\.out_proj': a MultiheadAttention"):
        add_bottlenecks(model, ["out_proj"], 3)


@pytest.mark.parametrize("part", ["around", "within", "native"])
def test_one_adapter_a_model(part):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = families.llama()
    if part == "native":
        model.add_adapter(config)
    else:
        model = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"must have no adapter of peft, .*merge_and_unload"):
        add_bottlenecks(model.get_base_model() if part == "within" else model, HOULSBY, 3)
    if part != "native":
        assert adapters_of(add_bottlenecks(model.merge_and_unload(), HOULSBY, 3))


def test_two_adapters_are_not_carried_as_one():
    model = adapted()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="small must have one adapter, got bottlenecks and one"):
        transfer_adapter(model, families.llama(), families.texts(24))


def test_an_output_that_is_no_tensor_is_named_when_it_runs():
    model = add_bottlenecks(families.llama(), ["model"], 3)
    with pytest.raises(ValueError, match=r"a LlamaModel that returns a BaseModelOutput"):
        model(**BATCH)


def test_a_width_that_is_not_the_hidden_size_is_named_when_it_runs():
    model = add_bottlenecks(families.llama(intermediate=12), ["act_fn"], 3)
    with pytest.raises(ValueError, match=r"16 wide.*got one of shape \(4, 8, 12\)"):
        model(**BATCH)


# ---- files --------------------------------------------------------------------------------------


def test_files_bring_back_adapters_and_head(tmp_path):
    model = adapted(families.bert(), ["output.dense"], modules_to_save=["classifier"], scale=0.5)
    path = save_bottlenecks(model, tmp_path)
    assert path == tmp_path / FILE
    state = torch.random.get_rng_state()
    other = load_bottlenecks(families.bert(), tmp_path).eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert other.bottlenecks == model.bottlenecks
    assert torch.equal(logits(other, BATCH), logits(model, BATCH))
    assert not any(p.requires_grad for p in other.parameters())
    again = load_bottlenecks(families.bert(), path, trainable=True)
    trains = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trains == set(bottleneck_state(model))


def test_files_of_another_model_are_refused(tmp_path):
    save_bottlenecks(adapted(families.llama(layers=3)), tmp_path)
    for other in (families.llama(layers=2), families.llama(layers=3, hidden=20)):
        with pytest.raises(ValueError, match=r"must fit the model.*model\.layers\.\d"):
            load_bottlenecks(other, tmp_path)
        assert not adapters_of(other)
        assert not hasattr(other, "bottlenecks")
    with pytest.raises(FileNotFoundError, match=FILE):
        load_bottlenecks(families.llama(), tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="model must have bottlenecks"):
        save_bottlenecks(families.llama(), tmp_path)


def test_weights_are_not_rounded_unasked(tmp_path):
    save_bottlenecks(adapted(families.llama(labels=3), modules_to_save=["score"]), tmp_path)
    other = families.llama(labels=3).bfloat16()
    before = state_of(other)
    with pytest.raises(
        ValueError, match=r"got torch\.bfloat16 for 'score\.weight' of torch\.float32"
    ):
        load_bottlenecks(other, tmp_path)
    assert state_of(other) == before
    small = adapted(families.llama(labels=3), modules_to_save=["score"])
    transfer_adapter(small, other, families.texts(24))  # where they are mapped anyway
    assert other.score.weight.dtype == torch.bfloat16


def test_swapped_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"got str; the order is load_bottlenecks\(model, folder\)"):
        load_bottlenecks(str(tmp_path), families.llama())
