"""Pairs of models that are one function in other bases, so that what is carried can be exact.

A residual stream h becomes h Mᵀ, where the columns of M are orthogonal and equally long, MᵀM = c I:
norms commute with it. Weights that write to the stream become M W, those that read it W Mᵀ / c.
"""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCABULARY = 48
WRITES = ("embed_tokens", "o_proj", "down_proj")
READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "score")
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


def made(cls, config, seed):
    """A model of random weights without dropout; torch's generator stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(config).eval()


def llama(layers=2, hidden=16, intermediate=16, labels=None, seed=0):
    """A language model, or with ``labels`` a classifier; weights so large that layers matter.

    With ``intermediate`` as large as ``hidden`` the outputs of all linear layers span their space.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.3,
        pad_token_id=0,
        tie_word_embeddings=False,
        num_labels=labels or 2,
    )
    classes = (transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification)
    return made(classes[labels is not None], config, seed)


def bert(layers=2, hidden=16, intermediate=16, labels=3, seed=0):
    """A classifier whose norms have weights and offsets of their own."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=labels,
    )
    model = made(transformers.BertForSequenceClassification, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def gpt2(layers=2, seed=0):
    """A model of Conv1D layers, whose weights are (in, out)."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_inner=16,
        n_layer=layers,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return made(transformers.GPT2LMHeadModel, config, seed)


def orthogonal(size, seed):
    """A random rotation: (size, size) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def resized(model, **sizes):
    """A model of the same class, of other sizes, with weights that are to be overwritten."""
    config = copy.deepcopy(model.config)
    for name, value in sizes.items():
        setattr(config, name, value)
    return made(type(model), config, 0)


def in_basis(model, basis):
    """The Llama ``model`` with the residual stream h basisᵀ; basis: (wide, narrow), float64."""
    wide, narrow = basis.shape
    scale = float(basis[:, 0] @ basis[:, 0])
    other = resized(model, hidden_size=wide)
    weights = model.state_dict()
    for name, weight in weights.items():
        module, matrix = name.split(".")[-2], weight.double()
        if module == "embed_tokens":
            matrix = matrix @ basis.T
        elif module in WRITES:
            matrix = basis @ matrix
        elif module in READS:
            matrix = matrix @ basis.T / scale
        else:
            assert module in NORMS
            assert torch.equal(weight, torch.ones_like(weight))
            matrix = torch.full((wide,), (scale * narrow / wide) ** 0.5)
        weights[name] = matrix.to(weight.dtype)
    other.load_state_dict(weights)
    for module in other.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= scale * narrow / wide
    return other


def rotated(model, seed=1):
    """The residual stream turned by a random rotation."""
    return in_basis(model, orthogonal(model.config.hidden_size, seed))


def widened(model, seed=None, units=False):
    """Every residual channel twice; then rotated, if there is a seed.

    With ``units`` every inner unit of the feed-forwards is there twice, too.
    """
    if units:
        model = with_double_units(model)
    narrow = model.config.hidden_size
    basis = torch.eye(narrow, dtype=torch.float64).tile(2, 1)
    if seed is not None:
        basis = orthogonal(2 * narrow, seed) @ basis
    return in_basis(model, basis)


def with_double_units(model):
    other = resized(model, intermediate_size=2 * model.config.intermediate_size)
    weights = model.state_dict()
    for name, weight in weights.items():
        if "down_proj" in name:
            weights[name] = weight.tile(1, 2) / 2
        elif "gate_proj" in name or "up_proj" in name:
            weights[name] = weight.tile(2, 1)
    other.load_state_dict(weights)
    return other


def padded(model, seed=1):
    """A residual stream of twice the width, in a subspace of which the model lives unscaled."""
    narrow = model.config.hidden_size
    return in_basis(model, orthogonal(2 * narrow, seed)[:, :narrow])


def deeper(model, at):
    """``model`` with layers at the places ``at`` of the result that add nothing to the stream.

    Returns the model, and the true map from its layers to those of ``model``.
    """
    count = model.config.num_hidden_layers + len(at)
    other = resized(model, num_hidden_layers=count)
    true = dict(zip([i for i in range(count) if i not in at], range(count), strict=False))
    weights = {n: w for n, w in model.state_dict().items() if ".layers." not in n}
    other.load_state_dict(weights, strict=False)
    for large, layer in enumerate(other.model.layers):
        if large in true:
            layer.load_state_dict(model.model.layers[true[large]].state_dict())
        else:
            with torch.no_grad():
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return other, true


def permuted(model, seed=1):
    """The BERT ``model`` with its channels and its feed-forwards' units in another order."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randperm(model.config.hidden_size, generator=generator)
    units = torch.randperm(model.config.intermediate_size, generator=generator)
    other = copy.deepcopy(model)
    weights = model.state_dict()
    for name, weight in weights.items():
        module = name.rsplit(".", 1)[0]
        if module.endswith("intermediate.dense"):
            order = (units, channels)
        elif module.endswith(("query", "key", "value", "pooler.dense")):
            order = (None, channels)
        elif module.endswith("attention.output.dense"):
            order = (channels, None)
        elif module.endswith("output.dense"):
            order = (channels, units)
        elif "embeddings" in module and weight.ndim == 2:
            order = (None, channels)
        elif "LayerNorm" in module:
            order = (channels, None)
        else:
            continue  # the classifier reads the pooler, whose units stay
        for dim in range(weight.ndim):
            if order[dim] is not None:
                weight = weight.index_select(dim, order[dim])
        weights[name] = weight
    other.load_state_dict(weights)
    return other


def doubled(model):
    """The BERT ``model`` with everything twice: channels, heads, units, the pooler's outputs."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    other = resized(model, **{name: 2 * getattr(model.config, name) for name in sizes})
    weights = model.state_dict()
    for name, weight in weights.items():
        if "embeddings" in name and weight.ndim == 2:
            weights[name] = weight.tile(1, 2)
        elif name == "classifier.weight":
            weights[name] = weight.tile(1, 2) / 2
        elif name != "classifier.bias":
            weights[name] = weight.tile(2, 2) / 2 if weight.ndim == 2 else weight.tile(2)
    other.load_state_dict(weights, strict=False)
    return other


def texts(count=12, rows=4, length=8, seed=0, padding=True):
    """Batches of unlabelled texts; the last text of each is short, where there is padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if padding:
            mask[-1, length // 2 :] = 0
        batches.append(dict(input_ids=ids * mask, attention_mask=mask))
    return batches


def randomised(model, seed=3, size=0.3):
    """Every parameter that requires gradients, LoRA's B and heads too, made random; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return model


def with_lora(model, seed=3, task="CAUSAL_LM", **options):
    """A peft model around ``model``, whose LoRA is random and of an effect; without dropout."""
    options = {"r": 4, "lora_alpha": 4, **options}
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type=task, **options))
    return randomised(tuned, seed).eval()


@torch.no_grad()
def within_outputs(tuned, batches, size=0.3, seed=5):
    """``tuned`` with LoRA's changes inside what its modules write without them; in place.

    A map between outputs is known there only: after a LayerNorm deviations from the mean lack one
    direction.
    """
    generator, outputs, handles = torch.Generator().manual_seed(seed), {}, []
    layers = {n: m for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        taken = outputs.setdefault(name, [])
        handles.append(
            layer.register_forward_hook(
                lambda m, args, out, to=taken: to.append(out.flatten(0, -2))
            )
        )
    with tuned.disable_adapter():
        for batch in batches:
            tuned(**batch)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        rows = torch.cat(outputs[name])
        b = layer.lora_B["default"].weight
        mixed = torch.randn(len(rows), b.shape[1], generator=generator)
        change = (rows - rows.mean(0)).T @ mixed
        b.copy_(size * change / change.square().mean().sqrt())
    return tuned


@torch.no_grad()
def logits(model, batch):
    """Of the places that are not padded: (places, vocabulary), or (texts, labels)."""
    out = model(**batch).logits
    return out if out.ndim == 2 else out[batch["attention_mask"].bool()]
