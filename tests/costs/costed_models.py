"""Small models with closures, and what their first-order training really takes."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.measure import peak_memory
from zofo_optim.costs.candidates import requiring
from zofo_optim.costs.flops import FURTHER

IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])
SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def on(device):
    return IDS.to(device), IMAGES.to(device), LABELS.to(device)


def _transformers():
    import transformers as T

    def llama():
        config = T.LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)
        return T.LlamaForCausalLM(config)

    def lora(**options):
        import peft

        targets = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, **options)
        return peft.get_peft_model(llama(), config)

    def opt():
        config = dict(SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16)
        return T.OPTForCausalLM(T.OPTConfig(**config))

    def gpt2():
        config = dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return T.GPT2LMHeadModel(T.GPT2Config(**config, bos_token_id=1, eos_token_id=1))

    def t5(attention):
        config = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        if attention == "sdpa":
            pytest.importorskip("transformers", "5", reason="T5 of transformers 4 is eager only")
        found = T.T5Config(**config, decoder_start_token_id=0, attn_implementation=attention)
        return T.T5ForConditionalGeneration(found)

    def vit():
        sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
        config = T.ViTConfig(**sizes, intermediate_size=32, image_size=8, patch_size=4)
        return T.ViTForImageClassification(config)

    def mixtral():
        config = dict(SMALL, intermediate_size=32, num_key_value_heads=1, num_local_experts=3)
        return T.MixtralForCausalLM(T.MixtralConfig(**config))

    bert = T.BertConfig(**SMALL, intermediate_size=32)
    return {
        "llama": (llama, _text),
        "llama_tied": (lambda: _tied(llama()), _text),
        "opt": (opt, _text),
        "gpt2": (gpt2, _text),
        "bert": (lambda: T.BertForSequenceClassification(bert), _classes),
        "t5": (lambda: t5("sdpa"), _text),
        "t5_eager": (lambda: t5("eager"), _text),
        "vit": (vit, _pictures),
        "mixtral": (mixtral, _text),
        "lora": (lora, _text),
        "dora": (lambda: lora(use_dora=True), _text),
    }


def _tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _text(model, ids, images, labels):
    return model(input_ids=ids, labels=ids).loss


def _classes(model, ids, images, labels):
    return model(input_ids=ids, labels=labels).loss


def _pictures(model, ids, images, labels):
    return model(pixel_values=images, labels=labels).loss


def _plain():
    def images():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(288, 2),
        )

    return {
        "convolutions": (images, lambda m, i, x, y: F.cross_entropy(m(x), y)),
        "encoder": (
            lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            lambda m, i, x, y: m(x.flatten(2)[..., :16]).square().mean(),
        ),
        "bilinear": (
            lambda: nn.ModuleList([nn.Linear(8, 4), nn.Bilinear(4, 8, 3)]),
            lambda m, i, x, y: m[1](m[0](x), x).square().mean(),
        ),
    }


def made(name, device="cpu"):
    """A model in evaluation mode, and its closure."""
    make, loss = {**_plain(), **(_transformers() if name not in _plain() else {})}[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = make().eval()
    batch = on(device)
    return model, lambda: loss(model, *batch)


def choices(names, count, seed=0):
    """All names, and random sets of them."""
    rng = random.Random(seed)
    return [names] + [rng.sample(names, rng.randint(1, len(names))) for _ in range(count)]


def named(model, chosen):
    tensors = dict(model.named_parameters())
    return {name: tensors[name] for name in chosen}


def backward_flops(model, closure, chosen):
    """As torch counts them around a backward."""
    with requiring(model, named(model, chosen)):
        loss = closure()
        counter = FlopCounterMode(display=False, custom_mapping=dict(FURTHER))
        with counter:
            loss.backward()
    return counter.get_total_flops()


def saved_bytes(model, closure, chosen):
    """What autograd saves in a forward, each storage once, without what was there before."""
    there = [*model.parameters(), *model.buffers(), IDS, IMAGES, LABELS]
    known = {t.untyped_storage().data_ptr() for t in there}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept)
    with requiring(model, named(model, chosen)), hooks:
        loss = closure()
    del loss
    return sum(nbytes for place, nbytes in found.items() if place not in known)


def step_peak(model, closure, chosen, factory, **options):
    """Most bytes alive in a second step."""
    with requiring(model, named(model, chosen)):
        optimizer = factory(named(model, chosen).values(), **options)

        def step():
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()

        step()
        optimizer.zero_grad()
        return peak_memory(step, model, optimizer, torch.device("cpu"))


def step_peak_in_backward(model, closure, chosen, factory, **options):
    """The same where each gradient is applied and freed as it comes."""
    with requiring(model, named(model, chosen)):
        optimizers = {p: factory([p], **options) for p in named(model, chosen).values()}

        def apply(p):
            optimizers[p].step()
            p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(apply) for p in optimizers]
        step = lambda: closure().backward()  # noqa: E731
        step()
        whole = torch.optim.SGD(optimizers)
        for optimizer in optimizers.values():
            whole.state.update(optimizer.state)
        peak = peak_memory(step, model, whole, torch.device("cpu"))
        for hook in hooks:
            hook.remove()
    return peak
