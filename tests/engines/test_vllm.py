"""vLLM serves populations as this process would evaluate them, and its weights follow."""

import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not here: make vllm makes an environment with it")

import vllm
from served_llama import Letters, displaced_to, greedy, llama, of_groups, population, prompts
from transformers import GenerationConfig

from zofo_optim import Cycle
from zofo_optim.engines import VLLMEngine, vllm_options
from zofo_optim.engines.vllm import sampling_of

GREEDY = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SAMPLED = vllm.SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
ROWS = prompts(8)
RANK = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    llama().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def llm(folder):
    llm = vllm.LLM(
        folder,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 28,
        skip_tokenizer_init=True,
        **vllm_options(rank=RANK, max_loras=4),  # fewer than a population has: some wait
    )
    yield llm
    del llm


@pytest.fixture
def model():
    return llama()


@pytest.fixture
def serve(llm, model):
    """Makes an engine that serves the saved weights anew."""
    engines = []

    def attached(optimizer, of=model):
        engines.append(VLLMEngine(llm))
        return engines[-1].attach(optimizer, of)

    yield attached
    for engine in engines:
        engine.close()


def step(engine, optimizer):
    """One for which completions of small tokens are best."""
    displaced = optimizer.ask(len(ROWS))
    completions = engine.generate(ROWS, displaced, SAMPLED)
    optimizer.tell([-sum(tokens) / len(tokens) for tokens in completions])
    optimizer.step()
    return completions


def test_generation_options_of_transformers_are_understood(model, serve):
    engine = serve(population(model, rank=RANK))
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert engine.generate(ROWS, None, config) == engine.generate(ROWS, None, GREEDY)
    sampled = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=0.7, top_p=0.9)
    found = sampling_of(sampled)
    assert (found.max_tokens, found.temperature, found.top_p) == (12, 0.7, 0.9)
    twice = [engine.generate(ROWS, None, sampled, list(range(8))) for _ in range(2)]
    assert twice[0] == twice[1] != engine.generate(ROWS, None, sampled, list(range(8, 16)))
    whole = GenerationConfig(
        max_new_tokens=12, use_cache=True, output_attentions=False, num_beams=1
    )
    assert sampling_of(whole).max_tokens == 12  # what a model's own has beside
    with pytest.raises(ValueError, match=r"such as vLLM has too, got \['num_beams'\]"):
        sampling_of(GenerationConfig(max_new_tokens=12, num_beams=3))


def here(model):
    return [greedy(model, prompt, 12) for prompt in ROWS]


def test_rows_are_completed_as_by_the_displaced_model(model, serve):
    optimizer = population(model, rank=RANK)
    engine = serve(optimizer)
    displaced = optimizer.ask(len(ROWS))
    served = engine.generate(ROWS, displaced, GREEDY)
    for prompt, at, tokens in zip(ROWS, displaced, served, strict=True):
        with displaced_to(optimizer, at.shifts):
            assert tokens == greedy(model, prompt, 12)
    at_rest = engine.generate(ROWS, None, GREEDY)
    assert at_rest == here(model)
    assert sum(a != b for a, b in zip(served, at_rest, strict=True)) > len(ROWS) // 2


def test_the_served_weights_follow_the_updates_to_the_bit(model, serve):
    optimizer = population(model, rank=RANK, zo=dict(weight_decay=0.01))
    engine = serve(optimizer)
    start = engine.generate(ROWS, None, GREEDY)
    first = engine.fingerprints()
    for _ in range(3):
        step(engine, optimizer)
    marks = engine.fingerprints()
    assert all(here == there for here, there in marks.values())
    assert all(marks[name] != first[name] for name in first)
    served = engine.generate(ROWS, None, GREEDY)
    assert served == here(model)
    assert served != start


def test_a_large_update_changes_completions_also_of_displaced_rows(model, serve):
    optimizer = population(model, rank=RANK, zo=dict(lr=3.0), zo_rule="normalized")
    engine = serve(optimizer)
    before = engine.generate(ROWS, None, GREEDY)
    step(engine, optimizer)
    after = engine.generate(ROWS, None, GREEDY)
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert after == here(model)
    displaced = optimizer.ask(len(ROWS))
    for prompt, at, tokens in zip(
        ROWS, displaced, engine.generate(ROWS, displaced, GREEDY), strict=True
    ):
        with displaced_to(optimizer, at.shifts):
            assert tokens == greedy(model, prompt, 12)


def test_both_sides_of_a_direction_draw_the_same_noise(model, serve):
    optimizer = population(model, rank=RANK, zo=dict(mu=1e-7))
    engine = serve(optimizer)
    displaced = optimizer.ask(len(ROWS))
    rows = [ROWS[0]] * len(ROWS)
    found = engine.generate(rows, displaced, SAMPLED)
    assert found[0::2] == found[1::2]
    assert len({tuple(tokens) for tokens in found}) == len(ROWS) // 2
    assert engine.generate(rows, displaced, SAMPLED) == found  # and again


def test_two_groups_of_which_parts_move(model, serve):
    layers = [
        {n: p for n, p in model.named_parameters() if f"layers.{i}." in n and "proj" in n}
        for i in range(2)
    ]
    groups = [
        dict(params=list(layer.values()), param_names=list(layer), mode="zo", mu=mu, lr=lr)
        for layer, mu, lr in zip(layers, (0.05, 0.1), (0.05, 0.02), strict=True)
    ]
    optimizer = of_groups(groups, rank=1, active=Cycle(["attn", "mlp"]))
    engine = serve(optimizer)
    for _ in range(2):
        displaced = optimizer.ask(len(ROWS))
        served = engine.generate(ROWS, displaced, GREEDY)
        for prompt, at, tokens in zip(ROWS, displaced, served, strict=True):
            with displaced_to(optimizer, at.shifts):
                assert tokens == greedy(model, prompt, 12)
        step(engine, optimizer)
    assert all(here == there for here, there in engine.fingerprints().values())


def test_loaded_weights_are_served(model, serve):
    optimizer = population(model, rank=RANK)
    engine = serve(optimizer)
    saved = {name: p.clone() for name, p in model.state_dict().items()}, optimizer.state_dict()
    first = step(engine, optimizer)
    step(engine, optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert engine.generate(ROWS, None, GREEDY) == here(model)
    assert step(engine, optimizer) == first
    assert all(here == there for here, there in engine.fingerprints().values())


def test_weights_that_were_changed_by_hand_are_served_when_asked_for(model, serve):
    engine = serve(population(model, rank=RANK))
    before = engine.generate(ROWS, None, GREEDY)
    model.model.layers[1].mlp.down_proj.weight.mul_(3)
    assert engine.generate(ROWS, None, GREEDY) == before
    engine.synchronise(compare=True)
    after = engine.generate(ROWS, None, GREEDY)
    assert after == here(model) != before


def test_nothing_stays_behind(model, llm, serve):
    optimizer = population(model, rank=RANK)
    engine = serve(optimizer)
    step(engine, optimizer)
    folder = engine._folder
    assert folder.is_dir()
    assert os.listdir(folder) == []
    assert not llm.llm_engine.list_loras()
    engine.close()
    assert not folder.exists()
    assert engine not in optimizer.listeners


def test_other_weights_than_the_models_are_refused(serve):
    other = llama()
    other.model.norm.weight.mul_(1.5)  # one that is not trained
    with pytest.raises(
        ValueError, match=r"differ: model\.norm\.weight; call model\.save_pretrained"
    ):
        serve(population(other, rank=RANK), other)


def test_ranks_that_do_not_fit_are_refused(model, serve):
    with pytest.raises(ValueError, match=r"vllm_options\(rank=64\).*max_lora_rank=8"):
        serve(population(model, rank=64))


def test_an_llm_that_was_made_otherwise_is_refused(llm, monkeypatch):
    config = llm.llm_engine.vllm_config
    for part, name, value, message in (
        (config, "lora_config", None, r"vllm\.LLM\(\.\.\., \*\*vllm_options\(\)\)"),
        (config.parallel_config, "worker_extension_cls", "", "vllm_options"),
        (config.parallel_config, "tensor_parallel_size", 2, "tensor_parallel_size=1, got 2"),
        (config.parallel_config, "data_parallel_size", 2, "data_parallel_size=1, got 2"),
        (config.model_config, "quantization", "fp8", "must not be quantised, got 'fp8'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, value)
            with pytest.raises(ValueError, match=message):
                VLLMEngine(llm)


def test_sampling_that_cannot_be_is_refused(model, serve):
    optimizer = population(model, rank=RANK)
    engine = serve(optimizer)
    displaced = optimizer.ask(len(ROWS))
    with pytest.raises(ValueError, match="n=1, a completion a row, got n=2"):
        engine.generate(ROWS, None, vllm.SamplingParams(n=2))
    with pytest.raises(ValueError, match="no seed where rows are displaced"):
        engine.generate(ROWS, displaced, vllm.SamplingParams(seed=1))


def test_updates_that_would_not_be_served_are_found(model, llm, monkeypatch):
    """As where a server keeps packed copies of its weights."""
    engine = VLLMEngine(llm)
    call = engine._call
    monkeypatch.setattr(
        engine, "_call", lambda name, *a: name != "zofo_displace" and call(name, *a)
    )
    with pytest.raises(ValueError, match="its updates would be lost"):
        engine.attach(population(model, rank=RANK), model)
    engine.close()


def test_a_trainer_of_scores_and_its_resumption(llm, tmp_path):
    """The served weights follow; what a checkpoint holds reaches the worker."""
    from transformers import TrainerCallback

    from zofo_optim.score_trainer import ScoreConfig, ScoreTrainer

    def small(completion_ids, **columns):
        return [-sum(tokens) / len(tokens) for tokens in completion_ids]

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    def trainer(folder, engine, **more):
        args = ScoreConfig(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"prompt": "ab"}, {"prompt": "c"}]
        return ScoreTrainer(
            llama(),
            small,
            args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=Letters(),
            include=r"proj\.weight$",
            engine=engine,
            **more,
        )

    found = []
    for name, runs in (("whole", 1), ("parts", 2)):
        for run in range(runs):
            with VLLMEngine(llm) as engine:
                more = dict(callbacks=[Stop()]) if name == "parts" and run == 0 else {}
                done = trainer(tmp_path / name, engine, **more)
                done.train(resume_from_checkpoint=run == 1)
                marks = engine.fingerprints()
                assert all(here == there for here, there in marks.values())
                assert done.evaluate()["eval_reward"] == done.evaluate()["eval_reward"]
        found.append(marks)
    assert found[0] == found[1]
