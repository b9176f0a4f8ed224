"""Tokens a second of vLLM: plain, and with a population of adapters; see docs/engines.md.

Needs the environment of ``make vllm``:

    VLLM_CPU_OMP_THREADS_BIND=0 .venv-vllm/bin/python benchmarks/vllm_population.py
"""

import argparse
import platform
import tempfile
import time

import torch
import transformers
import vllm

from zofo_optim import HybridZOFO, hybrid_param_groups
from zofo_optim.engines import VLLMEngine, vllm_options

KIND = dict(structure="low_rank", perturbation="streamed", directions="per_example")


def llama(width: int, layers: int) -> transformers.LlamaForCausalLM:
    """With random weights, and heads of 64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        dtype="float32",
    )
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


def fastest(repeats: int, run) -> float:
    """Seconds of the fastest run, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def plain(args, folder: str, prompts: list[list[int]], sampling: vllm.SamplingParams) -> None:
    """Without adapters, in an engine that knows of none."""
    start = time.perf_counter()
    llm = vllm.LLM(folder, **served(args))
    print(f"start: {time.perf_counter() - start:.0f} s")
    inputs = [dict(prompt_token_ids=prompt) for prompt in prompts]
    say(args, "plain", lambda: llm.generate(inputs, sampling, use_tqdm=False))
    llm.llm_engine.engine_core.shutdown()


def population(args, model, folder: str, prompts, sampling, adapters: int) -> None:
    """As many rows of each adapter, and the update between two generations."""
    model.save_pretrained(folder)  # as the last round left it
    llm = vllm.LLM(folder, **served(args), **vllm_options(args.rank, max_loras=adapters))
    zo = dict(lr=1e-3, mu=1e-3)
    groups = hybrid_param_groups(model, zo=zo, include=r"proj\.weight$", verbose=False)
    each = args.prompts // adapters
    optimizer = HybridZOFO(
        groups, **KIND, estimator="antithetic", rank=args.rank, examples_per_direction=each
    )
    start = time.perf_counter()
    with VLLMEngine(llm).attach(optimizer, model) as engine:
        print(f"attach: {time.perf_counter() - start:.1f} s")
        displaced = optimizer.ask(args.prompts)
        assert len({one[:2] for one in displaced}) == adapters
        say(args, f"{adapters} adapters", lambda: engine.generate(prompts, displaced, sampling))
        seconds = []
        for _ in range(args.repeats):
            optimizer.ask(args.prompts)
            optimizer.tell(torch.rand(args.prompts))
            optimizer.step()
            start = time.perf_counter()
            engine.synchronise()
            seconds.append(time.perf_counter() - start)
        print(f"update of the served weights: {min(seconds):.3f} s", flush=True)
    llm.llm_engine.engine_core.shutdown()


def served(args) -> dict:
    return dict(
        dtype="float32",
        max_model_len=128,
        max_num_seqs=args.prompts,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
    )


def say(args, what: str, run) -> None:
    seconds = fastest(args.repeats, run)
    speed = args.prompts * args.tokens / seconds
    print(f"{what}: {seconds:.2f} s, {speed:.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--adapters", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=5, help="the fastest counts")
    args = parser.parse_args()
    model = llama(args.width, args.layers)
    prompts = torch.randint(1, 4096, (args.prompts, 16)).tolist()
    sampling = vllm.SamplingParams(
        temperature=1, max_tokens=args.tokens, ignore_eos=True, detokenize=False
    )
    print(f"vllm {vllm.__version__}, torch {torch.__version__}, {platform.machine()}")
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {args.prompts} x {args.tokens} tokens")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        plain(args, folder, prompts, sampling)
        for adapters in args.adapters:
            population(args, model, folder, prompts, sampling, adapters)


if __name__ == "__main__":
    main()
