"""A trainer of scores whose completions come from an engine."""

import pytest
import torch
from served_llama import MATRICES, CopyEngine, Letters, llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

from conftest import same_bits  # noqa: E402

from zofo_optim.score_trainer import ScoreConfig, ScoreTrainer  # noqa: E402

DATA = [{"prompt": "ab"}, {"prompt": "c"}, {"prompt": "def"}]


def large(completion_ids, **columns):
    return [sum(tokens) / len(tokens) / 128 for tokens in completion_ids]


def trainer(folder, engine=None, rewards=large, **options):
    chosen = dict(
        max_steps=3,
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=5,
        temperature=0.0,
        scale_rewards="none",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return ScoreTrainer(
        llama(hidden_size=32, intermediate_size=48).double(),
        rewards,
        ScoreConfig(str(folder), **{**chosen, **options}),
        train_dataset=DATA,
        eval_dataset=DATA,
        processing_class=Letters(),
        include=MATRICES,
        zo=dict(mu=0.1),
        engine=engine,
    )


def test_an_engine_gives_what_this_process_gives(tmp_path):
    here, there = trainer(tmp_path), trainer(tmp_path, engine := CopyEngine())
    start = llama(hidden_size=32, intermediate_size=48).double()
    for done in (here, there):
        done.train()
    moved = 0
    for name, p in here.model.named_parameters():
        torch.testing.assert_close(there.model.get_parameter(name), p, rtol=1e-9, atol=1e-11)
        assert same_bits(engine.served.get_parameter(name), there.model.get_parameter(name).data)
        moved += not same_bits(start.get_parameter(name).data, p.data)
    assert moved > 10
    assert there.evaluate()["eval_reward"] == here.evaluate()["eval_reward"]


def test_what_is_loaded_reaches_the_engine(tmp_path):
    options = dict(
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
    )
    done = trainer(tmp_path, engine := CopyEngine(), **options)
    done.train()
    assert engine.calls == [True]


def test_a_reward_function_that_raises_leaves_both_weights(tmp_path):
    def fails(completions, **columns):
        raise OSError("no compiler")

    done = trainer(tmp_path, engine := CopyEngine(), fails)
    with pytest.raises(RuntimeError, match="OSError: no compiler; for completion 0"):
        done.train()
    start = llama(hidden_size=32, intermediate_size=48).double()
    for name, p in start.named_parameters():
        assert same_bits(done.model.get_parameter(name).data, p.data)
        assert same_bits(engine.served.get_parameter(name).data, p.data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beta=0.1), "beta must be 0 with an engine, got 0.1"),
        (dict(common_noise=False), "common_noise must be True with an engine"),
    ],
)
def test_what_engines_cannot_do(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, CopyEngine(), **options)
