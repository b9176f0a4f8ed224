"""Low-rank directions on models of transformers and adapters of peft: slopes, and no copies."""

import pytest
import torch
import torch.nn.functional as F
from low_rank import PER_EXAMPLE, copies

from zofo_kernels import perturbed
from zofo_optim import HybridZOFO, hybrid_param_groups

transformers = pytest.importorskip("transformers")
MODELS = ["llama", "opt", "gpt2", "bert", "t5"]
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1])
MU = 1e-2


def model_of(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "t5":
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50
        )
        config.decoder_start_token_id = 0
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "opt":
        config = transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **SIZES)
        model = transformers.OPTForCausalLM(config)
    elif kind == "bert":
        config = transformers.BertConfig(intermediate_size=32, **SIZES)
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.LlamaConfig(intermediate_size=32, num_key_value_heads=1, **SIZES)
        model = transformers.LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)


def loss(model, kind):
    return model(input_ids=IDS, labels=LABELS if kind == "bert" else IDS).loss


def losses(model, kind):
    """Of each example."""
    if kind == "bert":
        return F.cross_entropy(model(input_ids=IDS).logits, LABELS, reduction="none")
    logits = model(input_ids=IDS, labels=IDS).logits
    logits, labels = (logits, IDS) if kind == "t5" else (logits[:, :-1], IDS[:, 1:])
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def optimizer_of(model, directions="shared", fo=None, **options):
    groups = hybrid_param_groups(
        model, zo=dict(lr=0.0, mu=MU), fo=fo, directions=directions, verbose=False
    )
    return HybridZOFO(groups, structure="low_rank", directions=directions, seed=3, **options)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")  # peft's, about layers of GPT-2
def test_no_matrix_is_copied(monkeypatch, kind, lora):
    """After the first step, which verifies; and slopes are those in place."""
    model = model_of(kind)
    fo = None
    if lora:
        peft = pytest.importorskip("peft")
        model, fo = peft.get_peft_model(model, peft.LoraConfig(r=2)), dict(lr=0.0)
    options = dict(rank=2, estimator="two_sided")
    streamed = optimizer_of(model, fo=fo, perturbation="streamed", **options)
    with copies(monkeypatch) as copied:
        streamed.step(lambda: loss(model, kind))
    assert copied  # by the verification
    with copies(monkeypatch) as copied:
        streamed.step(lambda: loss(model, kind))
    assert copied == []
    if lora:
        return
    in_place = optimizer_of(model, **options)
    for _ in range(2):
        in_place.step(lambda: loss(model, kind))
    found, wanted = streamed.projected_grads, in_place.projected_grads
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
@pytest.mark.parametrize("kind", MODELS)
def test_each_example_has_its_own_slope(monkeypatch, kind, estimator):
    """Those of the batch where the whole model has its direction."""
    model = model_of(kind)
    optimizer = optimizer_of(
        model, "per_example", estimator=estimator, perturbation="streamed", rank=2
    )
    optimizer.step(lambda: losses(model, kind))
    with copies(monkeypatch) as copied:
        optimizer.backward(lambda: losses(model, kind))
    assert copied == []
    (group,) = optimizer.zo_groups()
    kept = [p.detach().clone() for p in group.params]

    def at(direction, sign):
        for p, w, index in zip(group.params, kept, group.indices, strict=True):
            p.copy_(perturbed(w, direction, sign * MU, index=index))
        found = losses(model, kind)
        for p, w in zip(group.params, kept, strict=True):
            p.copy_(w)
        return found

    for example, slope in enumerate(optimizer.projected_grads[0].tolist()):
        direction = group.direction(example)
        if estimator == "two_sided":
            wanted = (at(direction, 1) - at(direction, -1)) / (2 * MU)
        else:
            wanted = (at(direction, 1) - losses(model, kind)) / MU
        assert slope == pytest.approx(wanted[example].item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_embeddings_of_positions_are_named(kind):
    """They are looked up once for all examples."""
    model = model_of(kind)
    groups = hybrid_param_groups(model, zo=dict(lr=0.0, mu=MU), verbose=False)
    optimizer = HybridZOFO(groups, **PER_EXAMPLE)
    name = {"gpt2": "wpe", "bert": "position_embeddings", "t5": "relative_attention_bias"}[kind]
    with pytest.raises(RuntimeError, match=rf"{name}.*cannot have a direction for each example"):
        optimizer.step(lambda: losses(model, kind))


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_16_bits(directions):
    """Slopes follow those in fp32; no false alarm of the verification."""
    model = model_of("llama")
    for p in model.parameters():
        p.data = p.data * 5  # so that mu is no rounding error
    of = losses if directions == "per_example" else loss
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        optimizer = optimizer_of(model, directions, perturbation="streamed")
        slopes = []
        for _ in range(6):
            optimizer.step(lambda: of(model, "llama").float())
            slopes += optimizer.projected_grads.flatten().tolist()
        found.append(torch.tensor(slopes))
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.9


def training(model):
    """With gradient checkpointing, which runs layers of the model by a function of torch's."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    return model.train()


@pytest.mark.parametrize("directions", ["shared", "per_example"])
def test_checkpointing_autocast_and_inference_mode(directions):
    model = model_of("llama")
    of = losses if directions == "per_example" else loss
    options = dict(directions=directions, perturbation="streamed", estimator="one_sided")
    plain = optimizer_of(model, **options)
    plain.step(lambda: of(model, "llama"))
    wanted = plain.projected_grads

    def in_inference_mode():
        with torch.inference_mode():
            return of(model, "llama")

    optimizer = optimizer_of(model, **options)
    optimizer.step(in_inference_mode)
    assert torch.equal(optimizer.projected_grads, wanted)

    optimizer = optimizer_of(model, **options)

    def in_autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return of(model, "llama").float()

    optimizer.step(in_autocast)
    torch.testing.assert_close(optimizer.projected_grads, wanted, rtol=0.3, atol=0.3)

    training(model)
    optimizer = optimizer_of(model, **options)
    optimizer.step(lambda: of(model, "llama"))
    assert torch.equal(optimizer.projected_grads, wanted)
