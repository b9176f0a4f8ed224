"""vLLM as an engine: displacements are LoRA requests, updates are made inside its worker."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from zofo_kernels import Shift

from ..ask_tell import Displaced
from ..journal.fingerprint import fingerprint, fingerprints
from ..journal.match import some
from ..names import unwrapped
from ..optimizer import HybridZOFO
from .base import Engine, Recipe, noise_seeds
from .lora import Target, lora_config, lora_tensors
from .vllm_check import check_effect

EXTENSION = "zofo_optim.engines.vllm_worker.WorkerExtension"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``max_lora_rank`` may be."""
_NEUTRAL = dict(num_beams=1, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
_UNDERSTOOD = {
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "eos_token_id", "pad_token_id", "bos_token_id"),
    # what does not concern the texts
    *("max_length", "decoder_start_token_id", "use_cache", "cache_implementation"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "transformers_version", "_from_model_config"),
}
"""Of transformers' ``GenerationConfig``."""
_MEMORY = Path("/dev/shm")
_numbers = itertools.count(1)
"""Of adapters; vLLM wants them unique."""


def vllm_options(rank: int = 1, max_loras: int = 32) -> dict[str, Any]:
    """Options with which ``vllm.LLM`` must be made to serve a population.

    Args:
        rank: of the optimizer's directions, or more.
        max_loras: how many displacements are decoded at a time; others wait. Each needs memory of
            rank (m + n) numbers for every m x n matrix.

    Raises:
        ValueError: ``rank`` is no int in [1, 512].

    ```python
    llm = vllm.LLM(folder, dtype="float32", **vllm_options(rank=4))
    ```
    """
    if not isinstance(rank, int) or not 1 <= rank <= RANKS[-1]:
        raise ValueError(f"rank must be an int in [1, {RANKS[-1]}], got {rank!r}")
    return {
        "enable_lora": True,
        "max_loras": max_loras,
        "max_lora_rank": next(r for r in RANKS if r >= rank),
        "worker_extension_cls": EXTENSION,
    }


class VLLMEngine(Engine):
    """Evaluates populations on a ``vllm.LLM``, whose weights follow the optimizer's updates.

    A displacement is a LoRA adapter, written to memory (``/dev/shm``, where there is one) for the
    time of a call. An update goes to vLLM's worker as seeds and coefficients. The worker holds the
    checkpoint's tensors in host memory, once more beside what it serves; it updates those as the
    optimizer does, to the bit, and loads the served weights anew from them.

    Args:
        llm: made with :func:`vllm_options`, of a folder with the optimizer's weights; one process
            (no tensor, pipeline or data parallelism), not quantised. Its ``dtype`` may be another
            than the optimizer's.

    Raises:
        ValueError: it was made otherwise.

    ```python
    llm = vllm.LLM(folder, dtype="float32", **vllm_options())
    with VLLMEngine(llm).attach(optimizer, model) as engine:
        displaced = optimizer.ask(len(prompts))
        tokens = engine.generate(prompts, displaced, vllm.SamplingParams(max_tokens=32))
        optimizer.tell(scores_of(tokens))
        optimizer.step()
    ```
    """

    def __init__(self, llm: Any) -> None:
        config = llm.llm_engine.vllm_config
        parallel = config.parallel_config
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(parallel, name) > 1:
                raise ValueError(f"llm must have {name}=1, got {getattr(parallel, name)}")
        if config.lora_config is None or parallel.worker_extension_cls != EXTENSION:
            raise ValueError("llm must be made by vllm.LLM(..., **vllm_options()), got one without")
        if config.model_config.quantization is not None:
            raise ValueError(f"llm must not be quantised, got {config.model_config.quantization!r}")
        self._llm = llm
        self._on_cpu = config.device_config.device_type == "cpu"
        self._largest_rank = config.lora_config.max_lora_rank
        self._pending: list[list[Recipe]] = []
        self._to_compare = False
        root = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        self._folder = Path(tempfile.mkdtemp(prefix="zofo-adapters-", dir=root))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        displaced: Sequence[Displaced] | None = None,
        sampling: Any = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See :meth:`Engine.generate`.

        Args:
            prompts: token ids of each row.
            displaced: where each row is evaluated; None: at the weights as they are.
            sampling: ``vllm.SamplingParams``, or transformers' ``GenerationConfig``, the same for
                all rows; with ``n=1``, and without a seed where rows are displaced or have seeds.
                None: the served model's default.
            seeds: of each row, where rows are not displaced.
        """
        self._check_rows(prompts, displaced, seeds)
        if sampling is None:
            sampling = self._llm.get_default_sampling_params()
        elif hasattr(sampling, "max_new_tokens"):
            sampling = sampling_of(sampling)
        if sampling.n != 1:
            raise ValueError(f"sampling must have n=1, a completion a row, got n={sampling.n}")
        if (displaced is not None or seeds is not None) and sampling.seed is not None:
            raise ValueError(
                "sampling must have no seed where rows are displaced, as both sides of a direction "
                f"get one of their own, or have seeds, got seed={sampling.seed}"
            )
        self.synchronise()
        sampling = sampling.clone()
        sampling.detokenize = bool(sampling.stop)
        if displaced is not None:
            seeds = noise_seeds(displaced)
        each = [sampling.clone() for _ in prompts]
        for one, seed in zip(each, seeds or [sampling.seed] * len(each), strict=True):
            one.seed = seed
        if displaced is None:
            with self._at_rest() as request:
                return self._complete(prompts, each, [request] * len(prompts))
        shifts = {one[:2]: one.shifts for one in displaced}
        with self._adapters(shifts, self._active_targets()) as requests:
            return self._complete(prompts, each, [requests[one[:2]] for one in displaced])

    def close(self) -> None:
        """Detach, and remove what was written. The ``LLM`` stays."""
        self.detach()
        self._remove()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- serving --------------------------------------------------------------------------------

    def _complete(
        self, prompts: Sequence[Sequence[int]], sampling: list[Any], requests: list[Any]
    ) -> list[list[int]]:
        if not prompts:
            return []
        inputs = [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts]
        outputs = self._llm.generate(inputs, sampling, lora_request=requests, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @contextmanager
    def _at_rest(self) -> Iterator[Any]:
        """The request of rows that are not displaced: None, or on the CPU an adapter of zeros.

        There vLLM gives rows without an adapter the one in its last slot
        (https://github.com/vllm-project/vllm/pull/48421).
        """
        if not self._on_cpu:
            yield None
            return
        shifts = {(0, 0): self._probe(0.0)}
        with self._adapters(shifts, self._targets) as requests:
            yield requests[0, 0]

    @contextmanager
    def _adapters(
        self, shifts: dict[tuple[int, int], tuple[Shift, ...]], targets: list[list[Target]]
    ) -> Iterator[dict[tuple[int, int], Any]]:
        """LoRA requests, by what they are asked for; gone at the end of the block."""
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        settings = self._attached().settings
        config = json.dumps(lora_config(targets, settings.rank))
        requests: dict[tuple[int, int], Any] = {}
        try:
            for key, of_groups in shifts.items():
                number = next(_numbers)
                path = self._folder / str(number)
                path.mkdir()
                requests[key] = LoRARequest(f"{self._folder.name}-{number}", number, str(path))
                (path / "adapter_config.json").write_text(config)
                tensors = lora_tensors(targets, of_groups, backend=settings.backend)
                save_file(tensors, path / "adapter_model.safetensors")
            yield requests
        finally:
            served = self._llm.llm_engine.list_loras()
            for request in requests.values():
                if request.lora_int_id in served:
                    self._llm.llm_engine.remove_lora(request.lora_int_id)
                shutil.rmtree(request.lora_path, ignore_errors=True)

    # ---- following ------------------------------------------------------------------------------

    def _begin(self, optimizer: HybridZOFO, model: nn.Module) -> None:
        rank = optimizer.settings.rank
        if rank > self._largest_rank:
            raise ValueError(
                f"llm must be made with vllm_options(rank={rank}) for the optimizer's rank, got "
                f"max_lora_rank={self._largest_rank}"
            )
        self._pending.clear()
        self._to_compare = False
        self._match(model)
        with self._adapters({(0, 1): self._probe(0.0)}, self._targets) as requests:
            request = next(iter(requests.values()))
            said = (request.lora_name, request.lora_int_id, request.lora_path)
            lost = self._call("zofo_reached", said)
        if lost:
            raise ValueError(
                f"zeroth-order parameters must be of layers that vLLM gives adapters; {len(lost)} "
                f"are not: {some(lost)}. Leave them out by hybrid_param_groups(..., exclude=[...])"
            )
        settings = optimizer.settings
        groups = [
            [(t.name, _dtype(t.parameter), t.noise_index) for t in of_group]
            for of_group in self._targets
        ]
        self._call("zofo_train", groups, settings.rounding, settings.backend)
        self._check_effect()

    def _match(self, model: nn.Module) -> None:
        """Name targets as the checkpoint does; the served weights are the model's.

        Raises:
            ValueError: they are not.
        """
        parameters = dict(unwrapped(model).named_parameters())
        known = self._call("zofo_match", {name: _dtype(p) for name, p in parameters.items()})
        missing = [name for name in parameters if name not in known]
        if missing:
            raise ValueError(
                f"llm must serve a checkpoint with the model's {len(parameters)} parameters, but "
                f"{len(missing)} are missing: {some(missing)}"
            )
        wrong = [name for name, p in parameters.items() if known[name][1] != fingerprint(p)]
        if wrong:
            raise ValueError(
                f"llm must serve the model's weights, but {len(wrong)} of {len(parameters)} "
                f"parameters differ: {some(wrong)}; call model.save_pretrained(folder), and make "
                "the LLM of that folder"
            )
        self._targets = [
            [target._replace(name=known[target.name][0]) for target in of_group]
            for of_group in self._targets
        ]

    def _probe(self, size: float) -> tuple[Shift, ...]:
        """Shifts along a direction, of a size relative to that of each group's weights."""
        found = []
        for group, targets in zip(self._attached().zo_groups(), self._targets, strict=True):
            largest = max((float(t.parameter.detach().float().std()) for t in targets), default=0.0)
            found.append(Shift(group.direction(0), size * largest))
        return tuple(found)

    def _check_effect(self) -> None:
        """Weights that are loaded anew are served: as an adapter of the same displacement is."""

        def by_adapter(size: float) -> Any:
            with self._adapters({(0, 1): self._probe(size)}, self._targets) as requests:
                return self._log_probabilities(requests[0, 1])

        def by_weights(size: float) -> Any:
            shifts = [(list(shift.direction), shift.scale) for shift in self._probe(size)]
            self._call("zofo_displace", shifts)
            self._llm.reset_prefix_cache()
            return at_rest()

        def at_rest() -> Any:
            with self._at_rest() as request:
                return self._log_probabilities(request)

        self._call("zofo_serve")  # not what an engine before this one left
        self._llm.reset_prefix_cache()
        try:
            check_effect(at_rest(), by_adapter, by_weights)
        finally:
            self._call("zofo_serve")
            self._llm.reset_prefix_cache()

    def _log_probabilities(self, request: Any) -> list[dict[int, float]]:
        """Of the likeliest tokens after some prompts."""
        from vllm import SamplingParams

        vocabulary = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        inputs = [
            {"prompt_token_ids": [(7 * row + 3 * at + 1) % vocabulary for at in range(4)]}
            for row in range(4)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=20, detokenize=False)
        outputs = self._llm.generate(inputs, sampling, lora_request=request, use_tqdm=False)
        return [
            {token: found.logprob for token, found in output.outputs[0].logprobs[0].items()}
            for output in outputs
        ]

    def _follow(self, recipes: Sequence[Recipe]) -> None:
        self._pending.append(list(recipes))  # goes when next needed: a step must be quick

    def state_loaded(self) -> None:
        self._to_compare = True

    def synchronise(self, compare: bool = False) -> None:
        """Serve the weights that the optimizer has, now and not at the next call of generate.

        Args:
            compare: whether to look for weights that other means than the optimizer's steps have
                changed, such as ``model.load_state_dict``; they go to the worker through a file.
                Loading a state dict into the optimizer has the same effect.
        """
        self._attached()
        self._to_compare = self._to_compare or compare
        pending, self._pending = self._pending, []
        if pending:
            before, self._to_compare = self._to_compare, True  # if it fails, who knows how far
            self._call("zofo_update", pending)
            self._llm.reset_prefix_cache()
            self._to_compare = before
        if self._to_compare:
            self._compare()
            self._to_compare = False

    def fingerprints(self) -> dict[str, tuple[str, str]]:
        """Of the trained weights, by name: the optimizer's, and the served ones'; equal in step.

        Raises:
            RuntimeError: not attached.
        """
        self._attached()
        self.synchronise()
        return self._marks()

    def _marks(self) -> dict[str, tuple[str, str]]:
        targets = [target for of_group in self._targets for target in of_group]
        names = [target.name for target in targets]
        here = fingerprints(target.parameter for target in targets)
        there = self._call("zofo_fingerprints", names)
        return {name: both for name, *both in zip(names, here, there, strict=True)}  # type: ignore[misc]

    def _compare(self) -> None:
        """Weights that differ go to the worker, through a file."""
        from safetensors.torch import save_file

        wrong = [name for name, (here, there) in self._marks().items() if here != there]
        if not wrong:
            return
        path = self._folder / "weights.safetensors"
        found = {t.name: t.parameter.detach() for g in self._targets for t in g if t.name in wrong}
        try:
            save_file({name: p.contiguous() for name, p in found.items()}, path)
            self._call("zofo_load", str(path))
        finally:
            path.unlink(missing_ok=True)
        self._llm.reset_prefix_cache()

    def _call(self, method: str, *args: Any) -> Any:
        return self._llm.collective_rpc(method, args=args)[0]


def sampling_of(config: Any) -> Any:
    """``vllm.SamplingParams`` of transformers' ``GenerationConfig``.

    Raises:
        ValueError: it says more than vLLM can do alike, such as beams.
    """
    from vllm import SamplingParams

    neutral = {**type(config)().to_dict(), **_NEUTRAL}
    given = {k: v for k, v in config.to_dict().items() if v is not None and v != neutral.get(k)}
    ends = given.get("eos_token_id", [])
    found: dict[str, Any] = {
        "max_tokens": given.get("max_new_tokens", 16),
        "stop_token_ids": ends if isinstance(ends, list) else [ends],
        "temperature": given.get("temperature", 1.0) if given.get("do_sample") else 0.0,
    }
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        if name in given:
            found[name] = given[name]
    if "min_new_tokens" in given:
        found["min_tokens"] = given["min_new_tokens"]
    unknown = sorted(given.keys() - _UNDERSTOOD)
    if unknown:
        raise ValueError(f"generation options must be such as vLLM has too, got {unknown}")
    return SamplingParams(**found)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
