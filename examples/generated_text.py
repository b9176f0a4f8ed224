"""A score of generated text rises without a gradient: a whole population in one generate().

    python examples/generated_text.py
    python examples/generated_text.py --model HuggingFaceTB/SmolLM2-135M --steps 100

Without --model: a Llama with random weights, made on the spot. The score is any function of the
text; here, the share of its tokens with an even number. Rows of the batch are in pairs, which share
a prompt, a direction of their own, and the noise that they are sampled with: one row is displaced
forth, the other one back.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zofo_optim import HybridZOFO, common_noise, hybrid_param_groups

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--pairs", type=int, default=32)
parser.add_argument("--tokens", type=int, default=12)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--lr", type=float, default=0.1)
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
model.requires_grad_(False).eval()
prompt = torch.full((2 * args.pairs, 4), 5)

zo = dict(lr=args.lr, mu=2e-2, maximize=True)
optimizer = HybridZOFO(
    hybrid_param_groups(model, zo=zo, directions="per_example"),
    structure="low_rank",
    perturbation="streamed",
    directions="per_example",
    estimator="antithetic",
    zo_rule="normalized",
)


def scores():
    with common_noise(optimizer):
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            max_new_tokens=args.tokens,
        )
    made = tokens[:, prompt.shape[1] :]
    return (made % 2 == 0).float().mean(1).tolist()  # from here on, it may be any program


first = sum(scores()) / len(prompt)
for _ in range(args.steps):
    optimizer.step(scores)
print(f"score {first:.3f} -> {sum(scores()) / len(prompt):.3f}")
