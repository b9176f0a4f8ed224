"""The README's recipes run as they stand there, and do what a plain loop does."""

import re
from pathlib import Path

import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_llama import DATA, TOKENS, arguments, lora, vars_of  # noqa: E402
from tiny_llama import base_model as tiny  # noqa: E402

from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.split("\n## Recipes\n")[1].split("\n## ")[0]
RECIPES = dict(
    re.findall(r"\*\*([^*]+)\*\*[^`]*(?:`[^`\n]+`[^`]*)*?```python\n(.*?)```", SECTION, re.DOTALL)
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def own_state():
    """accelerate keeps what an earlier test chose, such as bf16."""
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(True)
    yield
    state.AcceleratorState._reset_state(True)


def batches():
    rows = [dict(input_ids=row, labels=row) for row in TOKENS]
    return torch.utils.data.DataLoader(rows, batch_size=3)


def surroundings(tmp_path):
    """What a recipe takes for granted."""
    return dict(
        HybridZOFO=HybridZOFO,
        hybrid_param_groups=hybrid_param_groups,
        torch=torch,
        model=lora(),
        loader=batches(),
    )


def run(name, tmp_path, **more):
    code = RECIPES[name]
    assert len(code.strip().splitlines()) < 15
    names = {**surroundings(tmp_path), **more}
    before = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    exec(compile(code, f"README: {name}", "exec"), names)
    return names, before


def changed(model, before):
    """Names of the weights that are not as before."""
    now = dict(model.named_parameters())
    return {n for n, p in before.items() if not same_bits(p, now[n].detach())}


def assert_base_and_adapter_changed(model, before):
    names = changed(model, before)
    assert any("lora_" in name for name in names)
    assert any("lora_" not in name for name in names)


def test_every_recipe_is_found():
    assert list(RECIPES) == [
        "A plain loop",
        "transformers' Trainer",
        "TRL's SFTTrainer",
        "accelerate",
        "Lightning",
        "Objectives without gradients",
    ]


def test_plain_loop(tmp_path):
    names, before = run("A plain loop", tmp_path)
    assert_base_and_adapter_changed(names["model"], before)


def test_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, before = run(
        "transformers' Trainer",
        tmp_path,
        TrainingArguments=lambda *a, **k: transformers.TrainingArguments(
            *a, **k, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        dataset=DATA,
    )
    assert_base_and_adapter_changed(names["model"], before)


def test_sft_trainer(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    from tiny_llama import word_tokenizer

    texts = [" ".join(f"w{i}" for i in row) for row in TOKENS.tolist()]
    base = tiny()
    names, _ = run(
        "TRL's SFTTrainer",
        tmp_path,
        SFTTrainer=trl.SFTTrainer,
        LoraConfig=peft.LoraConfig,
        base_model=base,
        tokenizer=word_tokenizer(),
        text_dataset=datasets.Dataset.from_dict(dict(text=texts)),
        sft_arguments=trl.SFTConfig(**vars_of(arguments(tmp_path))),
    )
    start = dict(tiny().named_parameters())
    model = names["trainer"].model.get_base_model()
    key = "model.layers.0.mlp.up_proj.weight"
    assert not same_bits(dict(model.named_parameters())[key].detach(), start[key].detach())


def test_accelerate(tmp_path):
    """As the plain loop, to the bit."""
    accelerate = pytest.importorskip("accelerate")
    names, before = run(
        "accelerate",
        tmp_path,
        Accelerator=lambda **k: accelerate.Accelerator(**k, cpu=True),
    )
    assert_base_and_adapter_changed(names["model"], before)
    plain, _ = run("A plain loop", tmp_path)
    for a, b in zip(names["model"].parameters(), plain["model"].parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    calls = []
    model = lora()
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def quiet(**k):
        return lightning.Trainer(
            **k, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
        )

    names, before = run(
        "Lightning",
        tmp_path,
        model=model,
        LightningModule=lightning.LightningModule,
        Trainer=quiet,
    )
    assert calls == [True, False, False] * 4
    assert_base_and_adapter_changed(names["model"], before)
    plain = lora()
    optimizer = HybridZOFO(
        hybrid_param_groups(plain, zo=dict(lr=1e-6), fo=dict(lr=1e-3), verbose=False)
    )
    for batch in batches():
        optimizer.zero_grad()
        optimizer.step(lambda batch=batch: plain(**batch).loss)
    for a, b in zip(names["model"].parameters(), plain.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())


def test_objectives_without_gradients(tmp_path):
    names, before = run("Objectives without gradients", tmp_path)
    assert any("lora_" in name for name in changed(names["model"], before))


def test_accuracy_is_learnt():
    """A linear classifier learns from its accuracy alone; its features from their own loss."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    labels = (x[:, 0] > 0).long()
    head = torch.nn.Linear(8, 2).requires_grad_(False)
    scale = torch.nn.Parameter(torch.zeros(()))
    optimizer = HybridZOFO(
        [
            dict(params=list(head.parameters()), mode="zo", lr=0.5, mu=0.1, maximize=True),
            dict(params=[scale], lr=0.1),
        ],
        num_samples=4,
    )

    def closure():
        optimizer.zero_grad()
        ((scale - 1) ** 2).backward()
        return (head(x).argmax(-1) == labels).float().mean()

    start = float(closure())
    for _ in range(60):
        last = optimizer.step(closure)
    assert start < 0.7
    assert float(last) > 0.95
    assert float(scale) == pytest.approx(1, abs=0.01)
