"""Replaying on files that hold a weight twice: nothing is left untrained in silence."""

import pytest
import torch
from torch import nn

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups
from zofo_optim.journal.cli import main

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm, self.idle = nn.LayerNorm(4), nn.LayerNorm(4)  # equal, and not tied
        self.lm_head = nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.embed.weight

    def loss(self):
        return self.lm_head(self.norm(self.embed(torch.arange(3)))).square().mean()


@pytest.fixture
def trained(tmp_path):
    """A model, its journal, and its weights before: in one file, and in two, copies first."""
    torch.manual_seed(0)
    model = Tied().requires_grad_(False)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "base").mkdir()
    head = {"lm_head.weight": base.pop("lm_head.weight")}
    safetensors.save_file(head, tmp_path / "base" / "1.safetensors")
    safetensors.save_file(base, tmp_path / "base" / "2.safetensors")
    groups = hybrid_param_groups(model, zo=dict(lr=0.1), exclude="idle", verbose=False)
    optimizer = HybridZOFO(groups)
    with Journal(tmp_path / "a.zofo").attach(optimizer):
        for _ in range(2):
            optimizer.step(model.loss)
    return model


def replayed(folder, name, *more):
    out = folder / f"out{name}"
    base = folder / f"base{name}"
    status = main(["replay", str(folder / "a.zofo"), "--base", str(base), "--out", str(out), *more])
    if status:
        assert not out.exists()
        return None
    files = [out] if out.is_file() else sorted(out.iterdir())
    return {key: t for file in files for key, t in safetensors.load_file(file).items()}


@pytest.mark.parametrize("name", [".safetensors", ""])
def test_a_copy_is_named_and_written_or_kept(name, trained, tmp_path, capsys):
    assert replayed(tmp_path, name) is None
    said = capsys.readouterr().err
    assert "holds 'lm_head.weight', equal to the trained 'embed.weight' (1 such in all)" in said
    assert "--copies train" in said
    found = replayed(tmp_path, name, "--copies", "train")
    assert found.keys() == trained.state_dict().keys()
    for key, tensor in trained.state_dict().items():
        assert torch.equal(found[key], tensor), key


def test_a_copy_that_is_kept(trained, tmp_path):
    found = replayed(tmp_path, ".safetensors", "--copies", "keep")
    before = safetensors.load_file(tmp_path / "base.safetensors")
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(found["embed.weight"], trained.embed.weight)
