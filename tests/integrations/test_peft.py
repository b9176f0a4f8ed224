"""Every kind of peft adapter that trains: groups, a hybrid step, saving and loading."""

import copy

import pytest
import torch
from conftest import same_bits
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tiny_llama import TOKENS, base_model  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402
from zofo_optim.base_weights import load_base_weights, save_base_weights  # noqa: E402

LINEAR = dict(target_modules=["q_proj", "v_proj"])
CAUSAL = dict(task_type="CAUSAL_LM")
KINDS = {
    "lora": lambda: peft.LoraConfig(**CAUSAL, r=2),
    "dora": lambda: peft.LoraConfig(**CAUSAL, r=2, use_dora=True),
    "rslora": lambda: peft.LoraConfig(**CAUSAL, r=2, use_rslora=True),
    "prompt": lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        **CAUSAL, num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "ia3": lambda: peft.IA3Config(**CAUSAL),
    "adalora": lambda: peft.AdaLoraConfig(**CAUSAL, **LINEAR, init_r=4, target_r=2, total_step=50),
    "loha": lambda: peft.LoHaConfig(**CAUSAL, **LINEAR, r=2),
    "lokr": lambda: peft.LoKrConfig(**CAUSAL, **LINEAR, r=2),
    "saved": lambda: peft.LoraConfig(**CAUSAL, r=2, modules_to_save=["lm_head"]),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def adapted(kind, tied=False):
    base = base_model()
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    torch.manual_seed(1)
    return peft.get_peft_model(base, KINDS[kind]())


def optimizer_for(model, **options):
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3, mu=1e-3), verbose=False)
    return HybridZOFO(groups, lr=0.05, **options)


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)


def contents(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_groups(kind, tied):
    """Zeroth order is the base model, once each; first order is what peft says trains."""
    model = adapted(kind, tied)
    groups = {g["mode"]: g for g in hybrid_param_groups(model, verbose=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in groups["fo"]["params"]} == {id(p) for p in trainable}
    base = {tuple(p.shape) for p in base_model().parameters()}
    assert {tuple(p.shape) for p in groups["zo"]["params"]} <= base
    expected = len(list(base_model().parameters())) - tied - (kind == "saved")
    if kind == "saved" and tied:  # the embedding still uses the tied weight
        expected += 1
    assert len({id(p) for p in groups["zo"]["params"]}) == expected


@pytest.mark.parametrize("perturbation", ["in_place", "streamed"])
def test_a_hybrid_step(kind, perturbation):
    """The adapter moves as first order alone moves it; all of the base moves; the rest stays."""
    model = adapted(kind)
    before = contents(model)
    alone = copy.deepcopy(model)
    first_order = [p for p in alone.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(first_order, lr=0.05)
    alone(input_ids=TOKENS, labels=TOKENS).loss.backward()
    sgd.step()
    optimizer = optimizer_for(model, perturbation=perturbation)
    train(model, optimizer, 1)
    now, expected = contents(model), contents(alone)
    zeroth = {name for g in optimizer.zo_groups() for name in g.names}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert same_bits(now[name], expected[name]), name
        else:
            assert same_bits(now[name], before[name]) == (name not in zeroth), name
            assert p.grad is None


def test_every_zeroth_order_weight_reaches_the_loss(kind):
    model = adapted(kind).eval()
    for group in optimizer_for(model).zo_groups():
        for name, p in zip(group.names, group.params, strict=True):
            before = p.detach().clone()
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
            assert model(input_ids=TOKENS, labels=TOKENS).loss != loss, name
            with torch.no_grad():
                p.copy_(before)


def test_save_load_continue(kind, tmp_path):
    """Adapter, base weights and optimizer state in files: the next step has the same bits."""
    model = adapted(kind)
    optimizer = optimizer_for(model)
    train(model, optimizer)
    model.save_pretrained(tmp_path)
    save_base_weights(optimizer, model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    base = base_model()
    load_base_weights(base, tmp_path)
    if kind in ("prompt", "prefix", "p-tuning"):  # peft loads these for inference only
        trained = {n: p for n, p in contents(model).items() if "prompt_encoder" in n}
        torch.save(trained, tmp_path / "prompt.pt")
        again = peft.get_peft_model(base, KINDS[kind]())
        again.load_state_dict(torch.load(tmp_path / "prompt.pt", weights_only=True), strict=False)
    else:
        again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    other = optimizer_for(again)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for pair in ((model, optimizer), (again, other)):
        pair[0].train()
        train(*pair, 1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [
        len(g["params"]) for g in other.param_groups
    ]
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        for name, a, b in zip(ours["param_names"], ours["params"], theirs["params"], strict=True):
            assert same_bits(a.detach(), b.detach()), name


def test_several_adapters():
    """The active one trains; switching makes groups anew."""
    model = adapted("lora")
    model.add_adapter("second", KINDS["lora"]())
    first = contents(model)
    train(model, optimizer_for(model))
    changed = {n for n, p in contents(model).items() if not same_bits(p, first[n])}
    assert any(".default." in name for name in changed)
    assert not any(".second." in name for name in changed)
    model.set_adapter("second")
    second = contents(model)
    train(model, optimizer_for(model))
    changed = {n for n, p in contents(model).items() if not same_bits(p, second[n])}
    assert any(".second." in name for name in changed)
    assert not any(".default." in name for name in changed)


def test_disabled_adapters():
    """The base model alone, by zeroth order."""
    model = adapted("lora")
    with model.disable_adapter():
        groups = [g for g in hybrid_param_groups(model, verbose=False) if g["mode"] == "zo"]
        before = contents(model)
        train(model, HybridZOFO(groups, lr=1e-3))
    changed = {n for n, p in contents(model).items() if not same_bits(p, before[n])}
    assert changed == set(groups[0]["param_names"])


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha", "lokr", "saved"])
def test_merge_and_unload(kind):
    model = adapted(kind)
    train(model, optimizer_for(model))
    model.eval()
    expected = model(TOKENS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not isinstance(merged, peft.PeftModel)


def test_lora_on_multihead_attention():
    """peft makes some of its weights anew in every forward pass: they cannot be trained."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["attention"], r=2)
    model = peft.get_peft_model(Model(), config)
    x = torch.randn(2, 3, 8)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-2), verbose=False)
    held = {id(p) for g in groups for p in g["params"]}
    optimizer = HybridZOFO(groups, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(lambda: model(x).square().sum())
    now = {id(p) for p in model.parameters()}
    assert held <= now
    names = {name for g in groups for name in g["param_names"]}
    assert any(name.endswith("in_proj_bias") for name in names)
    assert not any(name.endswith("in_proj_weight") for name in names)
