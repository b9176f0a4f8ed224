"""A model of a step's time, memory and traffic on many GPUs, by strategy: a projection.

A step is arithmetic (FLOPs over what a GPU reaches), passes over the weights (bytes over memory
bandwidth, or instructions over the rate at which they are issued, whichever takes longer) and
collectives (latency of their steps, and bytes over bandwidth). Transfers of weights and gradients
overlap with the arithmetic beside them, wholly: what is longer counts. Each process has the same
work whatever their number: weak scaling.

Numbers are in bytes, seconds and FLOPs; what hardware does in a second is in ``cluster``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .cluster import GPU, Network

GATHERED = 8 * 4
"""Bytes of a few float64 that a process tells the others in an estimate."""


@dataclass(frozen=True)
class Model:
    """A decoder, and how its weights are stored."""

    name: str
    parameters: float
    layers: int
    width: int
    vocabulary: int
    rows_and_columns: float
    """Sum of m + n over all its m x n linear layers: what adapters and factors are made of."""
    itemsize: int = 2

    @property
    def weights(self) -> float:
        """Bytes."""
        return self.parameters * self.itemsize


LLAMA_7B = Model("7B", 6.74e9, 32, 4096, 32000, 32 * (8 * 4096 + 3 * (4096 + 11008)))
"""Llama 2 7B."""
LLAMA_70B = Model(
    "70B",
    69.0e9,
    80,
    8192,
    32000,
    80 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)),
)
"""Llama 2 70B."""


@dataclass(frozen=True)
class Work:
    """A step on each GPU."""

    tokens: int = 2048
    evaluations: int = 2
    """Without gradients: two-sided."""
    passes: int = 3
    """In place, over the weights; each reads and writes."""
    perturb: float = 21.2
    """Instructions an element of a pass that recovers and perturbs, Gaussian, bf16; see
    ``results/sm_90/sass.json``, as for those that follow."""
    update: float = 32.9
    """Of the pass that restores and updates, rounding stochastically."""
    direction: Mapping[str, float] = field(
        default_factory=lambda: {"gaussian": 18.6 - 3.5, "rademacher": 9.7 - 3.5, "rank 1": 2.0}
    )
    """Of each further direction in an update: perturbing less copying; a further rank's."""
    adapter_rank: float = 16
    trained: float = 16.0
    """Bytes a first-order parameter: weight and gradient in bf16, and AdamW's master weight and two
    moments in fp32 (Rajbhandari et al. 2020)."""
    stepped: float = 28.0
    """Bytes that AdamW moves a parameter: reads gradient, weight, moments; writes all but one."""
    gradient: float = 2.0
    """Bytes a gradient that is sent."""
    kept: float = 34.0
    """Bytes a token, layer and unit of width that a backward needs (Korthikanti et al. 2023, with
    attention that keeps no scores)."""

    def inference(self, model: Model) -> float:
        """Bytes of activations without a backward: logits (bf16, fp32 and its softmax), a layer."""
        return self.tokens * (10.0 * model.vocabulary + self.kept * model.width)

    def training(self, model: Model) -> float:
        """Bytes of activations with a backward."""
        return self.inference(model) + self.tokens * self.kept * model.width * model.layers


@dataclass(frozen=True)
class Step:
    """Of one GPU."""

    compute: float
    passes: float
    exposed: float
    """Seconds of communication that no arithmetic hides."""
    sent: float
    """Bytes that the GPU hands to collectives: its own scalars, its gradients or activations, its
    shard of the weights for each time that it is gathered."""
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.passes + self.exposed


Strategy = Callable[[Model, GPU, Network, int, Work], Step]


def forward(model: Model, gpu: GPU, tokens: float) -> float:
    """Seconds of a forward: 2 FLOPs a parameter and token; attention's scores are left out."""
    return 2 * model.parameters * tokens / gpu.flops


def _in_place(model: Model, gpu: GPU, work: Work, share: float = 1.0) -> float:
    """Seconds of a step's passes over a share of the weights."""
    elements, moved = share * model.parameters, 2 * share * model.weights
    moves = (work.passes - 1) * gpu.sweep(moved, work.perturb * elements)
    return moves + gpu.sweep(moved, work.update * elements)


def _scalars(network: Network, gpus: int) -> tuple[float, float]:
    """Seconds and bytes of telling all others the losses."""
    return network.all_gather(gpus, GATHERED), GATHERED * float(gpus > 1)


def zo_data_parallel(model: Model, gpu: GPU, network: Network, gpus: int, work: Work) -> Step:
    """The same directions on all GPUs, each on its own batch; in place, no wrapper."""
    exposed, sent = _scalars(network, gpus)
    compute = work.evaluations * forward(model, gpu, work.tokens)
    memory = model.weights + work.inference(model)
    return Step(compute, _in_place(model, gpu, work), exposed, sent, memory)


def _by_samples(kind: str, own: int) -> Strategy:
    """``own`` directions on each GPU, streamed; all GPUs apply those of all."""

    def strategy(model: Model, gpu: GPU, network: Network, gpus: int, work: Work) -> Step:
        exposed, sent = _scalars(network, gpus)
        evaluate = forward(model, gpu, work.tokens)
        if kind == "rank 1":  # closed forms: x V, and its product with U added to the output
            extra = gpu.sweep(2 * work.tokens * model.rows_and_columns * model.itemsize)
        else:  # a perturbed copy of each weight
            extra = gpu.sweep(2 * model.weights, work.perturb * model.parameters)
        further = work.direction[kind] * (own * gpus - 1)
        last = gpu.sweep(2 * model.weights, (work.update + further) * model.parameters)
        memory = model.weights * (1 + 1 / model.layers) + work.inference(model)
        return Step(
            work.evaluations * evaluate, work.evaluations * extra + last, exposed, sent, memory
        )

    return strategy


zo_samples = _by_samples("rademacher", 1)
zo_samples_of_rank_1 = _by_samples("rank 1", 1)


def zo_per_example(examples: int) -> Strategy:
    """A direction of rank 1 for each of a GPU's examples, all in the same evaluations."""
    return _by_samples("rank 1", examples)


def hybrid_lora(model: Model, gpu: GPU, network: Network, gpus: int, work: Work) -> Step:
    """The base model as :func:`zo_data_parallel`, and an adapter under DDP beside it.

    The backward goes through the frozen weights, without gradients of them.
    """
    zo = zo_data_parallel(model, gpu, network, gpus, work)
    adapter = work.adapter_rank * model.rows_and_columns
    clean = forward(model, gpu, work.tokens)
    back = clean / gpu.backward
    reduce = network.all_reduce(gpus, work.gradient * adapter)
    return Step(
        zo.compute + clean + back,
        zo.passes + gpu.sweep(work.stepped * adapter),
        zo.exposed + network.exposed(reduce, back),
        zo.sent + work.gradient * adapter * (gpus > 1),
        model.weights + work.trained * adapter + work.training(model),
    )


def _shards(gpus: int, network: Network, gpu: GPU, weights: float, others: float) -> int:
    """Over how many GPUs weights are spread: those of a node, or the fewest more that fit."""
    shards = min(gpus, network.node)
    while shards < gpus and weights / shards + others > gpu.memory:
        shards *= 2
    return min(shards, gpus)


def zo_fsdp(model: Model, gpu: GPU, network: Network, gpus: int, work: Work) -> Step:
    """Weights sharded in a node (more where they do not fit), gathered layer by layer in each
    evaluation; each GPU has its own batch, and moves its shard in place."""
    layer, others = model.weights / model.layers, work.inference(model)
    shards = _shards(gpus, network, gpu, model.weights, others + 2 * layer)
    gather = model.layers * network.all_gather(shards, layer / shards)
    one = forward(model, gpu, work.tokens)
    scalars, sent = _scalars(network, gpus)
    memory = model.weights / shards + others + 2 * layer * (shards > 1)
    return Step(
        work.evaluations * one,
        _in_place(model, gpu, work, 1 / shards),
        work.evaluations * network.exposed(gather, one) + scalars,
        sent + work.evaluations * model.weights / shards * (shards > 1),
        memory,
    )


def zo_tensor_parallel(model: Model, gpu: GPU, network: Network, gpus: int, work: Work) -> Step:
    """Each layer over the GPUs of a node, which share their batches; nodes share the directions.

    Two sums of activations a layer and evaluation, which nothing hides.
    """
    shards = min(gpus, network.node)
    size = shards * work.tokens * model.width * float(model.itemsize)
    sums = 2 * model.layers * work.evaluations
    scalars, sent = _scalars(network, gpus)
    whole = replace(work, tokens=shards * work.tokens)
    memory = model.weights / shards + whole.inference(model) / shards + 2 * size
    return Step(
        work.evaluations * forward(model, gpu, work.tokens),
        _in_place(model, gpu, work, 1 / shards),
        sums * network.all_reduce(shards, size) + scalars,
        sent + sums * size * (shards > 1),
        memory,
    )


def fo_ddp(model: Model, gpu: GPU, network: Network, gpus: int, work: Work) -> Step:
    """First order on all weights; gradients are summed while the backward goes on."""
    one = forward(model, gpu, work.tokens)
    back = 2 * one / gpu.backward
    size = work.gradient * model.parameters
    return Step(
        one + back,
        gpu.sweep(work.stepped * model.parameters),
        network.exposed(network.all_reduce(gpus, size), back),
        size * (gpus > 1),
        work.trained * model.parameters + work.training(model),
    )


def fo_fsdp(model: Model, gpu: GPU, network: Network, gpus: int, work: Work) -> Step:
    """First order on all weights, sharded as in :func:`zo_fsdp`; gradients are summed over the
    replicas of a shard, if it has any."""
    layer, others = model.weights / model.layers, work.training(model)
    states = work.trained * model.parameters
    shards = _shards(gpus, network, gpu, states, others + 2 * layer)
    gather = model.layers * network.all_gather(shards, layer / shards)
    size = work.gradient * model.parameters
    scatter = model.layers * network.all_gather(shards, size / model.layers / shards)
    replicas = network.replicas(gpus // shards, size / shards)
    one = forward(model, gpu, work.tokens)
    back = 2 * one / gpu.backward
    exposed = network.exposed(gather, one)
    exposed += network.exposed(gather + scatter + replicas, back)
    moved = (2 * model.weights / shards + size) * (shards > 1) + size / shards * (gpus > shards)
    passes = gpu.sweep(work.stepped * model.parameters / shards)
    memory = states / shards + others + 2 * layer * (shards > 1)
    return Step(one + back, passes, exposed, moved, memory)


STRATEGIES: dict[str, Strategy] = {
    "ZO, data parallel": zo_data_parallel,
    "ZO, samples in parallel": zo_samples,
    "ZO, samples of rank 1": zo_samples_of_rank_1,
    "hybrid, LoRA under DDP": hybrid_lora,
    "ZO, FSDP2": zo_fsdp,
    "ZO, tensor parallel": zo_tensor_parallel,
    "FO, DDP": fo_ddp,
    "FO, FSDP2": fo_fsdp,
}


def projected(
    strategy: Strategy, model: Model, network: Network, gpus: int, gpu: GPU | None = None
) -> Step | None:
    """A step on so many GPUs; None where a GPU's memory does not hold it."""
    gpu = GPU() if gpu is None else gpu
    step = strategy(model, gpu, network, gpus, Work())
    return step if step.memory <= gpu.memory else None
