"""A population in one generate(): each row decodes under the direction that is its own."""

import copy

import pytest
import torch
from scipy import stats

from zofo_kernels import perturb_
from zofo_optim import HybridZOFO, common_noise, hybrid_param_groups

transformers = pytest.importorskip("transformers")

EOS, PAD = 7, 0
PROMPTS = torch.tensor([[5, 9, 3, 11], [0, 0, 8, 2], [0, 4, 4, 10]])
"""Padded on the left."""
PAIRED = dict(
    structure="low_rank",
    perturbation="streamed",
    directions="per_example",
    estimator="antithetic",
)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).double().requires_grad_(False).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=24,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        initializer_factor=3.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return transformers.T5ForConditionalGeneration(config).double().requires_grad_(False).eval()


def optimizer_of(model, mu=0.05, **options):
    groups = hybrid_param_groups(
        model, dict(lr=0.1, mu=mu), directions="per_example", verbose=False
    )
    return HybridZOFO(groups, seed=5, **{**PAIRED, **options})


def displaced(model, optimizer, row, each):
    """A copy whose weights are those that the row must see."""
    (group,) = optimizer.zo_groups()
    sample, second = divmod(row // each, 2)
    moved = copy.deepcopy(model)
    params = dict(moved.named_parameters())
    perturb_(
        [params[name] for name in group.names],
        group.direction(sample),
        -group.mu if second else group.mu,
        indices=group.indices,
    )
    return moved


def until_the_end(tokens):
    """Without what comes after the end of a text."""
    tokens = tokens.tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


class Generated:
    """A closure that keeps the tokens of its runs; its score is that of any text."""

    def __init__(self, model, prompts, **options):
        self.model, self.prompts, self.options, self.seen = model, prompts, options, []

    def __call__(self):
        made = self.model.generate(
            self.prompts,
            attention_mask=self.prompts.ne(PAD).long(),
            max_new_tokens=8,
            **self.options,
        )
        start = 0 if self.model.config.is_encoder_decoder else self.prompts.shape[1]
        self.seen.append(made[:, start:])
        return [float(sum(until_the_end(row))) for row in self.seen[-1]]


WAYS = {
    "greedy": dict(do_sample=False),
    "static cache": dict(do_sample=False, cache_implementation="static"),
    "no cache": dict(do_sample=False, use_cache=False),
    "beams": dict(do_sample=False, num_beams=3),
}


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("make", "way"), [*((llama, way) for way in WAYS), (t5, "greedy")])
def test_each_row_decodes_as_it_would_alone(make, way, each):
    model = make()
    prompts = PROMPTS.repeat(4, 1) if each == 3 else PROMPTS.repeat_interleave(2, 0)
    mu = 0.05 if make is llama else 0.3
    optimizer = optimizer_of(model, mu, examples_per_direction=each)
    closure = Generated(model, prompts, **WAYS[way])
    optimizer.backward(closure)  # and verify
    optimizer.zero_grad()
    closure.seen.clear()
    optimizer.backward(closure)
    (tokens,) = closure.seen  # one evaluation
    at_rest = Generated(model, prompts, **WAYS[way])
    at_rest()
    changed = 0
    for row, made in enumerate(tokens):
        prompt = prompts[row][prompts[row] != PAD][None]
        alone = Generated(displaced(model, optimizer, row, each), prompt, **WAYS[way])
        alone()
        assert until_the_end(made) == until_the_end(alone.seen[0][0])
        changed += until_the_end(made) != until_the_end(at_rest.seen[0][row])
    assert changed >= 2
    if make is llama and way != "beams":  # some end early
        assert len({len(until_the_end(row)) for row in tokens}) > 1


def test_returned_sequences_are_rows():
    model = llama()
    optimizer = optimizer_of(model)
    closure = Generated(model, PROMPTS, do_sample=True, num_return_sequences=2)
    optimizer.backward(closure)
    assert optimizer.accumulated.shape == (1, 3)


def test_the_same_seeds_give_the_same_completions_and_weights():
    found = []
    for _ in range(2):
        model = llama()
        optimizer = optimizer_of(model)
        closure = Generated(model, PROMPTS.repeat_interleave(2, 0), do_sample=True)
        torch.manual_seed(3)
        optimizer.step(closure)
        found.append((closure.seen[0], [p.clone() for p in model.parameters()]))
    (tokens, weights), (tokens_again, weights_again) = found
    assert torch.equal(tokens, tokens_again)
    assert all(map(torch.equal, weights, weights_again))


# ---- common noise -------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 3])
def test_pairs_draw_the_same_noise(each):
    model = llama()
    optimizer = optimizer_of(model, examples_per_direction=each)
    prompts = PROMPTS.repeat(2, 1) if each == 3 else PROMPTS.repeat_interleave(2, 0)
    closure = Generated(model, prompts, do_sample=True)
    with common_noise(optimizer):
        closure()  # undisplaced: both sides are the same model
    plus, minus = closure.seen[0].view(-1, 2, each, closure.seen[0].shape[1]).unbind(1)
    assert torch.equal(plus, minus)
    assert len({tuple(row) for row in plus.flatten(0, 1).tolist()}) == 3


def test_draws_follow_the_probabilities_after_temperature_and_top_p():
    """Of each side by itself; chi-squared."""
    model, many = llama(), 4000
    optimizer = optimizer_of(model)
    prompts = PROMPTS[:1].repeat(2 * many, 1)
    options = dict(do_sample=True, temperature=1.5, top_p=0.9)
    torch.manual_seed(1)
    with common_noise(optimizer):
        made = model.generate(prompts, max_new_tokens=1, **options)[:, -1].view(many, 2)
    logits = model(PROMPTS[:1]).logits[:, -1] / 1.5
    warped = transformers.TopPLogitsWarper(0.9)(PROMPTS[:1], logits)
    wanted = warped.softmax(-1)[0]
    kept = wanted > 0
    assert 3 < kept.sum() < 24
    for side in made.unbind(1):
        counts = torch.bincount(side, minlength=24)
        assert counts[~kept].sum() == 0
        test = stats.chisquare(counts[kept], many * wanted[kept] / wanted[kept].sum())
        assert test.pvalue > 1e-3


def test_rows_of_an_example_draw_noise_of_their_own():
    optimizer = optimizer_of(llama())
    p = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).expand(16, -1)
    with common_noise(optimizer, rows=4):  # 4 examples, 2 pairs
        drawn = torch.multinomial(input=p, num_samples=1).view(2, 2, 4)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert len(set(drawn[:, 0].flatten().tolist())) > 4


def test_probabilities_that_are_none_are_refused():
    p = torch.ones(4, 3)
    p[1, 2] = float("nan")
    with common_noise(optimizer_of(llama())), pytest.raises(ValueError, match="finite and >= 0"):
        torch.multinomial(p, 1)


def test_rows_must_be_a_number():
    with pytest.raises(ValueError, match="rows must be an int >= 1, got 0"):
        common_noise(optimizer_of(llama()), rows=0)


def test_common_noise_is_for_pairs():
    with pytest.raises(ValueError, match="optimizer must have estimator='antithetic'"):
        common_noise(optimizer_of(llama(), estimator="two_sided"))


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: torch.multinomial(p[:3], 1),
        lambda p: torch.multinomial(p, 2),
        lambda p: torch.multinomial(p[0], 1),
        lambda p: p.multinomial(1, generator=torch.Generator().manual_seed(2)),
    ],
)
def test_other_draws_are_left_as_they_are(draw):
    optimizer = optimizer_of(llama())
    p = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    wanted = draw(p)
    torch.manual_seed(0)
    with common_noise(optimizer):
        assert torch.equal(draw(p), wanted)
