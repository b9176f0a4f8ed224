"""The command line on published models: without a head, with experts; what it leaves and says."""

import shutil

import pytest
import torch
from conftest import same_bits

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay
from zofo_optim.journal import checkpoint
from zofo_optim.journal.cli import main

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    pad_token_id=0,
)
TOKENS = torch.arange(12).reshape(2, 6)


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def experts(kind):
    torch.manual_seed(0)
    few = dict(num_key_value_heads=2, num_experts_per_tok=2)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, **few, num_local_experts=3)
        return transformers.MixtralForCausalLM(config)
    sizes = dict(moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=3)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **few, **sizes))


def train(model, path, **options):
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False, **options)
    optimizer = HybridZOFO(groups, lr=0.1, distribution="rademacher")
    labels = torch.tensor([0, 1]) if hasattr(model, "classifier") else TOKENS
    with Journal(path).attach(optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(lambda: model(input_ids=TOKENS, labels=labels).loss)


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def classifier(tmp_path):
    """Of a base that was published without a head; the head learns by gradients."""
    bert().save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    train(model, tmp_path / "run.zofo")
    return model


def test_a_base_without_a_head(classifier, tmp_path, capsys):
    journal, base, out = (tmp_path / name for name in ("run.zofo", "base", "out"))
    code, text, err = run(capsys, "verify", journal, "--base", base)
    assert code == 0, err
    code, text, err = run(capsys, "replay", journal, "--base", base, "--out", out)
    assert code == 0, err
    assert "bit-identical" in text
    made = transformers.BertModel.from_pretrained(out)
    assert all(map(same_bits, made.parameters(), classifier.bert.parameters()))
    assert replay(transformers.BertModel.from_pretrained(base), journal).verified


def test_a_head_that_is_needed(tmp_path, capsys):
    bert().save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    train(model.requires_grad_(False), tmp_path / "run.zofo")
    words = ("replay", tmp_path / "run.zofo", "--base", tmp_path / "base", "--out")
    code, _, err = run(capsys, *words, tmp_path / "out")
    assert code == 1
    assert "2 are missing: classifier.weight, classifier.bias" in err
    assert "by save_pretrained, and give that as --base" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_experts(kind, dtype, tmp_path, capsys):
    """Published with a tensor an expert, though the model may have one a layer."""
    base, out, again = (tmp_path / name for name in ("base", "out", "again"))
    experts(kind).save_pretrained(base, max_shard_size="20KB")
    (base / "README.md").write_text("A model.")
    files = sorted(path.name for path in base.iterdir() if path.suffix != ".safetensors")
    model = type(experts(kind)).from_pretrained(base, dtype=dtype).eval().requires_grad_(False)
    train(model, tmp_path / "run.zofo")
    code, text, err = run(capsys, "replay", tmp_path / "run.zofo", "--base", base, "--out", out)
    assert code == 0, err
    assert "bit-identical" in text
    tuned = type(model).from_pretrained(out, dtype=dtype)
    assert all(map(same_bits, tuned.parameters(), model.parameters()))
    for name in set(files) - {"model.safetensors.index.json"}:
        assert (out / name).read_text() == (base / name).read_text()
    names = [
        {name for file in folder.glob("*.safetensors") for name in safetensors.load_file(file)}
        for folder in (base, out)
    ]
    assert names[0] == names[1]
    model.save_pretrained(again)
    code, _, err = run(capsys, "verify", tmp_path / "run.zofo", "--result", again, "--base", base)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "base", "out", "run.zofo"]


def test_a_model_that_transformers_does_not_know(tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    safetensors.save_file({"a": torch.ones(2)}, base / "model.safetensors")
    model = bert().requires_grad_(False)
    groups = hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False)
    Journal(tmp_path / "run.zofo").attach(HybridZOFO(groups)).close()
    for config in (None, "{}", '{"architectures": ["NoSuchModel"]}'):
        if config is not None:
            (base / "config.json").write_text(config)
        words = ("--base", base, "--out", tmp_path / "out")
        code, _, err = run(capsys, "replay", tmp_path / "run.zofo", *words)
        assert code == 1
        assert "are missing: embeddings." in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is not there is needed")
@pytest.mark.parametrize("device", ["cuda", "abacus"])
def test_a_device_that_is_not_there(device, classifier, tmp_path, capsys):
    words = ("replay", tmp_path / "run.zofo", "--base", tmp_path / "base", "--out")
    code, _, err = run(capsys, *words, tmp_path / "new" / "out", "--device", device)
    assert code == 1
    assert f"--device must be a device torch can use here, got '{device}'" in err
    assert not (tmp_path / "new").exists()


def test_nothing_half_made_is_left(classifier, tmp_path, capsys, monkeypatch):
    """Whatever cuts it off; and what a killed run left is no hindrance."""
    words = ("replay", tmp_path / "run.zofo", "--base", tmp_path / "base", "--out")

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            run(capsys, *words, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run.zofo"]
    shutil.copytree(tmp_path / "base", tmp_path / "out.new")
    (tmp_path / "out.new" / "more").touch()
    code, _, err = run(capsys, *words, tmp_path / "out")
    assert code == 0, err
    assert not (tmp_path / "out" / "more").exists()


def test_messages_name_options(classifier, tmp_path, capsys):
    journal, base = tmp_path / "run.zofo", tmp_path / "base"
    words = ("replay", journal, "--base", base, "--out", tmp_path / "out")
    for more, message in [
        (("--stop", 7), "--stop must be within the journal's sound steps 0 to 2, got 7"),
        (("--base", tmp_path / "no"), "--base must be a safetensors file, or a folder of them"),
    ]:
        code, _, err = run(capsys, *words, *more)
        assert code == 1
        assert message in err
    code, _, err = run(capsys, "verify", journal, "--result", tmp_path / "no")
    assert "--result must be a safetensors file, or a folder of them" in err
    bert().float().save_pretrained(tmp_path / "other")
    weights = safetensors.load_file(tmp_path / "other" / "model.safetensors")
    changed = {name: p + 1 for name, p in weights.items()}
    safetensors.save_file(changed, tmp_path / "other" / "model.safetensors")
    code, _, err = run(capsys, "verify", journal, "--base", tmp_path / "other")
    assert "error: --base must have the weights that" in err
    journal.write_bytes(journal.read_bytes()[:-1])
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "Pass --partial to go to step 2, or --stop STEP" in err
    code, _, err = run(capsys, *words, "--partial")
    assert code == 0, err
    assert err.startswith("warning: ")
    assert "zofo_optim" not in err
