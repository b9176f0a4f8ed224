"""Losses of examples: their mean is the loss of transformers' models, plain and with peft."""

import functools

import pytest
import torch
from conftest import needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from zofo_optim import (  # noqa: E402
    HybridZOFO,
    example_losses,
    example_losses_of,
    hybrid_param_groups,
)

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
HALVES = dict(
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
)


def llama(kind="ForCausalLM", **options):
    config = transformers.LlamaConfig(intermediate_size=32, **SIZES, **SPECIAL, **options)
    return getattr(transformers, f"Llama{kind}")(config)


def gpt2(**options):
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40, **options
    )
    return transformers.GPT2LMHeadModel(config)


def opt(**options):
    config = transformers.OPTConfig(
        ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32, **SIZES, **SPECIAL
    )
    return transformers.OPTForCausalLM(config)


def bert(kind, **options):
    config = transformers.BertConfig(
        intermediate_size=32, max_position_embeddings=32, **SIZES, **options
    )
    return getattr(transformers, f"Bert{kind}")(config)


def t5(**options):
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart(**options):
    config = transformers.BartConfig(
        d_model=16, vocab_size=40, max_position_embeddings=32, **HALVES, **SPECIAL,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def ragged(*shape, high=40, seed=0):
    """Labels of which rows have different numbers; the last has none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, high, shape, generator=generator)
    for row, targets in enumerate(labels):
        targets[: row + 1] = -100
    labels[-1] = -100
    return labels


def texts(labels, **more):
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=labels, **more)


TOKENS = functools.partial(ragged, 3, 7)
MODELS = {
    "llama": (llama, TOKENS()),
    "gpt2": (gpt2, TOKENS()),
    "opt": (opt, TOKENS()),
    "bert masked": (functools.partial(bert, "ForMaskedLM"), TOKENS()),
    "bert tokens": (
        functools.partial(bert, "ForTokenClassification", num_labels=5),
        ragged(3, 7, high=5),
    ),
    "t5": (t5, ragged(3, 5)),
    "bart": (bart, ragged(3, 5)),
    "bert classes": (
        functools.partial(bert, "ForSequenceClassification", num_labels=3),
        torch.tensor([2, -100, 0]),
    ),
    "llama classes": (
        functools.partial(llama, "ForSequenceClassification", num_labels=3),
        torch.tensor([2, 1, 0]),
    ),
    "bert multi": (
        functools.partial(bert, "ForSequenceClassification", num_labels=3),
        torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    ),
    "bert regression": (
        functools.partial(bert, "ForSequenceClassification", num_labels=1),
        torch.tensor([0.5, -1.0, 2.0]),
    ),
    "bert regressions": (
        functools.partial(
            bert, "ForSequenceClassification", num_labels=2, problem_type="regression"
        ),
        torch.tensor([[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]]),
    ),
}  # fmt: skip
COUNTING = ("llama", "gpt2", "opt")
"""Whose own loss heeds num_items_in_batch."""


def made(name, dtype=torch.float32):
    make, labels = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    for p in model.parameters():  # away from 0: random models would give log(V) everywhere
        p.data.mul_(3)
    return model, texts(labels)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_is_own_loss(model, batch, losses_of, tolerance=1e-5, **options):
    """Of losses and gradients."""
    loss = model(**batch, **options).loss
    theirs = gradients(model, loss)
    losses = losses_of()
    assert losses.shape == (3,)
    ours = gradients(model, losses.mean())
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(losses.mean().detach(), loss.detach(), check_dtype=False)
    assert set(ours) == set(theirs)
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name in ours:  # those of keys' biases are rounding errors alone
        close(ours[name] / scale, theirs[name] / scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_mean_is_the_models_loss(name):
    model, batch = made(name)
    for _ in range(2):  # the first time it is compared, too
        assert_is_own_loss(model, batch, lambda: example_losses_of(model, batch))


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_number_of_items(name, as_tensor):
    model, batch = made(name)
    count = torch.tensor(23) if as_tensor else 23
    assert_is_own_loss(
        model,
        batch,
        lambda: example_losses_of(model, batch, num_items_in_batch=count),
        num_items_in_batch=count,
    )


@pytest.mark.parametrize("name", ["bert masked", "bert tokens", "t5", "bart", "bert classes"])
def test_number_of_items_where_the_model_has_no_use_for_it(name):
    pytest.importorskip("transformers", "5", reason="models of transformers 4 refuse it")
    model, batch = made(name)
    number = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        plain, counted = (
            example_losses_of(model, batch, num_items_in_batch=n) for n in (None, 2 * number)
        )
        assert torch.equal(model(**batch, num_items_in_batch=7).loss, model(**batch).loss)
    torch.testing.assert_close(counted, plain / 2)


@pytest.mark.parametrize("name", ["t5", "bart", "bert masked", "bert classes", "bert multi"])
def test_fp64(name):
    """To rounding, where the model does not round its logits to fp32."""
    model, batch = made(name, torch.float64)
    if name == "bert multi":
        batch["labels"] = batch["labels"].double()
    tolerance = 1e-6 if name == "bert masked" else 1e-12
    assert_is_own_loss(model, batch, lambda: example_losses_of(model, batch), tolerance)
    assert example_losses_of(model, batch).dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_bf16(name):
    if name.startswith("bert regression"):
        pytest.importorskip("transformers", "5", reason="its own loss has no backward")
    model, batch = made(name, torch.bfloat16)
    assert_is_own_loss(model, batch, lambda: example_losses_of(model, batch), 0.02)
    assert example_losses_of(model, batch).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "bert classes"])
def test_the_model_computes_no_loss_after_the_first_time(name):
    model, batch = made(name)
    outputs = []
    model.register_forward_hook(lambda *_: outputs.append(_[-1]))
    first, second = (example_losses_of(model, batch) for _ in range(2))
    assert torch.equal(first, second)
    assert [output.loss is None for output in outputs] == [False, True]
    if name in ("t5", "bart"):
        assert outputs[1].past_key_values is None
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_mix(name):
    """A row's loss does not change with the others' labels, but for the number of labels."""
    model, batch = made(name)
    with torch.no_grad():
        before = example_losses_of(model, batch)
        labels = batch["labels"].clone()
        if labels.is_floating_point():
            labels[0] = -1 - labels[0]
        else:
            labels[0] = torch.where(labels[0] == -100, -100, (labels[0] + 1) % 3)
        after = example_losses_of(model, {**batch, "labels": labels})
    assert after[0] != before[0]
    assert torch.equal(after[1:], before[1:])


PROMPTS = dict(num_virtual_tokens=4)
ADAPTERS = {
    "lora": lambda task: peft.LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"]),
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, **PROMPTS),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, **PROMPTS),
    "p-tuning": lambda task: peft.PromptEncoderConfig(
        task_type=task, encoder_hidden_size=8, **PROMPTS
    ),
}
TASKS = {"llama": "CAUSAL_LM", "opt": "CAUSAL_LM", "bart": "SEQ_2_SEQ_LM", "t5": "SEQ_2_SEQ_LM"}
CASES = [(name, kind) for name in TASKS for kind in ADAPTERS] + [
    ("bert classes", "prompt"),
    ("bert classes", "prefix"),
    ("bert tokens", "prompt"),
    ("llama classes", "lora"),
    ("llama classes", "prompt"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_peft(name, kind):
    model, batch = made(name)
    task = TASKS.get(name, "TOKEN_CLS" if "tokens" in name else "SEQ_CLS")
    config = ADAPTERS[kind](task)
    if name == "t5" and kind == "lora":
        config.target_modules = {"q", "v"}
    model = peft.get_peft_model(model, config).eval()
    if name == "bert tokens":  # peft gives the prompt's positions no labels, nor room for them
        batch["labels"] = torch.nn.functional.pad(batch["labels"], (4, 0), value=-100)
    if TASKS.get(name) == "CAUSAL_LM":
        batch["labels"][:, 0] = 5  # which the last token of a prompt predicts
    assert_is_own_loss(model, batch, lambda: example_losses_of(model, batch), 1e-4)
    with torch.no_grad():
        losses = example_losses_of(model, batch)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if task == "CAUSAL_LM":
            virtual = 4 if kind in ("prompt", "p-tuning") else 0
            again = example_losses(
                model(**inputs), batch["labels"], "causal_lm", virtual_tokens=virtual
            )
            assert torch.equal(again, losses)


def test_label_smoothing():
    """The Trainer's."""
    from transformers.trainer_pt_utils import LabelSmoother

    smoother = LabelSmoother(0.3)
    for name in ("llama", "bart", "bert classes"):
        model, batch = made(name)
        losses = example_losses_of(model, batch, label_smoothing=0.3)
        expected = smoother(model(**batch), batch["labels"], shift_labels=name == "llama")
        torch.testing.assert_close(losses.mean(), expected)


class Large(TorchDispatchMode):
    """Counts new tensors of at least ``size`` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen, self.found = size, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.numel() >= self.size:
            if out.untyped_storage().data_ptr() not in self.seen:
                self.found.append(out)  # kept, so that its memory is not used again
                self.seen.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("virtual", [0, 3])
@pytest.mark.parametrize("backward", [False, True])
def test_no_more_copies_of_the_logits_than_transformers_makes(dtype, virtual, backward):
    from transformers.loss.loss_utils import ForCausalLMLoss

    def copies(loss_of):
        logits = torch.randn(2, virtual + 6, 50, dtype=dtype).requires_grad_(backward)
        with Large(2 * 5 * 50) as large:
            large.seen.add(logits.untyped_storage().data_ptr())
            loss = loss_of(logits)
            if backward:
                loss.mean().backward()
        return sum(t.numel() * t.element_size() for t in large.found)

    labels = ragged(2, 6)
    padded = torch.nn.functional.pad(labels, (virtual, 0), value=-100)
    theirs = copies(lambda logits: ForCausalLMLoss(logits, padded, 50))
    assert theirs > 0
    ours = copies(lambda x: example_losses(x, labels, "causal_lm", virtual_tokens=virtual))
    assert ours <= theirs


@needs_compiler
def test_compiled_models():
    """The compiler's wrapper may be outside of peft's or inside; here it compiles nothing."""
    batch = texts(ragged(3, 7))
    base = made("llama")[0]
    model = peft.get_peft_model(base, ADAPTERS["prompt"]("CAUSAL_LM")).eval()
    outside = torch.compile(model)
    inside = peft.get_peft_model(torch.compile(base), ADAPTERS["lora"]("CAUSAL_LM")).eval()
    with torch.compiler.set_stance("force_eager"):
        expected = example_losses_of(model, batch)
        assert torch.equal(example_losses_of(outside, batch), expected)
        losses = example_losses_of(inside, batch)
        torch.testing.assert_close(losses.mean(), inside(**batch).loss)


def test_a_batch_that_cannot_be_compared_is_not():
    """Without any label there is NaN; the next batch is compared."""
    model, batch = made("llama")
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert example_losses_of(model, nothing).isnan().all()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(_[-1].loss is not None))
    example_losses_of(model, batch)
    example_losses_of(model, batch)
    assert calls == [True, False]


class Unshifted(transformers.LlamaForCausalLM):  # type: ignore[name-defined]
    """Scores each label against its own position, as XLM does."""

    def forward(self, labels=None, **inputs):
        outputs = super().forward(**inputs)
        if labels is not None:
            outputs.loss = torch.nn.functional.cross_entropy(
                outputs.logits.flatten(0, 1), labels.flatten()
            )
        return outputs


def test_a_model_with_another_loss_is_refused():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(intermediate_size=32, **SIZES, **SPECIAL)
    model, batch = Unshifted(config), texts(TOKENS())
    with pytest.raises(
        ValueError, match=r"the loss of Unshifted must be the mean.*task='causal_lm'"
    ):
        example_losses_of(model, batch)
    losses = example_losses_of(model, batch, task="masked_lm")
    torch.testing.assert_close(losses.mean(), model(**batch).loss)


def test_losses_of_experts_are_refused():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        intermediate_size=32, num_key_value_heads=2, num_local_experts=2, **SIZES, **SPECIAL,
        output_router_logits=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="aux_loss"):
        example_losses_of(model, texts(TOKENS()))
    model.config.output_router_logits = False
    batch = texts(TOKENS())
    assert_is_own_loss(model.eval(), batch, lambda: example_losses_of(model, batch))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b.pop("labels"), TypeError, "batch must have labels, a tensor, got NoneType"),
        (lambda b: b.update(shift_labels=0), ValueError, "batch must not have shift_labels"),
        (lambda b: b.update(num_items_in_batch=3), ValueError, "must not have num_items_in_batch"),
    ],
)
def test_refused_batches(change, error, message):
    model, batch = made("llama")
    change(batch)
    with pytest.raises(error, match=message):
        example_losses_of(model, batch)


def test_refused_models():
    model, batch = made("llama")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        example_losses_of({}, batch)
    with pytest.raises(ValueError, match="task must be given for a LlamaModel"):
        example_losses_of(model.model, batch)
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            d_model=16, vocab_size=40, num_mel_bins=4, max_source_positions=8, **HALVES, **SPECIAL
        )
    )
    with pytest.raises(ValueError, match="batch must have decoder_input_ids, as Whisper"):
        example_losses_of(whisper, batch)
    with pytest.raises(ValueError, match=r"task must be one of .*got 'lm'"):
        example_losses_of(model, batch, task="lm")
    with pytest.raises(TypeError, match="batch must be a mapping with labels, got list"):
        example_losses_of(model, [])
    with pytest.raises(TypeError, match=r"outputs must be logits .*return_dict=False"):
        example_losses_of(model, {**batch, "return_dict": False})


def test_what_displacement_changes_much_may_round_more():
    """Here losses change by a tenth along the first direction that changes them at all."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    ids = torch.randint(3, 8000, (8, 64))
    zo = dict(lr=1e-7, mu=3e-3)
    groups = hybrid_param_groups(model, zo=zo, directions="per_example", verbose=False)
    optimizer = HybridZOFO(
        groups, perturbation="streamed", structure="low_rank", directions="per_example", seed=2
    )
    loss = optimizer.step(lambda: example_losses_of(model, dict(input_ids=ids, labels=ids)))
    assert loss.isfinite().all()
