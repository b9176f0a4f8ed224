"""Models and generation options that ScoreTrainer takes: each row as it would be alone."""

import copy
import string

import pytest
import torch
from conftest import same_bits

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from scored_llama import DATA, PROMPTS, contents, even, model_of, trainer  # noqa: E402
from tiny_llama import word_tokenizer  # noqa: E402

from zofo_kernels import perturb_  # noqa: E402
from zofo_optim import HybridZOFO, hybrid_param_groups  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOKENS = dict(vocab_size=64, pad_token_id=0, eos_token_id=1, bos_token_id=1)


def gpt2():
    size = dict(n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TOKENS, **size))


def gpt2_with_adapter():
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config).requires_grad_(False)


def bart():
    size = dict(d_model=16, encoder_layers=2, decoder_layers=2, max_position_embeddings=64)
    size |= dict(encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.5)
    size |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, forced_eos_token_id=None)
    config = transformers.BartConfig(**TOKENS, decoder_start_token_id=1, **size)
    return transformers.BartForConditionalGeneration(config)


MODELS = [gpt2, gpt2_with_adapter, bart]


def made(make):
    torch.manual_seed(0)
    return make().double().eval()


@pytest.mark.parametrize("make", MODELS)
def test_rows_beside_others_are_as_alone(tmp_path, make):
    """Greedy completions, and their log p, of prompts that are padded in a batch."""
    model = made(make)
    options = dict(temperature=0.0)
    writer = trainer(tmp_path, model=model, options=options)._writer
    device = torch.device("cpu")
    done = trainer(tmp_path, model=model, options=options)
    rows = done._rows(DATA, [0, 1, 2, 3])
    together = writer.write(model, rows, device)
    log_probs = writer.log_probs(model, rows, together, device)
    assert len({tuple(some) for some in together}) > 1
    for row in range(4):
        alone = done._rows(DATA[row : row + 1], [0])
        assert writer.write(model, alone, device) == [together[row]]
        found = writer.log_probs(model, alone, [together[row]], device)
        torch.testing.assert_close(found[0], log_probs[row])


@pytest.mark.parametrize("make", MODELS)
def test_rows_of_a_population_are_as_their_displacements_alone(tmp_path, make):
    model = made(make)
    start, seen = copy.deepcopy(model), {}

    def keep(completion_ids, prompts, **kwargs):
        seen.update(tokens=completion_ids, prompts=prompts)
        return [float(sum(some)) for some in completion_ids]

    options = dict(temperature=0.0, max_steps=1)
    done = trainer(tmp_path, keep, model=model, options=options, zo=dict(mu=0.2))
    places = {}

    class Ask(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            places["all"] = done.hybrid_optimizer.ask(8)
            places["group"] = done.hybrid_optimizer.zo_groups()[0]

    done.add_callback(Ask())
    done.train()
    changed = 0
    for row, at in enumerate(places["all"]):
        moved = copy.deepcopy(start)
        group, (shift,) = places["group"], at.shifts
        params = [moved.get_parameter(name) for name in group.names]
        perturb_(params, shift.direction, shift.scale, indices=group.indices)
        alone = done._rows([{"prompt": seen["prompts"][row]}], [0])
        (tokens,) = done._writer.write(moved, alone, torch.device("cpu"))
        assert tokens == seen["tokens"][row]
        changed += done._writer.write(start, alone, torch.device("cpu")) != [tokens]
    assert changed >= 2


def test_generation_options_reach_the_generation(tmp_path):
    options = dict(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.05,
        repetition_penalty=1.3,
        cache_implementation="static",
        generation_kwargs=dict(no_repeat_ngram_size=3, num_beams=2),
        max_completion_length=7,
    )
    config = trainer(tmp_path, options=options)._writer.config
    further = options.pop("generation_kwargs")
    wanted = {**options, **further, "max_new_tokens": options.pop("max_completion_length")}
    wanted.pop("max_completion_length")
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.do_sample


def test_the_models_own_options_hold_but_for_beams(tmp_path, monkeypatch):
    model = model_of()
    own = dict(num_beams=4, no_repeat_ngram_size=2, min_p=0.9, temperature=0.1, top_k=1)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    used, prepare = [], model._prepare_generation_config

    def spied(*args, **kwargs):
        found = prepare(*args, **kwargs)
        used.append(found[0] if isinstance(found, tuple) else found)
        return found

    monkeypatch.setattr(model, "_prepare_generation_config", spied)
    trainer(tmp_path, model=model, options=dict(max_steps=1)).train()
    last = used[-1]
    assert (last.num_beams, last.no_repeat_ngram_size) == (1, 2)
    assert (last.temperature, last.top_k, last.do_sample) == (1.0, 0, True)
    assert not last.min_p


def test_texts_end_at_stop_strings(tmp_path):
    seen = []

    def keep(completions, completion_ids, **kwargs):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)  # of bytes: the others' names hold stops
    torch.manual_seed(0)
    config = copy.deepcopy(model_of().config)
    config.vocab_size = len(tokenizer)
    model = transformers.LlamaForCausalLM(config)
    stops = list(string.ascii_letters)  # a fifth of all tokens, so that most texts meet one
    options = dict(generation_kwargs=dict(stop_strings=stops), max_completion_length=40)
    done = trainer(
        tmp_path, keep, model=model, tokenizer=tokenizer, options=dict(options, max_steps=1)
    )
    done.train()
    ended = [text for text, _ in seen if set(text) & set(stops)]
    assert len(ended) >= 3
    assert all(text[-1] in stops and not set(text[:-1]) & set(stops) for text in ended)
    assert all(done._writer.is_complete(tokens) for text, tokens in seen if text in ended)


def test_a_template_takes_its_arguments(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {{ extra }}{% endfor %}"
    data = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    options = dict(chat_template_kwargs=dict(extra="w33"))
    done = trainer(tmp_path, tokenizer=tokenizer, data=data, options=options)
    assert done._writer.encode(data[1]["prompt"]) == [6, 33]


def test_a_processor_has_a_tokenizer(tmp_path):
    class Processor:
        tokenizer = word_tokenizer()

        def save_pretrained(self, folder):
            pass

    done = trainer(tmp_path, tokenizer=Processor(), options=dict(max_steps=1))
    done.train()


def test_weight_decay_is_of_the_weights(tmp_path):
    done = trainer(tmp_path, options=dict(weight_decay=0.1))
    done.create_optimizer()
    assert [group["weight_decay"] for group in done.optimizer.param_groups] == [0.1]


def test_a_second_trainer_leaves_what_the_first_left(tmp_path):
    model = model_of()
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match="prompts of a step"):
        trainer(tmp_path, model=model, data=DATA[:1])
    before = contents(model)
    for _ in range(2):
        trainer(tmp_path, model=model, options=dict(max_steps=1)).train()
    for name, p in model.named_parameters():
        assert same_bits(before[name], p) is ("embed" in name), name


def given(model, **options):
    maximize = options.pop("maximize", True)
    model.requires_grad_(False)
    groups = hybrid_param_groups(
        model, dict(lr=0.01, mu=0.1, maximize=maximize), directions="per_example", verbose=False
    )
    kind = dict(structure="low_rank", perturbation="streamed", directions="per_example")
    return HybridZOFO(groups, **kind, estimator="antithetic", **options)


def test_a_given_optimizer_does_what_the_arguments_say(tmp_path):
    model = model_of()
    before = contents(model)
    trainer(tmp_path, model=model, optimizers=(given(model), None)).train()
    assert not any(same_bits(before[n], p) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="maximize=True, or rewards would fall"):
        trainer(tmp_path, model=model, optimizers=(given(model, maximize=False), None))
    optimizer = given(model, examples_per_direction=2)
    with pytest.raises(ValueError, match=r"examples_per_direction=1, .* got 2"):
        trainer(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="it is prompts_per_direction in args"):
        trainer(tmp_path, hybrid=dict(examples_per_direction=2))


def test_reward_functions_see_torch_as_outside_of_a_step(tmp_path):
    """Models of theirs may learn; the trained model is at its weights."""
    model, found = model_of(), []
    start = contents(model)
    own = torch.nn.Linear(2, 1)

    def learned(completions, **kwargs):
        own(torch.ones(1, 2)).sum().backward()
        weight = model.lm_head.weight
        found.append(torch.nn.functional.linear(torch.eye(16), weight).T)
        return even(completions)

    trainer(tmp_path, learned, model=model, options=dict(max_steps=1)).train()
    assert own.weight.grad is not None
    assert len(found) == 1
    torch.testing.assert_close(found[0], start["lm_head.weight"])
