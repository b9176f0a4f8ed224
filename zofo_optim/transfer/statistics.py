"""How much the parts of a model do on given inputs: sums over a stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .activations import at_rest, forward, real_tokens

Seen = Callable[[Tensor, Tensor], None]
"""Told of a module's inputs (N, width) and outputs (N, width) of N tokens, without padding."""


def observe(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], seen: Mapping[nn.Module, Seen]
) -> None:
    """Run the model without a graph, in evaluation mode, and tell of what passes some modules.

    Modes are put back and hooks taken off, whatever happens. The head, whose logits may be large,
    is not run.

    Args:
        model: a transformers model, or another module that takes such inputs.
        batches: its inputs, without labels; tokens where ``attention_mask``, (texts, tokens), is
            0 are padding.
        seen: who is told, by module below the head.

    Raises:
        ValueError: there is no token; a mask is not (texts, tokens); or a module is given other
            rows than one for each token.
    """
    body: nn.Module = getattr(model, "base_model", model)
    real: Tensor | None = None
    tokens = 0

    def rows(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        if real is None:
            return flat
        if len(flat) != len(real):
            raise ValueError(
                f"batches have {len(real)} tokens by their attention_mask, but a module of "
                f"{type(model).__name__} is given {len(flat)} rows: which are padding is unknown"
            )
        return flat[real.to(flat.device)]

    def telling(who: Seen) -> Callable[..., None]:
        def tell(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = (*args, *kwargs.values())[0]
            who(rows(given), rows(output[0] if isinstance(output, tuple) else output))

        return tell

    with ExitStack() as stack:
        stack.enter_context(at_rest(model))
        for module, who in seen.items():
            handle = module.register_forward_hook(telling(who), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            mask = real_tokens(batch)
            real = None if batch.get("attention_mask") is None else mask.flatten()
            tokens += int(mask.sum())
            forward(body, batch)
    if not tokens:
        raise ValueError("batches must have at least one token that is not padding, got none")


class Influence:
    """How much a layer turns the hidden states: mean over tokens of 1 - cos(input, output).

    ShortGPT's *block influence* (Men et al. 2024, arXiv 2403.03853, equation 1).
    """

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def __call__(self, inputs: Tensor, outputs: Tensor) -> None:
        turned = 1 - cosine_similarity(inputs.float(), outputs.float(), dim=-1)
        self._sum += float(turned.sum(dtype=torch.float64))
        self._tokens += len(turned)

    def value(self) -> Tensor:
        return torch.tensor(self._sum / self._tokens, dtype=torch.float64)


class Contribution:
    """How much each group of a projection's inputs adds to its outputs.

    The root of the sum over tokens of ‖W_g x_g‖². For single units that is ‖x_j‖·‖w_j‖, the norm
    of a unit's activations times that of its outgoing column (Wanda's score of a weight, Sun et
    al. 2024, arXiv 2306.11695, summed in squares over the column).

    Args:
        weight: W, (outputs, inputs).
        size: of a group of neighbouring inputs.
    """

    def __init__(self, weight: Tensor, size: int = 1) -> None:
        self._weight, self._size = weight.detach(), size
        self._columns = self._weight.float().square().sum(0) if size == 1 else None
        self._squares = torch.zeros(weight.shape[1] // size, dtype=torch.float64)

    def __call__(self, inputs: Tensor, outputs: Tensor) -> None:
        if self._columns is not None:
            squares = inputs.float().square().sum(0) * self._columns
        else:
            slices = [
                slice(first, first + self._size) for first in range(0, inputs.shape[1], self._size)
            ]
            added = (inputs[:, of].float() @ self._weight[:, of].float().T for of in slices)
            squares = torch.stack([rows.square().sum() for rows in added])
        self._squares += squares.to("cpu", torch.float64)

    def value(self) -> Tensor:
        return self._squares.sqrt()


class Refit:
    """The weights of kept inputs that make a projection's outputs closest to those of all inputs.

    Least squares on the observed tokens: with x the kept inputs and r what the other inputs added,
    the change D (and d, where there is a bias) minimises the sum of ‖Dx + d - r‖² plus λ‖D‖², λ
    being ``RIDGE`` of the mean sum of squares of an element of x (of its deviations, where there is
    a bias): where tokens are few, weights stay near what they were.

    Memory: 4 kept (kept + outputs) bytes for the sums, and 4 (inputs - kept) outputs for the lost
    columns in float32. Time: each token costs 2 kept (kept + outputs) + 2 (inputs - kept) outputs
    FLOPs, and the end a solution of a kept x kept system in float64 on the CPU.

    Args:
        weight: of all inputs, (outputs, inputs).
        kept: the inputs that are kept, ascending.
        bias: whether the projection has a bias.
    """

    RIDGE = 0.1

    def __init__(self, weight: Tensor, kept: Tensor, bias: bool) -> None:
        outputs, inputs = weight.shape
        left = torch.ones(inputs, dtype=torch.bool)
        left[kept] = False
        self._kept, self._left = kept.to(weight.device), left.nonzero()[:, 0].to(weight.device)
        self._lost, self._bias = weight.detach()[:, self._left].float(), bias
        here, size = weight.device, len(kept)
        self._squares = torch.zeros(size, size, device=here)
        self._products = torch.zeros(size, outputs, device=here)
        self._inputs, self._wanted = (
            torch.zeros(size, device=here),
            torch.zeros(outputs, device=here),
        )
        self._tokens = 0

    def __call__(self, inputs: Tensor, outputs: Tensor) -> None:
        x = inputs[:, self._kept].float()
        r = inputs[:, self._left].float() @ self._lost.T
        self._squares += x.T @ x
        self._products += x.T @ r
        self._inputs += x.sum(0)
        self._wanted += r.sum(0)
        self._tokens += len(x)

    def changes(self) -> tuple[Tensor, Tensor]:
        """D, (outputs, kept), and d, (outputs,); d is zero without a bias."""
        squares, products, total, wanted = (
            sums.to("cpu", torch.float64, copy=True)
            for sums in (self._squares, self._products, self._inputs, self._wanted)
        )
        mean, wanted = total / self._tokens, wanted / self._tokens
        if self._bias:
            squares = squares - self._tokens * torch.outer(mean, mean)
            products = products - self._tokens * torch.outer(mean, wanted)
        ridge = self.RIDGE * squares.diagonal().mean()
        if not ridge > 0:  # kept inputs that never change explain nothing
            change = torch.zeros_like(products).T
        else:
            squares.diagonal().add_(ridge)
            change = torch.linalg.solve(squares, products).T
        return change, wanted - change @ mean if self._bias else torch.zeros_like(wanted)
