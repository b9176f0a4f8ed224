"""A partition's table, file, picture and groups."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from partitioned import made, mlp
from torch import nn

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.partition import POLICIES, Partition, hi_zfo, importance_partition

ZO, FO = dict(lr=1e-4, mu=1e-3), dict(lr=1e-2)


def partition_of(kind="lora_llama", **options):
    model, closure = mlp() if kind == "mlp" else made(kind)
    return model, importance_partition(model, closure, verbose=False, **options)[1]


@pytest.mark.parametrize("kind", ["mlp", "lora_llama", "t5"])
def test_the_table_fits_100_columns(kind):
    _, partition = partition_of(kind, budget=0.7)
    lines = str(partition).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["depth", "mode", "tensor", "shape", "importance", "FLOPs", "bytes"]
    assert len(lines) == len(partition.rows) + 3 + 4
    for line, row in zip(lines[2:], partition.rows, strict=False):
        depth, mode, name, *_ = line.split()
        assert (int(depth), mode) == (lines[2:].index(line), row.mode)
        assert row.name.endswith(name.lstrip("…"))
    assert "\n".join(lines[-4:]) == partition.summary()
    assert "budget 0.7 of flops" in lines[-4]


def test_a_small_table():
    _, partition = partition_of("mlp", budget=0.3)
    assert str(partition).splitlines()[2].split()[:4] == ["0", "fo", "6.bias", "6"]
    sizes = {"fo": 0, "zo": 0}
    for row in partition.rows:
        sizes[row.mode] += torch.Size(row.shape).numel()
    fo, zo = len(partition.first_order), len(partition.zeroth_order)
    assert (fo + zo, sum(sizes.values())) == (8, 168)
    assert partition.summary().splitlines()[1] == (
        f"first-order: {fo} tensors ({sizes['fo']}); zeroth-order: {zo} tensors ({sizes['zo']})"
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_files(policy, tmp_path):
    of = "memory" if policy == "importance" else "flops"
    _, partition = partition_of(policy=policy, budget="80%", of=of, exclude="embed")
    partition.save(tmp_path / "partition.json")
    assert Partition.load(tmp_path / "partition.json") == partition


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "its format is not"),
        (lambda c: c.update(version=2), "its version is 2, not 1"),
        (lambda c: c.pop("rows"), "rows is no list"),
        (lambda c: c.pop("flops"), "missing 1 required"),
        (lambda c: c.update(more=1), "unexpected keyword argument 'more'"),
        (lambda c: c.update(flops=-1), "no ints >= 0"),
        (lambda c: c.update(of="time"), "of is not one of"),
        (lambda c: c.update(policy="best"), "policy is not one of"),
        (lambda c: c.update(directions="own"), "directions is not one of"),
        (lambda c: c.update(budget=None), "budget is no number"),
        (lambda c: c.update(in_backward=1), "in_backward is no bool"),
        (lambda c: c["rows"][0].update(mode="first"), "a mode is not one of"),
        (lambda c: c["rows"][0].pop("shape"), "a row has no shape"),
        (lambda c: c["rows"][0].update(importance="high"), "importances are no numbers"),
        (lambda c: c["rows"][0].update(name=c["rows"][1]["name"]), "a name is there twice"),
        (lambda c: c["rows"][0].update(mode="frozen"), "a frozen row does not say why"),
        (lambda c: c["rows"][0].update(candidate=1), "candidate of a row is no bool"),
        (lambda c: c["rows"][0].update(mode="fo", candidate=False), "first-order and no candidate"),
        (lambda c: c["rows"][0].update(name=3), "its names are no strings"),
    ],
)
def test_files_are_checked(change, message, tmp_path):
    path = tmp_path / "partition.json"
    partition_of("mlp")[1].save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"path must be of a saved Partition") as error:
        Partition.load(path)
    assert message in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"path must be of a saved Partition"):
        Partition.load(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        Partition.load(tmp_path / "b.json")


@pytest.mark.parametrize("options", [{}, dict(policy="last_layers", of="memory")])
def test_pictures(options, tmp_path):
    pytest.importorskip("matplotlib")
    _, partition = partition_of("llama", **options)
    partition.plot(tmp_path / "partition.png")
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")
    partition.plot(tmp_path / "partition.svg")
    assert "<svg" in (tmp_path / "partition.svg").read_text()


def test_pictures_need_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    partition = partition_of("mlp")[1]
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install matplotlib, or zofo-optim\[experiments\]"):
        partition.plot(tmp_path / "partition.png")


# ---- groups -------------------------------------------------------------------------------------


def test_groups_of_another_model_of_the_same_kind(capsys):
    model, partition = partition_of("lora_llama", budget=0.7)
    other, _ = made("lora_llama")
    groups = partition.groups(other, ZO, FO)
    assert capsys.readouterr().out.startswith("partition: zeroth-order: ")
    assert [group["mode"] for group in groups] == ["zo", "fo"]
    assert [group["lr"] for group in groups] == [1e-4, 1e-2]
    assert groups.model is other
    assert set(groups[1]["param_names"]) == set(partition.first_order)
    base = {n for n, p in other.named_parameters() if "lora_" not in n}
    assert set(groups[0]["param_names"]) == base | set(partition.zeroth_order)
    whole = hybrid_param_groups(model, ZO, FO, verbose=False)
    assert {n for g in groups for n in g["param_names"]} == {
        n for g in whole for n in g["param_names"]
    }


def test_groups_of_a_wrapped_model():
    model, partition = partition_of("mlp")
    wrapped = nn.Sequential(model)
    with pytest.raises(ValueError, match=r"lacks '6.bias'"):
        partition.groups(wrapped, ZO, FO)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    groups = partition.groups(averaged, ZO, FO, verbose=False)
    assert set(groups[1]["param_names"]) == {f"module.{n}" for n in partition.first_order}


def test_groups_name_what_is_missing_and_what_is_beside():
    model, partition = partition_of("mlp")
    model.add_module("more", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"trains 'more.weight', 'more.bias' beside"):
        partition.groups(model, ZO, FO)
    del model.more, model[6]
    with pytest.raises(ValueError, match=r"lacks '6.bias', '6.weight'"):
        partition.groups(model, ZO, FO)
    other, _ = mlp(width=5)
    with pytest.raises(ValueError, match=r"shapes, got \(5,\) for '6.bias', which has \(6,\)"):
        partition.groups(other, ZO, FO)
    with pytest.raises(TypeError, match=r"model must be"):
        partition.groups(3, ZO, FO)
    with pytest.raises(ValueError, match=r"fo must not set 'mode'"):
        partition.groups(mlp()[0], ZO, dict(mode="zo"))


def test_a_whole_budget_leaves_no_zeroth_order_group():
    model, partition = partition_of("mlp", budget=1.0)
    groups = partition.groups(model, ZO, FO, verbose=False)
    assert [group["mode"] for group in groups] == ["fo"]


def test_hi_zfo():
    preset = hi_zfo(budget=0.3, lr=1e-3, ratio=0.5)
    model, closure = mlp()
    groups, partition = importance_partition(
        model,
        closure,
        preset.zo,
        preset.fo,
        verbose=False,
        **preset.partition,
    )
    assert (partition.budget, partition.of, partition.policy) == (0.3, "flops", "importance")
    assert [group["lr"] for group in groups] == [5e-4, 1e-3]
    optimizer = HybridZOFO(groups, **preset.hybrid)
    assert (optimizer.settings.estimator, optimizer.settings.coupling) == ("one_sided", 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(closure)
    paper = hi_zfo()
    assert (paper.fo, paper.zo, paper.partition["budget"]) == (
        dict(lr=2e-5),
        dict(lr=pytest.approx(2e-6), mu=1e-3),
        0.6,
    )


def test_files_are_written_whole_and_their_folder_is_made(tmp_path, monkeypatch):
    partition = importance_partition(*mlp(), verbose=False)[1]
    path = tmp_path / "new" / "deep" / "partition.json"
    partition.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", _fails)
    with pytest.raises(OSError, match="disk full"):
        partition.save(path)
    assert path.read_bytes() == before


def _fails(self, text, **kwargs):
    self.write_bytes(text[:10].encode())
    raise OSError("disk full")


def test_other_files_are_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"path must be of a saved Partition, got .*weights\.bin"):
        Partition.load(tmp_path / "weights.bin")
