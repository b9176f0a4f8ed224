"""What a GPU and the links between GPUs do in a second, as projections assume it.

Numbers are in bytes, seconds, FLOPs and their rates; every assumption is a field with its source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """Of a collective: once, and for each step within a node and between nodes."""

    base: float
    within: float
    between: float

    def of(self, within: float, between: float) -> float:
        return self.base + within * self.within + between * self.between


@dataclass(frozen=True)
class Network:
    """What collectives cost; rings and trees, latencies and protocols as in NCCL's own model.

    Latencies by default: NCCL, ``src/graph/tuning.cc``, NVLink and network.
    """

    name: str
    within: float
    """Bytes a second that a GPU sends inside its node."""
    between: float
    """Bytes a second that a GPU sends to other nodes, where all send at once."""
    node: int = 8
    """GPUs a node."""
    small: Latency = Latency(3.6e-6, 0.47e-6, 2.7e-6)
    """Protocol LL, ring."""
    tree: Latency = Latency(4.4e-6, 0.52e-6, 5.0e-6)
    """Protocol LL, tree."""
    large: Latency = Latency(8.4e-6, 3.4e-6, 9.6e-6)
    """Protocol Simple, ring."""
    hidden: float = 1.0
    """Share of transfers of weights and gradients that the arithmetic beside them hides, as long
    as it lasts: assumed."""
    gathered: float = 1.0
    """Bandwidth of gathering over that of summing: NCCL's are alike."""
    small_share: float = 0.25
    """Of the bandwidth that LL has, as every 8 bytes carry a flag and wait."""

    def exposed(self, transfer: float, beside: float) -> float:
        """Seconds of a transfer that the arithmetic beside it does not hide."""
        return transfer - self.hidden * min(transfer, beside)

    def replicas(self, count: int, size: float) -> float:
        """Seconds of an all-reduce over ``count`` nodes, in which all of a node send at once."""
        if count == 1:
            return 0.0
        steps = 2 * (count - 1)
        return self.large.of(0, steps) + steps / count * size / self.between

    def _nodes(self, gpus: int) -> int:
        return -(-gpus // self.node)

    def _bandwidth(self, gpus: int) -> float:
        """Of a ring; one through several nodes leaves each by the links of all its GPUs."""
        return self.within if gpus <= self.node else min(self.within, self.node * self.between)

    def _ring(self, gpus: int, sent: float, rounds: int) -> float:
        between = self._nodes(gpus) - 1
        steps = rounds * (gpus - 1 - between), rounds * between
        wire = sent / self._bandwidth(gpus)
        return min(self.large.of(*steps) + wire, self.small.of(*steps) + wire / self.small_share)

    def all_gather(self, gpus: int, each: float) -> float:
        """Seconds until every GPU has ``each`` bytes of all others; a reduce-scatter's, too."""
        return self._ring(gpus, (gpus - 1) * each / self.gathered, 1) if gpus > 1 else 0.0

    def all_reduce(self, gpus: int, size: float) -> float:
        """Seconds until every GPU has the sum of all GPUs' ``size`` bytes."""
        if gpus == 1:
            return 0.0
        nodes = self._nodes(gpus)
        steps = 2.0 * (min(gpus, self.node) - 1), 2.0 * math.log2(nodes)
        wire = 2 * size / (self.small_share * self._bandwidth(gpus))
        ring = self._ring(gpus, 2 * (gpus - 1) / gpus * size, 2)
        return min(ring, self.tree.of(*steps) + wire)


LINE_RATE = 0.8
"""Share of a link's nominal rate that collectives of large tensors reach: assumed."""
NVLINK = LINE_RATE * 450e9
"""NVLink 4: 900 GB/s a GPU, both ways together (NVIDIA H200 data sheet)."""
INFINIBAND = Network("8 x 400 Gb/s a node", NVLINK, LINE_RATE * 50e9)
"""A 400 Gb/s adapter a GPU (NVIDIA DGX H200 data sheet)."""
ETHERNET = Network("100 Gb/s a node", NVLINK, LINE_RATE * 12.5e9 / 8)
"""One 100 Gb/s adapter a node, as many clusters have."""


@dataclass(frozen=True)
class GPU:
    """What a GPU does in a second."""

    flops: float = 0.5 * 989e12
    """H200 in bf16, dense (NVIDIA's data sheet); half of it is reached: assumed."""
    backward: float = 1.0
    """Rate of a backward's arithmetic over that of a forward: assumed equal."""
    bandwidth: float = 0.9 * 4.8e12
    """Bytes of memory (data sheet); 90 % is reached: assumed."""
    issue: float = 132 * 128 * 1.98e9
    """Instructions of single lanes: multiprocessors, lanes, boost clock (data sheet)."""
    memory: float = 0.9 * 141e9
    """Bytes (data sheet); a tenth is left to the context and to fragments: assumed."""

    def sweep(self, moved: float, instructions: float = 0.0) -> float:
        """Seconds of a pass that moves so many bytes and issues so many instructions."""
        return max(moved / self.bandwidth, instructions / self.issue)
