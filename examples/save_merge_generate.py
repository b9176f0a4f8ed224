"""Train, save, load elsewhere, merge the adapter into the base, and generate.

    python examples/save_merge_generate.py
    python examples/save_merge_generate.py --model facebook/opt-125m --lr-zo 1e-6

peft saves the adapter alone. The base model was trained too: save_hybrid writes both.
"""

import argparse
import copy
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zofo_optim import HybridZOFO, hybrid_param_groups, load_hybrid, save_hybrid

TEXT = "The kettle sings before the rain begins."
PROMPT = 10  # tokens
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub id or a folder; default: a small random one")
parser.add_argument("--lr-zo", type=float, default=1e-4)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default=tempfile.mkdtemp())
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    decode = tokenizer.decode
else:
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SIZES))
    ids = torch.tensor([list(TEXT.encode())])
    decode = lambda ids: bytes(ids.tolist()).decode()  # noqa: E731
elsewhere = copy.deepcopy(base)  # as it would be loaded there


def generate(model):
    model.eval()
    options = dict(max_new_tokens=ids.shape[1] - PROMPT, do_sample=False, pad_token_id=0)
    prompt = ids[:, :PROMPT]
    found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return decode(found[0])


model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
optimizer = HybridZOFO(
    hybrid_param_groups(model, zo=dict(lr=args.lr_zo, mu=1e-3), fo=dict(lr=1e-2)),
    fo_optimizer=torch.optim.AdamW,
)
losses = []
for _ in range(args.steps):
    optimizer.zero_grad()
    loss = optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    losses.append(loss.item())
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
print(optimizer.report())
save_hybrid(model, optimizer, args.out)
trained = generate(model)

loaded, _ = load_hybrid(args.out, base=elsewhere)  # and the optimizer's state, to go on with
merged = loaded.merge_and_unload()  # an ordinary transformers model
merged.save_pretrained(args.out + "/merged")
again = generate(AutoModelForCausalLM.from_pretrained(args.out + "/merged"))
print(f"trained: {trained!r}\nmerged:  {again!r}\nthe same text: {trained == again}")
