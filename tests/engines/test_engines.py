"""Engines without a server: displacements as adapters, updates as recipes, what is refused."""

import copy
import json

import pytest
import torch
from served_llama import CopyEngine, displaced_to, llama, of_groups, population, prompts

from zofo_optim import Draw, HybridZOFO, hybrid_param_groups
from zofo_optim.engines import lora_config, lora_tensors, vllm_options
from zofo_optim.engines.base import noise_seeds
from zofo_optim.engines.lora import targets_of
from zofo_optim.engines.vllm_check import check_effect
from zofo_optim.regroup import regroup

ROWS = prompts(8)


def head_of(model):
    return dict(params=[model.lm_head.weight], param_names=["lm_head.weight"], lr=0.1)


@pytest.fixture
def model():
    return llama(hidden_size=32, intermediate_size=48)


@pytest.mark.parametrize("rank", [1, 3])
def test_an_adapter_is_the_displacement(model, rank, tmp_path):
    peft = pytest.importorskip("peft")
    save_file = pytest.importorskip("safetensors.torch").save_file
    optimizer = population(model, rank=rank)
    at = optimizer.ask(4)[3]
    assert (at.direction, at.side) == (1, -1)
    targets = targets_of(optimizer.zo_groups(), model)
    save_file(lora_tensors(targets, at.shifts), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora_config(targets, rank)))
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    merged = adapted.merge_and_unload().state_dict()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    with displaced_to(optimizer, at.shifts):
        wanted = model.state_dict()
        assert merged.keys() == wanted.keys()
        for name, value in wanted.items():
            moved = value - start[name]
            assert torch.allclose(merged[name] - start[name], moved, rtol=1e-4, atol=1e-6), name
            assert ("norm" in name) == (not moved.any())


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(distribution="rademacher", rank=2),
        dict(zo_rule="normalized", zo=dict(weight_decay=0.1)),
        dict(active=Draw(0.5)),
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_recipes_make_the_same_weights_to_the_bit(model, options, dtype):
    model.to(dtype)
    optimizer = population(model, **options)
    engine = CopyEngine().attach(optimizer, model)
    start = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.ask(8)
        optimizer.tell(torch.rand(8, generator=generator))
        optimizer.step()
    moved = set()
    for name, value in model.state_dict().items():
        assert torch.equal(value, engine.served.state_dict()[name]), name
        if not torch.equal(value, start[name]):
            moved.add(name)
    matrices = {name for name in start if "norm" not in name}
    assert moved == matrices or ("active" in options and len(matrices) / 2 < len(moved))


def test_a_detached_engine_follows_no_more(model):
    optimizer = population(model)
    engine = CopyEngine().attach(optimizer, model)
    engine.detach()
    assert optimizer.listeners == ()
    optimizer.ask(2)
    optimizer.tell([0.0, 1.0])
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, engine.served.lm_head.weight)
    with pytest.raises(RuntimeError, match="attached first"):
        engine.generate(ROWS[:2])


def test_seeds_are_of_pairs():
    optimizer = population(llama(hidden_size=32), examples_per_direction=2)
    seeds = noise_seeds(optimizer.ask(8))  # forth, forth, back, back; twice
    assert seeds[:2] == seeds[2:4]
    assert seeds[4:6] == seeds[6:]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    optimizer.tell(list(range(8)))
    optimizer.step()
    assert not set(seeds) & set(noise_seeds(optimizer.ask(8)))


def test_rows_of_another_step_or_number_are_refused(model):
    optimizer = population(model)
    engine = CopyEngine().attach(optimizer, model)
    displaced = optimizer.ask(8)
    with pytest.raises(ValueError, match="each of the 8 prompts, got 6"):
        engine.generate(ROWS, displaced[:6])
    engine.generate(ROWS, displaced)
    optimizer.tell(list(range(8)))
    optimizer.step()
    with pytest.raises(ValueError, match=r"present step, got .*step=0.* row 0, .*step=1"):
        engine.generate(ROWS, displaced)


@pytest.mark.parametrize(
    ("include", "name"),
    [
        (r"(proj|norm)\.weight$", r"model\.layers\.0\.input_layernorm\.weight"),
        (r"embed_tokens", r"model\.embed_tokens\.weight"),
    ],
    ids=["norms", "tied"],
)
def test_parameters_that_no_adapter_displaces_are_refused_by_name(include, name):
    model = llama(hidden_size=32, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=rf"not: {name}.*exclude="):
        CopyEngine().attach(population(model, include), model)


def test_optimizers_that_no_engine_serves_are_refused(model):
    groups = hybrid_param_groups(model, zo=dict(lr=0.1), include=r"proj\.weight$", verbose=False)
    engine = CopyEngine()
    with pytest.raises(TypeError, match="HybridZOFO, got SGD"):
        engine.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match=r"structure='low_rank'.*got 'full'"):
        engine.attach(HybridZOFO(groups), model)
    low_rank = dict(structure="low_rank", perturbation="streamed")
    with pytest.raises(ValueError, match=r"directions='per_example'.*got 'shared'"):
        engine.attach(HybridZOFO(groups, **low_rank), model)
    with_head = population(model, r"proj\.weight$")
    with_head.add_param_group({**head_of(model), "mode": "fo"})
    with pytest.raises(ValueError, match="zeroth-order groups only"):
        engine.attach(with_head, model)
    with pytest.raises(ValueError, match="model must hold all zeroth-order parameters"):
        engine.attach(population(model), llama(hidden_size=32))


def test_an_engine_serves_one_optimizer_and_its_groups(model):
    optimizer = population(model, r"proj\.weight$")
    with pytest.raises(RuntimeError, match="by its own attach"):
        optimizer.add_listener(CopyEngine())
    engine = CopyEngine().attach(optimizer, model)
    with pytest.raises(RuntimeError, match="attached already"):
        engine.attach(optimizer, model)
    with pytest.raises(RuntimeError, match="detach"):
        optimizer.add_param_group(dict(params=[model.lm_head.weight], lr=0.1, mode="zo"))
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({**head_of(model), "mode": "fo"})
    with pytest.raises(ValueError, match="zeroth-order groups only"):
        engine.generate(ROWS)


def test_parameters_that_were_converted_are_refused(model):
    engine = CopyEngine().attach(population(model), model)
    model.double()
    with pytest.raises(ValueError, match="keep the dtype, shape and device"):
        engine.generate(ROWS)


def test_weights_that_are_not_served_are_found():
    rest = [{1: -1.0, 2: -2.0}, {1: -0.5, 3: -3.0}]

    def displaced(size, factor=1.0):
        return [{t: value + factor * size for t, value in row.items()} for row in rest]

    sizes = []
    check_effect(rest, displaced, lambda size: sizes.append(size) or displaced(size, 0.9))
    assert sizes == [0.256]  # the first that moves them by 0.1
    with pytest.raises(ValueError, match="updates would be lost"):
        check_effect(rest, displaced, lambda size: rest)
    with pytest.raises(ValueError, match="updates would be lost"):
        check_effect(rest, displaced, lambda size: [{9: 0.0}, {9: 0.0}])  # none in common
    with pytest.raises(ValueError, match="adapters with effect"):
        check_effect(rest, lambda size: rest, displaced)


def test_options_fit_the_rank():
    assert vllm_options(rank=1)["max_lora_rank"] == 1
    assert vllm_options(rank=9, max_loras=5)["max_lora_rank"] == 16
    assert vllm_options(max_loras=5)["max_loras"] == 5
    for rank in (0, 513, 1.5):
        with pytest.raises(ValueError, match="rank must be an int"):
            vllm_options(rank=rank)


def test_several_engines_share_a_population(model):
    optimizer = population(model)
    engines = [CopyEngine().attach(optimizer, model) for _ in range(2)]
    alone = CopyEngine().attach(optimizer, model)
    for _ in range(2):
        displaced = optimizer.ask(8)
        parts = [e.generate(ROWS[i::2], displaced[i::2]) for i, e in enumerate(engines)]
        whole = alone.generate(ROWS, displaced)
        assert [whole[i::2] for i in range(2)] == parts
        optimizer.tell([sum(tokens) for tokens in whole])
        optimizer.step()
    for engine in engines:
        served = engine.served.state_dict()
        assert all(torch.equal(p, served[name]) for name, p in model.state_dict().items())


def halves(model, swapped=False):
    """A population's optimizer in two groups, whose first members are swapped or not."""
    (group,) = population(model).param_groups
    members = list(zip(group["param_names"], group["params"], strict=True))
    first, second = members[:3], members[3:]
    if swapped:
        first[0], second[0] = second[0], first[0]
    options = dict(mode="zo", lr=0.05, mu=0.05, unit=1.0)
    return of_groups(
        [
            dict(params=[p for _, p in half], param_names=[n for n, _ in half], **options)
            for half in (first, second)
        ]
    )


def test_groups_are_not_rearranged_under_an_engine(model):
    """By a state dict, or by a partition: the engine would serve other weights from then on."""
    state = copy.deepcopy(halves(copy.deepcopy(model), swapped=True).state_dict())
    optimizer = halves(model)
    engine = CopyEngine().attach(optimizer, model)
    before = [group["param_names"] for group in optimizer.param_groups]
    members = [
        list(zip(group["param_names"], group["params"], strict=True))
        for group in reversed(optimizer.param_groups)
    ]
    for rearrange in (
        lambda: optimizer.load_state_dict(state),
        lambda: regroup(optimizer, members),
    ):
        with pytest.raises(RuntimeError, match=r"follows the groups .* detach\(\) it first"):
            rearrange()
        assert [group["param_names"] for group in optimizer.param_groups] == before
    engine.detach()
    optimizer.load_state_dict(state)
    assert [group["param_names"] for group in optimizer.param_groups] != before
