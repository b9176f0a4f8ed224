"""Scores of completions: reward functions as TRL calls them, shapes of scores."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from zofo_optim import shape_scores
from zofo_optim.rewards import RewardFunctions

NAN = math.nan
SCORES = st.lists(st.sampled_from([0.0, 0.1, -3.0, 7.5, NAN, math.inf]), min_size=1, max_size=12)


@given(SCORES, st.data())
def test_zscores_are_scipys_within_each_group(scores, data):
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(scores), max_size=len(scores)))
    found = shape_scores(scores, groups=groups)
    for group in set(groups):
        mine = [i for i, of in enumerate(groups) if of == group]
        finite = [i for i in mine if math.isfinite(scores[i])]
        values = [scores[i] for i in finite]
        if len(set(values)) > 1:
            np.testing.assert_allclose(found[finite], stats.zscore(values), atol=1e-12)
        else:
            assert not found[finite].any()
        others = [i for i in mine if i not in finite]
        np.testing.assert_array_equal(found[others], [scores[i] for i in others])


@given(SCORES)
def test_centered_ranks_are_scipys(scores):
    found = shape_scores(np.array(scores), "centered_rank")
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    values = [scores[i] for i in finite]
    if len(set(values)) > 1:
        wanted = (stats.rankdata(values) - 1) / (len(values) - 1) - 0.5
        np.testing.assert_allclose(found[finite], wanted, atol=1e-12)
    else:
        assert not found[finite].any()


def test_scores_whose_mean_rounds_have_no_spread():
    assert shape_scores([0.1] * 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", ["zscore", "centered_rank"])
def test_what_sums_round_apart_is_equal(shape):
    assert shape_scores([0.1 + 0.2, 0.3, 0.3], shape).tolist() == [0, 0, 0]
    found = shape_scores([0.1 + 0.2, 0.3, 1.0, 1e-9], shape)
    assert found[0] == found[1] < found[2]
    assert found[3] < found[0]


def test_a_sum_of_rewards_is_not_rounded_apart():
    functions = [lambda completions: [0.1, 0.3], lambda completions: [0.2, 0.0]]
    assert len(set(RewardFunctions(functions)(["a", "b"]).total)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shape="rank"), "shape must be one of"),
        (dict(groups=[0]), "groups must be as many as scores, 2, got 1"),
    ],
)
def test_bad_shapes(options, message):
    with pytest.raises(ValueError, match=message):
        shape_scores([1.0, 2.0], **options)
    with pytest.raises(ValueError, match=r"shape \(B,\)"):
        shape_scores([[1.0, 2.0]])


# ---- reward functions ---------------------------------------------------------------------------


def length(completions):
    return [len(text) for text in completions]


def matches(prompts, completions, answer, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def test_functions_get_what_they_ask_for_and_are_weighted():
    seen = []

    def everything(**columns):
        seen.append(columns)
        return [1.0, 2.0]

    functions = RewardFunctions([length, matches, everything], [1.0, 10.0, 0.5])
    columns = dict(prompts=["p", "q"], completion_ids=[[1], [2]], answer=["b", "cd"], state=7)
    scored = functions(["a", "cd"], **columns)
    assert functions.names == ["length", "matches", "everything"]
    assert scored.each.tolist() == [[1, 0, 1], [2, 1, 2]]
    assert scored.total.tolist() == [1.5, 13.0]
    assert seen == [dict(completions=["a", "cd"], **columns)]


def test_a_function_that_asks_for_something_else_is_told_what_there_is():
    def typo(complations, answer="a"):
        return [0.0]

    message = r"'typo' must ask for \['completions', 'prompts'\] by name, got \['complations'\]"
    with pytest.raises(TypeError, match=message):
        RewardFunctions(typo)(["a"], prompts=["p"])


def test_what_does_not_apply_is_left_out():
    first, second = (lambda completions: [None, 2.0, None]), (lambda completions: [1.0, 3.0, NAN])
    scored = RewardFunctions([first, second], [2.0, 1.0])(["a", "b", "c"])
    np.testing.assert_array_equal(scored.total, [1.0, 7.0, NAN])
    assert np.isnan(scored.each).tolist() == [[True, False], [False, False], [True, True]]


def test_names_are_different():
    functions = [lambda completions: [0.0], lambda completions: [1.0], length]
    assert RewardFunctions(functions).names == ["<lambda>_1", "<lambda>_2", "length"]


def test_a_function_that_raises_says_for_which_completion():
    def fails(completions, answer):
        return [1 / len(text) for text in completions]

    with pytest.raises(RuntimeError, match=r"'fails' raised ZeroDivisionError.*completion 2, ''"):
        RewardFunctions(fails)(["a", "b", ""], answer=["x", "y", "z"])


def test_a_function_that_raises_for_the_batch_only_says_so():
    def fails(completions):
        if len(completions) > 1:
            raise OSError("busy")
        return [1.0]

    with pytest.raises(RuntimeError, match="OSError: busy; for completions 0 to 1 together"):
        RewardFunctions(fails)(["a", "b"])


def test_a_function_that_raises_is_asked_few_times_again():
    calls = []

    def fails(completions):
        calls.append(len(completions))
        if "bad" in completions:
            raise ValueError("no")
        return [0.0] * len(completions)

    with pytest.raises(RuntimeError, match="completion 37, 'bad'"):
        RewardFunctions(fails)(["good"] * 37 + ["bad"] + ["good"] * 26)
    assert len(calls) <= 1 + 2 * 6


def test_an_interruption_passes_through():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardFunctions(interrupted)(["a"])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "a number for each of 2 completions, got 1"),
        (1.0, TypeError, "must return a list of numbers, got 1.0"),
        ([1.0, "b"], TypeError, "must return a list of numbers, got 'b'"),
        (None, TypeError, "must return a list of numbers, got None"),
    ],
)
def test_bad_results(returned, error, message):
    with pytest.raises(error, match=message):
        RewardFunctions(lambda completions: returned)(["a", "b"])


async def coroutine(completions):
    return [1.0]


class Awaited:
    async def __call__(self, completions):
        return [1.0]


@pytest.mark.parametrize(
    ("functions", "weights", "error", "message"),
    [
        ([], None, ValueError, "at least one function"),
        (length, [1.0, 2.0], ValueError, "as many as reward_funcs, 1, got 2"),
        ("a model", None, TypeError, "must be functions of completions"),
        (3, None, TypeError, "must be functions of completions"),
        (coroutine, None, TypeError, "the coroutine 'coroutine'"),
        (functools.partial(coroutine), None, TypeError, "the coroutine 'coroutine'"),
        (Awaited(), None, TypeError, "the coroutine 'Awaited'"),
    ],
)
def test_bad_functions(functions, weights, error, message):
    with pytest.raises(error, match=message):
        RewardFunctions(functions, weights)


def test_a_module_is_no_function():
    import torch

    with pytest.raises(TypeError, match="call a reward model within one"):
        RewardFunctions(torch.nn.Linear(1, 1))


def test_trls_own_functions():
    rewards = pytest.importorskip("trl.rewards")
    functions = RewardFunctions(
        [rewards.think_format_reward, rewards.get_repetition_penalty_reward(ngram_size=2)]
    )
    texts = ["<think>so</think> it is", "no"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    scored = functions(completions, prompts=texts, completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5]])
    assert scored.each.tolist() == [[1.0, 0.0], [0.0, pytest.approx(-2 / 3)]]
