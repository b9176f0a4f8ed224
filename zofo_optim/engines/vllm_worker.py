"""Runs inside vLLM's workers: keeps the weights that are trained, and serves them anew.

vLLM fuses matrices and, on the CPU, packs them and leaves ``layer.weight`` empty, so that an update
in place would change nothing that is served. So the worker keeps the checkpoint's tensors as they
are named and laid out there, updates these, and gives them to vLLM's own ``reload_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zofo_kernels import Direction, perturb_

from ..journal.fingerprint import fingerprint, fingerprints
from ..names import match_names
from .base import Recipe


class Weights:
    """The tensors of the served checkpoint; those that are trained in the optimizer's dtype.

    Args:
        worker: vLLM's.
    """

    def __init__(self, worker: Any) -> None:
        from vllm.model_executor.model_loader import get_model_loader

        self._worker = worker
        config, model = worker.vllm_config, worker.model_runner.model
        loader = get_model_loader(config.load_config)
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach()
            for name, tensor in loader.get_all_weights(config.model_config, model)
        }
        self._groups: list[list[tuple[Tensor, int]]] = []
        self._rounding = self._backend = ""

    def match(self, parameters: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """By a model's names: names here and fingerprints in its dtypes; those that are here."""
        names = match_names(parameters, self.tensors)
        return {
            ours: (there, fingerprint(self.tensors[there].to(getattr(torch, parameters[ours]))))
            for ours, there in names.items()
        }

    def train(
        self, groups: Sequence[Sequence[tuple[str, str, int]]], rounding: str, backend: str
    ) -> None:
        """Updates are of these: name here, dtype and noise index of each in a group."""
        for name, dtype, _ in (entry for group in groups for entry in group):
            self.tensors[name] = (
                self.tensors[name].to(getattr(torch, dtype), copy=True).contiguous()
            )
        self._groups = [[(self.tensors[name], index) for name, _, index in g] for g in groups]
        self._rounding, self._backend = rounding, backend

    def update(self, steps: Sequence[Sequence[Sequence[Any]]]) -> None:
        """Apply the recipes of some steps, one a group, and serve the result."""
        for step in steps:
            for weights, recipe in zip(self._groups, step, strict=True):
                Recipe(*recipe).apply(weights, self._rounding, self._backend)
        self.serve()

    def displace(self, shifts: Sequence[tuple[Sequence[Any], float]]) -> None:
        """Serve the trained tensors displaced, one shift a group; they stay as they are."""
        at_rest = self.tensors
        copies = {id(tensor): tensor.clone() for group in self._groups for tensor, _ in group}
        for group, (direction, scale) in zip(self._groups, shifts, strict=True):
            perturb_(
                [copies[id(tensor)] for tensor, _ in group],
                Direction(*direction),
                scale,
                indices=[index for _, index in group],
                backend=self._backend,
            )
        self.tensors = {name: copies.get(id(t), t) for name, t in at_rest.items()}
        try:
            self.serve()
        finally:
            self.tensors = at_rest

    def load(self, path: str) -> None:
        """Take the trained tensors from a file, and serve them."""
        from safetensors.torch import load_file

        for name, tensor in load_file(path).items():
            self.tensors[name].copy_(tensor)
        self.serve()

    def serve(self) -> None:
        self._worker.reload_weights(weights_iterator=iter(self.tensors.items()))


class WorkerExtension:
    """What vLLM adds to its worker; called by ``LLM.collective_rpc``, with plain numbers only."""

    zofo_weights: Weights

    def zofo_match(self, parameters: dict[str, str]) -> dict[str, tuple[str, str]]:
        """Read the checkpoint; see :meth:`Weights.match`."""
        self.zofo_weights = Weights(self)
        return self.zofo_weights.match(parameters)

    def zofo_reached(self, lora_request: Sequence[Any]) -> list[str]:
        """Modules of an adapter that no layer of the served model would apply."""
        from vllm.lora.request import LoRARequest

        manager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        adapter = manager._load_adapter(LoRARequest(*lora_request))
        layers = manager._adapter_manager
        reached = {*layers.modules, *(n for parts in layers.packed_modules.values() for n in parts)}
        return [name for name in adapter.loras if name not in reached]

    def zofo_fingerprints(self, names: Sequence[str]) -> list[str]:
        """Of tensors here, in order."""
        return fingerprints(self.zofo_weights.tensors[name] for name in names)

    def zofo_train(self, *args: Any) -> None:
        """See :meth:`Weights.train`."""
        self.zofo_weights.train(*args)

    def zofo_update(self, *args: Any) -> None:
        """See :meth:`Weights.update`."""
        self.zofo_weights.update(*args)

    def zofo_displace(self, *args: Any) -> None:
        """See :meth:`Weights.displace`."""
        self.zofo_weights.displace(*args)

    def zofo_load(self, *args: Any) -> None:
        """See :meth:`Weights.load`."""
        self.zofo_weights.load(*args)

    def zofo_serve(self) -> None:
        """See :meth:`Weights.serve`."""
        self.zofo_weights.serve()
