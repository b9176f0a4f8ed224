"""ScoreTrainer, and asking and telling, with a population that is spread over processes."""

import random
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import case, launched, run_cases
from torch.nn import Parameter

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

sys.path.append(str(Path(__file__).parents[1] / "engines"))

from scored_llama import config, contents, even, model_of  # noqa: E402
from served_llama import MATRICES, CopyEngine  # noqa: E402
from tiny_llama import word_tokenizer  # noqa: E402

from zofo_optim import HybridZOFO, Journal, replay  # noqa: E402
from zofo_optim.score_trainer import ScoreTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

results = launched(__file__, 2)

PROMPTS = [
    {"prompt": " ".join(f"w{3 + (7 * i + j) % 60}" for j in range(1 + i % 3))} for i in range(8)
]
GREEDY = dict(temperature=0.0, max_steps=3)
RUNS = {
    "group": dict(),
    "batch": dict(scale_rewards="batch"),
    "centered_rank": dict(scale_rewards="centered_rank", gradient_accumulation_steps=2),
    "together": dict(scale_rewards="none", prompts_per_direction=2),
    "divergence": dict(beta=0.1),
    "engine": dict(engine=CopyEngine, scale_rewards="batch"),
}


def graded(completions, log_metric=None, log_extra=None, **kwargs):
    """A number that few completions have in common."""
    words = [[int(w[1:]) for w in text.split() if w[0] == "w"] for text in completions]
    log_metric("words", sum(map(len, words)))
    log_extra("first", [some[0] if some else -1 for some in words])
    return [sum(w * (i + 1) for i, w in enumerate(some)) / 100 for some in words]


def trainer(folder, size=1, reward=graded, engine=None, **options):
    """With four prompts, sixteen completions, a step of all processes."""
    served = {} if engine is None else dict(engine=engine(), include=MATRICES)
    chosen = dict(per_device_train_batch_size=16 // size, per_device_eval_batch_size=8)
    return ScoreTrainer(
        model_of(double=True),
        reward,
        config(folder, **{**chosen, **GREEDY, **options}),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:5],
        processing_class=word_tokenizer(),
        **served,
    )


def told(done):
    leave = ("epoch", "step", "train_", "eval_runtime", "eval_samples", "eval_steps")
    logs = [
        {k: v for k, v in entry.items() if not k.startswith(leave)}
        for entry in done.state.log_history
    ]
    return dict(weights=contents(done.model), logs=[entry for entry in logs if entry])


def assert_alike(ours, theirs, tolerance=1e-9):
    for name, p in ours["weights"].items():
        torch.testing.assert_close(p, theirs["weights"][name], rtol=tolerance, atol=tolerance)
    assert len(ours["logs"]) == len(theirs["logs"]) > 0
    rounded = transformers.__version__.startswith("4.")  # to four places
    for entry, other in zip(ours["logs"], theirs["logs"], strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            room = 1.01e-4 if rounded and name == "loss" else 1e-9
            assert value == pytest.approx(other[name], rel=1e-6, abs=room, nan_ok=True), name


def folder_of_all():
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return Path(found[0])


def case_of(name):
    def run(rank, size):
        done = trainer(folder_of_all(), size, **RUNS[name])
        done.train()
        evaluated = done.evaluate()
        return dict(told(done), evaluated=evaluated["eval_reward"])

    run.__name__ = name
    case(run)


for name in RUNS:
    case_of(name)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_as_one(results, name, tmp_path):
    first, second = results[name]
    for key, p in first["weights"].items():
        assert torch.equal(p, second["weights"][key])
    done = trainer(tmp_path, **RUNS[name])
    before = contents(done.model)
    done.train()
    assert first["evaluated"] == second["evaluated"]
    assert first["evaluated"] == pytest.approx(done.evaluate()["eval_reward"])
    one = told(done)
    # a number that reward functions log is a call's, and there are as many as processes
    for entry, other in zip(first["logs"], one["logs"], strict=True):
        if "words" in entry:
            assert entry.pop("words") == pytest.approx(other.pop("words") / 2)
    assert_alike(first, one)
    moved = [not torch.equal(p, before[key]) for key, p in one["weights"].items()]
    assert all(moved) or (name == "engine" and sum(moved) > 10)  # which takes no layer norms


@case
def sampled(rank, size):
    """The same prompts in both processes, and noise of their own."""
    folder = folder_of_all()
    texts, drawn, kept = [], [], []

    def noted(completions, log_metric, log_extra, **kwargs):
        texts.append(list(completions))
        drawn.append((random.random(), np.random.rand()))  # noqa: NPY002
        log_metric(f"of_{rank}", 1 + rank)
        log_extra(f"column_{rank}", [rank] * len(completions))
        return even(completions)

    class Noting(ScoreTrainer):
        def training_step(self, *args, **kwargs):
            before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
            found = super().training_step(*args, **kwargs)
            kept.append(before == (random.getstate(), np.random.get_state()[1].tolist()))  # noqa: NPY002
            return found

    done = Noting(
        model_of(),
        noted,
        config(folder, max_steps=2, per_device_train_batch_size=8, log_completions=True),
        train_dataset=[{"prompt": "w3"}] * 4,
        processing_class=word_tokenizer(),
    )
    before = torch.get_rng_state()
    with Journal(folder / "run.zofo").attach(made(done)):
        done.train()
    after = torch.get_rng_state()
    return dict(
        told(done),
        texts=texts,
        drawn=drawn,
        kept=kept,
        folder=folder,
        random=torch.equal(before, after),
        state=after,
    )


def made(done):
    done.create_optimizer()
    return done.hybrid_optimizer


def test_processes_sample_noise_of_their_own(results):
    first, second = results["sampled"]
    assert first["texts"][0] != second["texts"][0]
    assert torch.equal(first["state"], second["state"])
    assert first["kept"] == second["kept"] == [True, True]
    for numbers in zip(*first["drawn"], *second["drawn"], strict=True):
        assert len(set(numbers)) == 4  # two steps in two processes
    for key, p in first["weights"].items():
        assert torch.equal(p, second["weights"][key])
    again = model_of()
    assert replay(again, first["folder"] / "run.zofo").verified
    for key, p in first["weights"].items():
        assert torch.equal(p, dict(again.named_parameters())[key])


def test_metrics_that_one_process_has_are_logged(results):
    for found in results["sampled"]:
        steps = [entry for entry in found["logs"] if "reward" in entry]
        assert [(entry["of_0"], entry["of_1"]) for entry in steps] == [(1, 2)] * 2


def test_completions_of_all_are_kept_once(results):
    datasets = pytest.importorskip("datasets")
    first, second = results["sampled"]
    folder = first["folder"] / "completions"
    assert len(list(folder.iterdir())) == 2
    table = datasets.Dataset.from_parquet(str(folder / "completions_00001.parquet"))
    assert table["completion"] == first["texts"][0] + second["texts"][0]
    assert not {"column_0", "column_1"} & set(table.column_names)  # which lack values


# ---- by hand ------------------------------------------------------------------------------------


def asking(**options):
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(6, 5, dtype=torch.float64), False) for _ in range(2)]
    groups = [dict(params=weights, param_names=["a", "b"], mode="zo", lr=1e-2, mu=1e-2)]
    optimizer = HybridZOFO(
        groups,
        structure="low_rank",
        perturbation="streamed",
        directions="per_example",
        estimator="antithetic",
        zo_rule="normalized",
        seed=3,
        **options,
    )
    return optimizer, weights


def score(at, bad=()):
    """Of a direction and a side alone."""
    return float("nan") if at.direction in bad else ((3 * at.direction + 1) % 7) / 7 * at.side


def asked_and_told(optimizer, examples, **how):
    places = optimizer.ask(examples)
    optimizer.tell([score(at, **how) for at in places])
    optimizer.step()
    return [(at.direction, at.side) for at in places]


ORDERS = ("contiguous", "interleaved")


@case
def asked(rank, size):
    found = {}
    for order in ORDERS:
        optimizer, weights = asking(example_order=order)
        places = [asked_and_told(optimizer, 6, bad=bad) for bad in ((), (1, 4), range(6))]
        found[order] = places[0], weights, optimizer.skipped_steps
    return found


def test_each_process_is_asked_for_its_places(results):
    first, second = results["asked"]
    sides = (1, -1)
    assert first["contiguous"][0] == [(d, s) for d in (0, 1, 2) for s in sides]
    assert second["contiguous"][0] == [(d, s) for d in (3, 4, 5) for s in sides]
    assert first["interleaved"][0] == [(d, s) for d in (0, 2, 4) for s in sides]
    assert second["interleaved"][0] == [(d, s) for d in (1, 3, 5) for s in sides]


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_told_to_two_is_as_told_to_one(results, order):
    optimizer, weights = asking()
    for bad in ((), (1, 4), range(6)):
        asked_and_told(optimizer, 12, bad=bad)
    for found in results["asked"]:
        _, ours, skipped = found[order]
        assert skipped == optimizer.skipped_steps
        for p, other in zip(ours, weights, strict=True):
            assert torch.equal(p, other)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    run_cases()
