"""ScoreTrainer: a population of completions a step, in the conventions of TRL's trainers."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import needs_transformers_5, same_bits

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from scored_llama import (  # noqa: E402
    DATA,
    PROMPTS,
    assert_same,
    config,
    contents,
    even,
    logged,
    model_of,
    trainer,
)
from tiny_llama import lora, word_tokenizer  # noqa: E402

from zofo_optim import HybridZOFO, Journal, hybrid_param_groups, replay  # noqa: E402
from zofo_optim.completions import of_a_population  # noqa: E402
from zofo_optim.sampling import common_noise  # noqa: E402
from zofo_optim.score_trainer import ScoreTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# ---- what a step is -------------------------------------------------------------------------


@needs_transformers_5
def test_a_score_rises(tmp_path):
    """Of a real model: how many of its words begin with an s."""
    folder = Path(os.environ.get("ZOFO_DATA") or pytest.skip("ZOFO_DATA is not set"))
    model = str(folder / "models" / "stories260k")

    def words_with_s(completions, **kwargs):
        words = [text.split() for text in completions]
        return [sum(w.startswith("s") for w in some) / max(1, len(some)) for some in words]

    data = [{"prompt": "Once upon a time"}] * 2
    options = dict(max_steps=12, per_device_train_batch_size=128, num_generations=128)
    options |= dict(learning_rate=0.1, max_completion_length=16, num_generations_eval=32)
    done = ScoreTrainer(
        model, words_with_s, config(tmp_path, **options), train_dataset=data, eval_dataset=data[:1]
    )
    before = done.evaluate()["eval_reward"]
    done.train()
    after = done.evaluate()["eval_reward"]
    assert before < 0.15
    assert after > before + 0.25
    assert logged(done, "reward")[-1] > before + 0.2


@pytest.mark.parametrize(("together", "scale"), [(1, "group"), (2, "none")])
def test_steps_are_those_of_a_plain_loop(tmp_path, together, scale):
    """By hand: the same rows, the same noise, the same scores."""
    options = dict(prompts_per_direction=together, scale_rewards=scale)
    done = trainer(tmp_path, options=dict(options, max_steps=2))
    tokenizer, model = word_tokenizer(), model_of().requires_grad_(False).eval()
    transformers.set_seed(1)
    batches = list(done.get_train_dataloader())
    transformers.set_seed(1)
    done.train()

    optimizer = HybridZOFO(
        hybrid_param_groups(
            model, zo=dict(lr=1e-2, mu=2e-2, maximize=True), directions="per_example", verbose=False
        ),
        structure="low_rank",
        perturbation="streamed",
        directions="per_example",
        estimator="antithetic",
        zo_rule="normalized",
        examples_per_direction=together,
        seed=1,
    )
    seen = []

    def closure():
        numbers = of_a_population(len(batch), 4, together)
        texts = [batch[i]["prompt"] for i in numbers]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        prompts.pop("token_type_ids", None)
        with common_noise(optimizer):
            made = model.generate(
                **prompts, do_sample=True, max_new_tokens=6, top_k=0, eos_token_id=[1, 2]
            )
        made = made[:, prompts["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        scores = torch.tensor(even(texts), dtype=torch.float64)
        seen.append(scores.tolist())
        if scale == "group":
            groups = torch.tensor(numbers)
            for group in groups.unique():
                mine = scores[groups == group]
                spread = mine.std(unbiased=False)
                scores[groups == group] = (mine - mine.mean()) / spread if spread else mine * 0
        return scores.tolist()

    optimizer.verify(lambda: model(torch.arange(3, 11).view(-1, 1)).logits[:, -1, 5].double())
    transformers.set_seed(1)
    list(done.get_train_dataloader())  # the sampler draws
    for batch in batches:  # noqa: B007  # closure reads it
        optimizer.step(closure)
    found = logged(done, "rewards/even/mean")
    assert found == pytest.approx([sum(some) / len(some) for some in seen], abs=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(done.model.get_parameter(name).data, p.data)


def test_rows_are_directions_then_sides_then_prompts():
    assert of_a_population(2, 4, 1) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert of_a_population(4, 2, 2) == [0, 1, 0, 1, 2, 3, 2, 3]


def test_a_step_generates_once(tmp_path, monkeypatch):
    done = trainer(tmp_path)
    calls, generate = [], done.model.generate

    def counted(*args, **kwargs):
        calls.append(kwargs["generation_config"].max_new_tokens)
        return generate(*args, **kwargs)

    monkeypatch.setattr(done.model, "generate", counted)
    done.train()
    assert calls.count(6) == 3
    assert set(calls) == {2, 6}  # the verification takes two tokens
    assert calls[-3:] == [6, 6, 6]


def test_micro_batches_have_directions_of_their_own(tmp_path):
    done = trainer(tmp_path, options=dict(gradient_accumulation_steps=2, max_steps=1))
    told = []
    before = contents(done.model)

    class Told(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            told.append(done.hybrid_optimizer.accumulated.shape)

    done.add_callback(Told())
    done.train()
    assert told == [(1, 8)]  # of 2 x 8 completions
    assert not all(same_bits(before[n], p) for n, p in done.model.named_parameters())


def test_other_splits_of_a_population_agree(tmp_path):
    """One batch of four prompts, or four micro-batches of one: in fp64, decoded greedily."""
    found = []
    for parts in (1, 4):
        options = dict(gradient_accumulation_steps=parts, per_device_train_batch_size=16 // parts)
        options |= dict(temperature=0.0, max_steps=2, learning_rate=0.1)
        done = trainer(tmp_path, model=model_of(double=True), options=options, zo=dict(mu=0.3))
        done.train()
        assert not any(
            same_bits(p, contents(model_of(True))[n]) for n, p in contents(done.model).items()
        )
        found.append(contents(done.model))
    for name, p in found[0].items():
        torch.testing.assert_close(p, found[1][name], rtol=1e-9, atol=1e-11)


def test_pairs_draw_the_same_noise_unless_told_otherwise(tmp_path):
    same = []

    def pairs(completions, **kwargs):
        same.append(sum(a == b for a, b in zip(completions[::2], completions[1::2], strict=True)))
        return [0.0] * len(completions)

    for noise in (True, False):
        options = dict(common_noise=noise, max_steps=1)
        trainer(tmp_path, pairs, options=options, zo=dict(mu=1e-6)).train()
    assert same == [4, 0]


# ---- rewards ----------------------------------------------------------------------------------


def test_reward_functions_see_columns_as_in_trl(tmp_path):
    seen = {}

    def bonus(prompts, completions, completion_ids, bonus, trainer_state, log_metric, **kwargs):
        seen.update(prompts=prompts, bonus=bonus, step=trainer_state.global_step)
        assert all(len(ids) <= 6 for ids in completion_ids)
        log_metric("bonus_seen", 2.5)
        return [float(b) for b in bonus]

    options = dict(reward_weights=[1.0, 10.0], max_steps=1, scale_rewards="batch")
    done = trainer(tmp_path, [even, bonus], options=options)
    done.train()
    assert [PROMPTS[b] for b in seen["bonus"]] == seen["prompts"]
    assert seen["step"] == 0
    (reward,), (first,), (second,) = (
        logged(done, key) for key in ("reward", "rewards/even/mean", "rewards/bonus/mean")
    )
    assert reward == pytest.approx(first + 10 * second, rel=1e-4)
    assert logged(done, "bonus_seen") == [2.5]
    assert logged(done, "loss") == [pytest.approx(-reward, rel=1e-3)]


def test_a_reward_function_that_raises_leaves_the_weights(tmp_path):
    def fails(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            raise ValueError("no compiler")
        return even(completions)

    done = trainer(tmp_path, fails)
    kept = []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            kept.append(contents(done.model))

    done.add_callback(Keep())
    with pytest.raises(
        RuntimeError, match="'fails' raised ValueError: no compiler; for completion 0"
    ):
        done.train()
    assert len(kept) == 1
    assert_same(kept[0], contents(done.model))


def test_a_pair_without_a_reward_counts_nothing(tmp_path):
    def some(completions, **kwargs):
        return [math.inf, *[1.0] * (len(completions) - 2), None]

    done = trainer(tmp_path, some, options=dict(max_steps=1, scale_rewards="none"))
    before = contents(done.model)
    done.train()
    assert logged(done, "completions/unscored") == [2.0]
    assert logged(done, "skipped_steps") == [1]
    assert_same(before, contents(done.model))  # the others are equal


def test_rewards_that_are_none_are_told_of(tmp_path):
    done = trainer(tmp_path, lambda completions, **kwargs: [None] * len(completions))
    before = contents(done.model)
    with pytest.warns(UserWarning, match="none of the completions a finite reward"):
        done.train()
    assert_same(before, contents(done.model))


def test_prompts_of_equal_rewards_teach_nothing(tmp_path):
    done = trainer(tmp_path, lambda completions, **kwargs: [0.1] * len(completions))
    before = contents(done.model)
    done.train()
    assert_same(before, contents(done.model))
    assert logged(done, "frac_reward_zero_std") == [1.0] * 3


@pytest.mark.parametrize("scale", ["group", "batch", "centered_rank", "none"])
def test_scales(tmp_path, scale):
    done = trainer(tmp_path, options=dict(scale_rewards=scale))
    before = contents(done.model)
    done.train()
    assert not all(same_bits(before[n], p) for n, p in done.model.named_parameters())


TEMPLATE = (
    "{% for m in messages %}{{ 'w60 ' if m['role'] == 'user' else 'w61 ' }}{{ m['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}w61{% endif %}"
)


def test_conversations_go_through_the_chat_template(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    seen = []

    def talk(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return even([message["content"] for (message,) in completions])

    data = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    done = trainer(tmp_path, talk, data=data, tokenizer=tokenizer, options=dict(max_steps=1))
    encoded = done._writer.encode(data[0]["prompt"])
    assert encoded == [60, 3, 4, 5, 61]
    goes_on = [*data[0]["prompt"], {"role": "assistant", "content": "w9"}]
    assert done._writer.encode(goes_on) == [60, 3, 4, 5, 61, 9]
    done.train()
    ((prompts, completions),) = seen
    assert prompts[0] in [example["prompt"] for example in data]
    assert all(message["role"] == "assistant" for (message,) in completions)


# ---- KL -----------------------------------------------------------------------------------------


def test_the_start_is_copied_only_for_a_divergence(tmp_path):
    assert trainer(tmp_path).ref_model is None
    done = trainer(tmp_path, options=dict(beta=0.1))
    assert done.ref_model is not None
    before = contents(done.ref_model)
    assert_same(before, contents(done.model))
    done.train()
    assert_same(before, contents(done.ref_model))
    assert len(logged(done, "kl")) == 3
    assert trainer(tmp_path, options=dict(beta=0.1), eval_dataset=DATA).evaluate()["eval_kl"] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_generation(tmp_path, temperature):
    """With prompts of different lengths, padded on the left, and texts that end early."""
    model = model_of(double=True).requires_grad_(False).eval()
    done = trainer(tmp_path, model=model, options=dict(temperature=temperature))
    writer = done._writer
    rows = done._rows(DATA, [0, 1, 2, 3, 3])
    torch.manual_seed(3)
    made = model.generate(
        **writer.batch(rows, model.device),
        generation_config=writer.config,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=20,
    )
    width = writer.batch(rows, model.device)["input_ids"].shape[1]
    tokens = made.sequences[:, width:]
    lengths = [3, 6, 1, 4, 2]
    cut = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    scores = model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    wanted = torch.stack([row[:n].sum() for row, n in zip(scores, lengths, strict=True)])
    found = writer.log_probs(model, rows, cut, model.device)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-5)


def test_the_divergence_is_of_the_displaced_model(tmp_path):
    """Each row's log p is that of its own displacement; beta takes it from the reward."""
    from zofo_kernels import perturb_

    model = model_of(double=True)
    start = copy.deepcopy(model).requires_grad_(False).eval()
    seen, scored = {}, []

    def zero(completions, completion_ids, **kwargs):
        seen["tokens"] = completion_ids
        return [0.0] * len(completions)

    options = dict(beta=0.5, max_steps=1, scale_rewards="none")
    done = trainer(tmp_path, zero, model=model, options=options, zo=dict(mu=0.1))
    scaled = done._scaled
    done._scaled = lambda reward, rows: scored.append((reward, rows)) or scaled(reward, rows)
    places = {}

    class Ask(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            places["all"] = done.hybrid_optimizer.ask(8)
            places["group"] = done.hybrid_optimizer.zo_groups()[0]

    done.add_callback(Ask())
    done.train()
    ((reward, rows),) = scored
    for row, at in enumerate(places["all"]):
        moved = copy.deepcopy(start)
        (shift,) = at.shifts
        params = [moved.get_parameter(name) for name in places["group"].names]
        perturb_(params, shift.direction, shift.scale, indices=places["group"].indices)
        alone = rows._replace(tokens=[rows.tokens[row]])
        ours, theirs = (
            done._writer.log_probs(m, alone, [seen["tokens"][row]], start.device).item()
            for m in (moved, start)
        )
        length = len(seen["tokens"][row])
        assert reward[row] == pytest.approx(-0.5 * (ours - theirs) / length, abs=1e-6)
    assert max(abs(reward)) > 0.002


# ---- saving, resuming, evaluating ---------------------------------------------------------------


def test_resuming_goes_on_to_the_bit(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path / "a", options=options)
    whole.train()
    part = trainer(tmp_path / "b", options=options)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    part.add_callback(Stop())
    part.train()
    rest = trainer(tmp_path / "b", options=options)
    rest.train(resume_from_checkpoint=True)
    assert_same(contents(whole.model), contents(rest.model))
    assert logged(whole, "reward")[2:] == logged(rest, "reward")[2:]


def test_the_same_seed_gives_the_same_weights(tmp_path):
    found = []
    for seed in (1, 1, 2):
        done = trainer(tmp_path, options=dict(seed=seed))
        done.train()
        found.append(contents(done.model))
    assert_same(found[0], found[1])
    assert not all(same_bits(p, found[2][name]) for name, p in found[0].items())


def test_evaluations_change_nothing(tmp_path):
    plain = trainer(tmp_path / "a")
    plain.train()
    options = dict(eval_strategy="steps", eval_steps=1, num_generations_eval=3)
    often = trainer(tmp_path / "b", options=options, eval_dataset=DATA[:3])
    first = often.evaluate()
    assert first["eval_reward"] == often.evaluate()["eval_reward"]
    often.train()
    assert_same(contents(plain.model), contents(often.model))
    assert len(logged(often, "eval_reward")) == 3
    assert len(logged(often, "reward")) == 3


def test_best_weights_are_loaded(tmp_path):
    options = dict(
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        learning_rate=0.05,
    )
    done = trainer(tmp_path, options=options, eval_dataset=DATA)
    done.train()
    rewards = logged(done, "eval_reward")
    assert done.state.best_metric == max(rewards)
    assert done.evaluate()["eval_reward"] == max(rewards)


def test_journals_replay(tmp_path):
    done = trainer(tmp_path)
    before = contents(done.model)
    done.create_optimizer()
    with Journal(tmp_path / "j").attach(done.hybrid_optimizer):
        done.train()
    assert replay(before, tmp_path / "j").verified
    assert_same(before, contents(done.model))


def test_completions_are_kept_as_a_table(tmp_path, capsys):
    def extra(completions, log_extra, **kwargs):
        log_extra("size", [len(text) for text in completions])
        return even(completions)

    options = dict(log_completions=True, num_completions_to_print=2, max_steps=2)
    trainer(tmp_path, [even, extra], options=options).train()
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == [f"completions_0000{i}.parquet" for i in (1, 2)]
    table = datasets.Dataset.from_parquet(str(files[0]), cache_dir=str(tmp_path / "cache"))
    assert table.column_names == [
        "step",
        "prompt",
        "completion",
        "even",
        "extra",
        "total_reward",
        "size",
    ]
    assert len(table) == 8
    assert table["size"][0] == len(table["completion"][0])
    assert "Step 2" in capsys.readouterr().out


# ---- models -------------------------------------------------------------------------------------


def t5():
    torch.manual_seed(0)
    size = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **size
        )
    )


def test_encoder_decoders(tmp_path):
    done = trainer(tmp_path, model=t5(), options=dict(beta=0.1))
    before = contents(done.model)
    done.train()
    assert not all(same_bits(before[n], p) for n, p in done.model.named_parameters())
    model = done.model.eval()
    rows = done._rows(DATA, [0, 1])
    batch = done._writer.batch(rows, model.device)
    made = model.generate(
        **batch,
        generation_config=done._writer.config,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = [done._writer._until_the_end(row) for row in made.sequences[:, 1:].tolist()]
    scores = model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    wanted = torch.stack([row[: len(some)].sum() for row, some in zip(scores, tokens, strict=True)])
    found = done._writer.log_probs(model, rows, tokens, model.device)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_was_frozen_stays(tmp_path):
    model = model_of()
    model.model.embed_tokens.requires_grad_(False)
    before = contents(model)
    done = trainer(tmp_path, model=model, exclude="norm")
    done.train()
    for name, p in done.model.named_parameters():
        stays = "embed" in name or "norm" in name
        assert same_bits(before[name], p) is stays, name
        assert not p.requires_grad


def test_a_frozen_model_trains_whole(tmp_path):
    model = model_of().requires_grad_(False)
    before = contents(model)
    trainer(tmp_path, model=model).train()
    assert not any(same_bits(before[name], p) for name, p in model.named_parameters())


def test_adapters_that_train_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not have an adapter that trains"):
        trainer(tmp_path, model=lora())
    trainer(tmp_path, model=lora().requires_grad_(False)).train()


def test_dropout_is_off(tmp_path):
    config = copy.deepcopy(model_of().config)
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    seen = []

    def pairs(completions, **kwargs):
        seen.append(all(a == b for a, b in zip(completions[::2], completions[1::2], strict=True)))
        return [0.0] * len(completions)

    trainer(tmp_path, pairs, model=model, zo=dict(mu=1e-6)).train()
    assert seen == [True] * 3


def test_a_name_brings_model_and_tokenizer(tmp_path):
    model_of().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    done = ScoreTrainer(
        str(tmp_path / "model"), even, config(tmp_path, max_steps=1), train_dataset=DATA
    )
    done.train()
    other = ScoreTrainer(done.model, even, config(tmp_path), train_dataset=DATA)
    assert other.processing_class.vocab_size == 64
