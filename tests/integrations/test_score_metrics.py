"""What ScoreTrainer logs and evaluates, and by which formulas."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

from scored_llama import DATA, assert_same, contents, even, logged, trainer  # noqa: E402

from zofo_optim import shape_scores  # noqa: E402
from zofo_optim.rewards import Scored  # noqa: E402
from zofo_optim.score_logs import ScoreLogs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def rows_of(groups):
    from zofo_optim.completions import Rows

    return Rows(["p"] * len(groups), [[1]] * len(groups), groups, {})


def added(logs, rewards, groups, complete=None, lengths=None):
    total = np.array(rewards, dtype=float)
    count = len(rewards)
    complete = [True] * count if complete is None else complete
    lengths = [3] * count if lengths is None else lengths
    scored = Scored(total, total[:, None])
    logs.add(rows_of(groups), ["t"] * count, lengths, complete, scored, total)


def test_metrics_are_trls_formulas():
    logs = ScoreLogs(["f"])
    rewards = [1.0, 2.0, 5.0, 5.0]
    added(logs, rewards, [0, 0, 1, 1], [True, False, True, False], [2, 6, 4, 6])
    assert logs.metrics() == {
        "reward": 3.25,
        "reward_std": pytest.approx(np.std(rewards, ddof=1)),
        "frac_reward_zero_std": 0.5,
        "completions/clipped_ratio": 0.5,
        "completions/unscored": 0.0,
        "completions/mean_length": 4.5,
        "completions/min_length": 2.0,
        "completions/max_length": 6.0,
        "completions/mean_terminated_length": 3.0,
        "completions/min_terminated_length": 2.0,
        "completions/max_terminated_length": 4.0,
        "rewards/f/mean": 3.25,
        "rewards/f/std": pytest.approx(np.std(rewards, ddof=1)),
    }


def test_metrics_are_of_all_completions_since_the_last_log():
    logs = ScoreLogs(["f"])
    added(logs, [1.0, 1.0, 1.0], [0, 0, 0], lengths=[2, 3, 4])
    added(logs, [5.0], [0], lengths=[9])
    found = logs.metrics()
    assert found["reward"] == 2.0
    assert found["completions/mean_length"] == 4.5
    assert (found["completions/min_length"], found["completions/max_length"]) == (2, 9)
    logs.clear()
    assert logs.metrics() == {}


def test_a_batch_without_a_reward_spoils_no_other():
    logs = ScoreLogs(["f"])
    added(logs, [math.nan, math.nan], [0, 0])
    assert "reward" not in logs.metrics()
    added(logs, [1.0, 3.0], [0, 0], [False, False])
    found = logs.metrics()
    assert (found["reward"], found["rewards/f/mean"]) == (2.0, 2.0)
    assert found["completions/unscored"] == 1.0
    assert found["completions/mean_terminated_length"] == 3.0


def test_columns_of_another_length_are_refused():
    logs = ScoreLogs(["f"])
    logs.log_extra("x", [1])
    with pytest.raises(ValueError, match="a value for each of 2 completions, got 1 for 'x'"):
        added(logs, [1.0, 2.0], [0, 0])


@pytest.mark.parametrize("scale", ["group", "batch", "centered_rank", "none"])
def test_scales_are_those_of_shape_scores(tmp_path, scale):
    done = trainer(tmp_path, options=dict(scale_rewards=scale))
    rewards = np.array([1.0, 2.0, 7.0, 4.0, 5.0, 5.5])
    groups = [0, 0, 0, 1, 1, 1]
    wanted = {
        "group": shape_scores(rewards, groups=groups),
        "batch": shape_scores(rewards),
        "centered_rank": shape_scores(rewards, "centered_rank"),
        "none": rewards,
    }[scale]
    np.testing.assert_array_equal(done._scaled(rewards, rows_of(groups)), wanted)


def test_rounding_moves_no_weight(tmp_path):
    def summed(completions, **kwargs):
        return [(0.3, 0.1 + 0.2)[i % 2] for i in range(len(completions))]

    for scale in ("group", "none"):
        done = trainer(tmp_path, summed, options=dict(max_steps=1, scale_rewards=scale))
        before = contents(done.model)
        done.train()
        assert_same(before, contents(done.model))
        assert logged(done, "frac_reward_zero_std") == [1.0]


# ---- evaluations ---------------------------------------------------------------------------------


def words(prompts, completions, **kwargs):
    return [float(len(prompt.split())) for prompt in prompts]


@pytest.mark.parametrize("size", [4, 8, 12, 16])
def test_evaluations_do_not_depend_on_the_batch(tmp_path, size):
    options = dict(per_device_eval_batch_size=size, num_generations_eval=4)
    done = trainer(tmp_path, words, options=options, eval_dataset=DATA)
    assert done.evaluate()["eval_reward"] == 2.5
    assert done.predict(datasets.Dataset.from_list(DATA)).metrics["test_reward"] == 2.5


def test_so_many_generations_are_evaluated_at_a_time(tmp_path):
    seen = []

    def counted(completions, **kwargs):
        seen.append(len(completions))
        return [0.0] * len(completions)

    options = dict(per_device_eval_batch_size=8, num_generations_eval=3)
    done = trainer(tmp_path, counted, options=options, eval_dataset=DATA[:3])
    done.evaluate()
    done.predict(DATA[:3])
    assert seen == [6, 3, 6, 3]


def test_several_sets_are_evaluated(tmp_path):
    sets = {"short": DATA[1:2], "long": DATA[3:]}
    found = trainer(tmp_path, words, eval_dataset=sets).evaluate()
    assert (found["eval_short_reward"], found["eval_long_reward"]) == (1.0, 4.0)


def test_evaluations_leave_every_generator(tmp_path):
    def random_score(completions, **kwargs):
        return [random.random() + np.random.rand() for _ in completions]  # noqa: NPY002

    done = trainer(tmp_path, random_score, eval_dataset=DATA)
    first = done.evaluate()["eval_reward"]
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    assert done.evaluate()["eval_reward"] == first
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert (np.random.get_state()[1] == state[2]).all()  # noqa: NPY002


def test_the_best_model_is_that_of_the_largest_reward(tmp_path):
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    options |= dict(load_best_model_at_end=True)
    done = trainer(tmp_path, even, options=options, eval_dataset=DATA)
    assert (done.args.metric_for_best_model, done.args.greater_is_better) == ("reward", True)


@pytest.mark.parametrize("stream", [False, True])
def test_data_sets_of_any_kind(tmp_path, stream):
    data = datasets.Dataset.from_list(DATA)
    data = data.to_iterable_dataset() if stream else data
    done = trainer(tmp_path, even, data=data, eval_dataset=data)
    before = contents(done.model)
    done.train()
    assert "eval_reward" in done.evaluate()
    assert not all(same_bits(before[n], p) for n, p in done.model.named_parameters())
