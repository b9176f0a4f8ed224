"""What ScoreTrainer and its arguments refuse, by name, rule and value."""

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from scored_llama import DATA, config, even, model_of, trainer  # noqa: E402
from tiny_llama import word_tokenizer  # noqa: E402

from zofo_optim.score_trainer import ScoreTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_generations=3), "num_generations must be even"),
        (dict(num_generations=0), "num_generations must be an int >= 1, got 0"),
        (dict(per_device_train_batch_size=6), "a multiple of num_generations x .* 4, got 6"),
        (dict(prompts_per_direction=3), "a multiple of num_generations x .* 12, got 8"),
        (dict(temperature=-1.0), "temperature must be a number >= 0, got -1.0"),
        (dict(temperature="a"), "temperature must be a number >= 0, got 'a'"),
        (dict(top_p=2.0), r"top_p must be in \(0, 1\], got 2.0"),
        (dict(min_p=-1.0), r"min_p must be in \[0, 1\], got -1.0"),
        (dict(generation_kwargs=dict(topp_k=5)), r"fields of GenerationConfig.*got \['topp_k'\]"),
        (dict(generation_kwargs=dict(eos_token_id=None)), r"got \['eos_token_id'\]"),
        (dict(beta=-1.0), "beta must be a number >= 0"),
        (dict(scale_rewards="std"), "scale_rewards must be one of"),
        (dict(remove_unused_columns=True), "remove_unused_columns must be False"),
        (dict(num_generations_eval=0), "num_generations_eval must be an int >= 1"),
        (dict(generation_kwargs=dict(num_return_sequences=2)), "num_return_sequences"),
        (
            dict(prompts_per_direction=2, dataloader_drop_last=False),
            "dataloader_drop_last must be True",
        ),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DATA[:1], ValueError, "the 2 prompts of a step, got 1"),
        ([], ValueError, "train_dataset must have prompts, got none"),
        ([{"text": "w3"}] * 4, ValueError, "must have a column 'prompt', got text"),
        ([{"prompt": 3}] * 4, TypeError, "prompt must be a text, or a list of messages"),
        ([{"prompt": [{"content": "w3"}]}] * 4, TypeError, "messages with role and content"),
        (
            [{"prompt": "w3", "completions": "w4"}] * 4,
            ValueError,
            r"must not have columns .*, got \['completions'\]",
        ),
    ],
)
def test_bad_data_sets(tmp_path, data, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, data=data)


def test_a_prompt_without_tokens_is_refused(tmp_path):
    done = trainer(tmp_path, data=[{"prompt": ""}] * 4)
    with pytest.raises(ValueError, match="prompt must have at least one token, got ''"):
        done.train()


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="hybrid must have estimator='antithetic'"):
        trainer(tmp_path, hybrid=dict(estimator="two_sided")).create_optimizer()
    with pytest.raises(ValueError, match="partition must be left out"):
        trainer(tmp_path, partition=dict(budget=0.5))
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args must be a ScoreConfig, got TrainingArguments"):
        ScoreTrainer(model_of(), even, arguments, processing_class=word_tokenizer())
