"""What an estimate is asked for: settings, and which methods have a use for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from zofo_kernels import NOISE_VERSION

from ..quantized.side_updates import RANK
from ..settings import Settings
from ..zeroth_order import QUANTIZED as CHOICES
from .torchao_weights import is_torchao, said_of

METHODS = ("zo", "hybrid", "fo", "lora")
DEVICES = ("cuda", "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BNB = ("int8", "int4")
"""Formats of bitsandbytes."""
FORMATS = (*DTYPES, *BNB)
_ZEROTH, _FIRST = ("zo", "hybrid"), ("hybrid", "fo", "lora")
USED_BY: dict[str, tuple[str, ...]] = {
    "adapter": ("hybrid", "lora"),
    "fo_optimizer": _FIRST,
    "fo": _FIRST,
    "gradient_checkpointing": _FIRST,
    "optimizer_in_backward": _FIRST,
    "coupling": ("hybrid",),
    **dict.fromkeys(
        ("quantized", "side_rank", "perturbation", "estimator", "structure", "rank"), _ZEROTH
    ),
    **dict.fromkeys(("directions", "examples_per_direction"), _ZEROTH),
    "offloaded": ("zo", "hybrid", "lora"),
}
"""Methods that have a use for a setting; all have for those that are not here."""
_BOOLS = ("gradient_checkpointing", "optimizer_in_backward", "double_quant", "offloaded")


def is_quantized(weights: Any) -> bool:
    """Whether a value of ``weights=`` is a format of integers."""
    return is_torchao(weights) or (isinstance(weights, str) and weights in BNB)


@dataclass(frozen=True)
class Asked:
    """The arguments of :func:`estimate_memory`, but the model and the batch, checked.

    Raises:
        TypeError, ValueError: see there.
    """

    method: str
    weights: Any = None
    dtype: torch.dtype | None = None
    double_quant: bool = False
    quantized: str | None = None
    side_rank: int | None = None
    adapter: Any = "default"
    fo_optimizer: str | Callable[..., Any] | None = None
    fo: Mapping[str, Any] | None = None
    gradient_checkpointing: bool = False
    optimizer_in_backward: bool = False
    coupling: float = 0.0
    perturbation: str = "in_place"
    estimator: str = "two_sided"
    structure: str = "full"
    rank: int = 1
    directions: str = "shared"
    examples_per_direction: int = 1
    offloaded: bool = False
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("device", DEVICES), ("quantized", CHOICES)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        for name in _BOOLS:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        self._check_used()
        self._check_weights()
        self._check_quantized()
        self._check_offloaded()
        _ = self.settings  # raises

    def _check_used(self) -> None:
        for field in fields(self):
            users, value = USED_BY.get(field.name, METHODS), getattr(self, field.name)
            if self.method not in users and not _is(value, field.default):
                raise ValueError(
                    f"{field.name} must be left alone where method={self.method!r}, got {value!r}: "
                    f"it is of use for {' and '.join(map(repr, users))}"
                )
        if self.fo is not None and not isinstance(self.fo, Mapping):
            raise TypeError(f"fo must be a mapping of options, got {self.fo!r}")

    def _check_weights(self) -> None:
        weights = self.weights
        known = weights is None or (isinstance(weights, str) and weights in FORMATS)
        if not known and not is_torchao(weights):
            raise ValueError(
                f"weights must be one of {(None, *FORMATS)}, or torchao's Int8WeightOnlyConfig or "
                f"IntxWeightOnlyConfig, got {weights!r}"
            )
        if self.is_quantized and self.method == "fo":
            raise ValueError(f"weights must be of floating point for method='fo', got {weights!r}")
        if self.dtype is not None and self.dtype not in DTYPES.values():
            kinds = ", ".join(map(str, DTYPES.values()))
            raise ValueError(f"dtype must be one of {kinds}, got {self.dtype!r}")
        if self.dtype is not None and not self.is_quantized:
            raise ValueError(
                f"dtype must be left alone where weights are not quantised, got {self.dtype!r}: "
                f"weights= has theirs, one of {tuple(DTYPES)}"
            )
        if self.double_quant and weights != "int4":
            raise ValueError(
                f"double_quant must be False where weights={weights!r}, got True: 'int4' has it"
            )

    def _check_quantized(self) -> None:
        if self.quantized is not None and not self.is_quantized:
            raise ValueError(
                f"quantized must be None where weights={self.weights!r}, which are not quantised, "
                f"got {self.quantized!r}"
            )
        rank = self.side_rank
        if rank is not None and self.quantized != "low_rank":
            raise ValueError(
                f"side_rank must be None where quantized={self.quantized!r}, got {rank!r}: it is "
                "of quantized='low_rank'"
            )
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"side_rank must be an int >= 1, got {rank!r}")
        if self.choice == "scales":
            for name, needed in (("perturbation", "in_place"), ("directions", "shared")):
                if getattr(self, name) != needed:
                    raise ValueError(
                        f"{name} must be {needed!r} where zeroth order moves the scales of "
                        f"quantised weights, got {getattr(self, name)!r}"
                    )

    def _check_offloaded(self) -> None:
        if not self.offloaded:
            return
        if self.is_quantized:
            raise ValueError(
                f"weights must be plain where offloaded=True, got {self.weights!r}: quantised ones "
                "cannot be offloaded"
            )
        if self.zeroth and self.perturbation != "streamed":
            raise ValueError(
                "perturbation must be 'streamed' where offloaded=True, got "
                f"{self.perturbation!r}, which writes all weights to their file in each evaluation"
            )

    # ---- what follows from them -----------------------------------------------------------------

    @property
    def zeroth(self) -> bool:
        return self.method in _ZEROTH

    @property
    def first(self) -> bool:
        return self.method in _FIRST

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.weights)

    @property
    def choice(self) -> str | None:
        """What zeroth order does of quantised weights."""
        return (self.quantized or "scales") if self.is_quantized and self.zeroth else None

    @property
    def of_side_updates(self) -> int:
        """Their rank; 0 where there are none."""
        return (self.side_rank or RANK) if self.quantized == "low_rank" else 0

    @property
    def factory(self) -> Any:
        """The class of the first-order optimizer.

        Raises:
            ValueError: ``fo_optimizer`` says none.
        """
        known = {None: torch.optim.SGD, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        given = self.fo_optimizer
        found = known.get(given) if given is None or isinstance(given, str) else given
        if not callable(found):
            raise ValueError(f"fo_optimizer must be 'sgd', 'adamw' or a class, got {given!r}")
        return found

    @property
    def settings(self) -> Settings:
        """
        Raises:
            TypeError, ValueError: as HybridZOFO does.
        """
        return Settings(
            num_samples=1,
            distribution="gaussian",
            rounding="stochastic",
            zo_rule="sgd",
            nonfinite="raise" if self.optimizer_in_backward else "skip",
            backend="auto",
            capturable=False,
            noise_version=NOISE_VERSION,
            estimator=self.estimator,
            perturbation=self.perturbation,
            structure=self.structure,
            rank=self.rank,
            directions=self.directions,
            examples_per_direction=self.examples_per_direction,
            optimizer_in_backward=self.optimizer_in_backward,
            coupling=self.coupling,
        )

    def __str__(self) -> str:
        """The method and its settings, as a line."""
        parts = [self.method] if self.weights is None else [self.method, said_of(self.weights)]
        if self.zeroth:
            low_rank = self.structure == "low_rank"
            parts.append(f"low rank {self.rank}" if low_rank else self.perturbation)
            parts += ["one direction an example"] * (self.directions == "per_example")
            parts += ["integers frozen"] * (self.choice == "frozen")
            parts += ["side updates"] * (self.choice == "low_rank")
        if self.first:
            name = self.fo_optimizer or "sgd"
            parts.append(name if isinstance(name, str) else getattr(name, "__name__", str(name)))
        parts += ["coupled"] * (self.coupling != 0)
        parts += ["checkpointed"] * self.gradient_checkpointing
        parts += ["optimizer in backward"] * self.optimizer_in_backward
        parts += ["offloaded"] * self.offloaded
        return ", ".join(parts)


def _is(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
