"""python -m zofo_optim.journal, on files as models are published; names with and without peft."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from journaled import Job

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay
from zofo_optim.journal.cli import main

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trained(tmp_path):
    job = Job(dtype=torch.bfloat16)
    safetensors.save_file(job.base, tmp_path / "base.safetensors", metadata={"format": "pt"})
    with Journal(tmp_path / "run.zofo", metadata={"base": "tiny"}).attach(job.optimizer):
        for step in range(6):
            job.step(step)
    safetensors.save_file(job.model.state_dict(), tmp_path / "result.safetensors")
    return job


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_info(trained, tmp_path, capsys):
    code, out, _ = run(capsys, "info", tmp_path / "run.zofo")
    assert code == 0
    for fact in ("0 to 6", "closed", "766 in 4 tensors", "bfloat16", "gaussian", "tiny", "cpu"):
        assert fact in out
    code, out, _ = run(capsys, "info", tmp_path / "run.zofo", "--json")
    assert json.loads(out)["metadata"] == {"base": "tiny"}


def test_the_size_of_a_step_is_without_fixed_parts(tmp_path, capsys):
    """Whatever the header, the first step and the stamps take; a new rate takes 4 bytes more."""
    said = []
    for name, steps, stamps in (("short", 2, 0), ("long", 6, 0), ("stamped", 6, 3)):
        job = Job()
        with Journal(tmp_path / name).attach(job.optimizer) as journal:
            for step in range(steps):
                job.step(step)
            for _ in range(stamps):
                journal.stamp()
        _, out, _ = run(capsys, "info", tmp_path / name)
        size, each = re.search(r"([\d,]+) bytes, ([\d.]+) for each further step", out).groups()
        assert int(size.replace(",", "")) == (tmp_path / name).stat().st_size
        said.append(float(each))
    assert said[0] == said[1] == said[2]
    sizes = [(tmp_path / name).stat().st_size for name in ("short", "long")]
    assert sizes[1] - sizes[0] == said[0] * 4
    job = Job()
    with Journal(tmp_path / "one").attach(job.optimizer):
        job.step(0)
    _, out, _ = run(capsys, "info", tmp_path / "one")
    assert "bytes\n" in out


def test_verify(trained, tmp_path, capsys):
    base, result = tmp_path / "base.safetensors", tmp_path / "result.safetensors"
    code, out, _ = run(capsys, "verify", tmp_path / "run.zofo", "--base", base, "--result", result)
    assert code == 0
    assert out.count("every parameter is as") == 2
    code, _, err = run(capsys, "verify", tmp_path / "run.zofo", "--base", result)
    assert code == 1
    assert "4 of 4 zeroth-order parameters differ" in err
    code, _, err = run(capsys, "verify", tmp_path / "run.zofo", "--result", base)
    assert code == 1
    assert re.search(r"--result \S+ has not the weights that were trained: .* differ", err)
    assert "warning" not in err


def test_verify_damage(trained, tmp_path, capsys):
    path = tmp_path / "run.zofo"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run(capsys, "verify", path)
    assert code == 1
    assert "incomplete or damaged after step 6" in out
    assert "not whole" in err


def test_replay(trained, tmp_path, capsys):
    words = ("replay", tmp_path / "run.zofo", "--base", tmp_path / "base.safetensors", "--out")
    out = tmp_path / "new" / "out.safetensors"
    code, text, _ = run(capsys, *words, out)
    assert code == 0
    assert "weights of step 6, bit-identical to those trained" in text
    made = safetensors.load_file(out)
    for name, p in trained.weights().items():
        assert same_bits(made[name], p)
    for name in set(made) - set(trained.weights()):
        assert same_bits(made[name], trained.base[name])
    with safetensors.safe_open(out, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    code, _, err = run(capsys, *words, out)
    assert code == 1
    assert "--out must not exist" in err
    code, text, _ = run(capsys, *words, tmp_path / "third.safetensors", "--stop", 3)
    assert "weights of step 3, not verified" in text


def test_a_base_that_forbids_to_write(trained, tmp_path, capsys):
    """The output is an ordinary folder, not one with the base's permissions."""
    base = tmp_path / "base"
    (base / "more").mkdir(parents=True)
    shutil.move(tmp_path / "base.safetensors", base / "model.safetensors")
    for name in ("config.json", "more/vocab.txt"):
        (base / name).write_text("{}")
    for path in (base / "config.json", base / "more" / "vocab.txt", base / "model.safetensors"):
        path.chmod(0o444)
    for path in (base / "more", base):
        path.chmod(0o555)
    out = tmp_path / "out"
    code, _, err = run(capsys, "replay", tmp_path / "run.zofo", "--base", base, "--out", out)
    assert code == 0, err
    assert (out / "more" / "vocab.txt").read_text() == "{}"
    usual = tmp_path / "usual"
    usual.mkdir()
    for path in (out, out / "more"):
        assert path.stat().st_mode == usual.stat().st_mode
    assert (out / "config.json").stat().st_mode & 0o200
    for path in (base, base / "more"):  # so that the test's folder can be removed
        path.chmod(0o755)


def test_replay_from_another_precision(trained, tmp_path, capsys):
    """A base model published in fp32 and trained in bf16."""
    wide = {name: p.float() for name, p in trained.base.items()}
    safetensors.save_file(wide, tmp_path / "wide.safetensors")
    out = tmp_path / "out.safetensors"
    code, text, _ = run(
        capsys,
        "replay",
        tmp_path / "run.zofo",
        "--base",
        tmp_path / "wide.safetensors",
        "--out",
        out,
    )
    assert code == 0, text
    for name, p in trained.weights().items():
        assert same_bits(safetensors.load_file(out)[name], p)


def test_what_cannot_be(trained, tmp_path, capsys):
    journal, base = tmp_path / "run.zofo", tmp_path / "base.safetensors"
    out = tmp_path / "out.safetensors"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(base.read_bytes()[:-5])
    odd = {name: p for name, p in trained.base.items() if name != "0.bias"}
    safetensors.save_file(odd, tmp_path / "odd.safetensors")
    odd["0.bias"] = torch.zeros(3)
    safetensors.save_file(odd, tmp_path / "shape.safetensors")
    for words, message in [
        ((tmp_path / "nothing", "--base", base), "No such file"),
        ((base, "--base", base), "is no journal"),
        ((journal, "--base", tmp_path / "nothing"), "no safetensors file"),
        ((journal, "--base", broken), "no sound safetensors file"),
        ((journal, "--base", tmp_path / "odd.safetensors"), "1 are missing: 0.bias"),
        ((journal, "--base", tmp_path / "shape.safetensors"), "must have shape"),
        ((journal, "--base", base, "--stop", 7), "sound steps 0 to 6"),
        ((journal, "--base", tmp_path / "result.safetensors"), "4 of 4"),
    ]:
        code, _, err = run(capsys, "replay", *words, "--out", out)
        assert code == 1
        assert message in err
        assert not out.exists()


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "saved": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["norm"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_base_model_adapter_and_journal_are_the_model(kind, tmp_path, capsys):
    """Published as three: the base in shards, the adapter, the journal."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = peft.get_peft_model(base, ADAPTERS[kind]())
    tokens = torch.arange(12).reshape(2, 6)
    optimizer = HybridZOFO(hybrid_param_groups(model, zo=dict(lr=1e-3), verbose=False), lr=0.1)
    with Journal(tmp_path / "run.zofo").attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(input_ids=tokens).logits

    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert replay(again, tmp_path / "run.zofo").verified
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(again(input_ids=tokens).logits, expected)

    code, _, err = run(
        capsys,
        "replay",
        tmp_path / "run.zofo",
        "--base",
        tmp_path / "base",
        "--out",
        tmp_path / "tuned",
    )
    assert code == 0, err
    tuned = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    tuned = peft.PeftModel.from_pretrained(tuned, tmp_path / "adapter")
    assert torch.equal(tuned(input_ids=tokens).logits, expected)


def test_as_a_module(trained, tmp_path):
    command = [sys.executable, "-m", "zofo_optim.journal", "info", str(tmp_path / "run.zofo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "0 to 6" in done.stdout
