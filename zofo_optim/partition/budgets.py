"""Budgets as a user says them: shares, and bytes."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from ..plain import plain

KINDS = ("flops", "memory")
_UNITS = {
    **{"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40},
}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)\s*", re.IGNORECASE)
_FORMS = "a share in (0, 1], such as 0.6 or '60%'"
_BYTES = ", or bytes, such as '12GB', '800MiB' or an int"


class Budget(NamedTuple):
    """A share of what full first-order training takes, or the bytes that training may take."""

    share: float | None
    peak: int | None
    """Bytes in all, weights included; None where it is a share."""


def parse_budget(budget: Any, of: str) -> Budget:
    """What ``budget=`` and ``of=`` of :func:`importance_partition` say.

    Args:
        budget: a float in (0, 1] or a percentage is a share; for ``of="memory"`` also a string
            with a unit (B, kB, MB, GB, TB; KiB, MiB, GiB, TiB) or an int > 1 of bytes.
        of: "flops" or "memory".

    Raises:
        TypeError: ``budget`` is neither a number nor a string.
        ValueError: it is no such share or number of bytes, or ``of`` is something else.
    """
    if of not in KINDS:
        raise ValueError(f"of must be one of {KINDS}, got {of!r}")
    must = f"budget must be {_FORMS}{_BYTES if of == 'memory' else ''} where of={of!r}"
    value = plain(budget)
    if isinstance(value, str):
        return _of_text(value, of, must)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{must}, got {budget!r}")
    if isinstance(value, int) and value > 1 and of == "memory":
        return Budget(None, value)
    return Budget(_share(float(value), must, budget), None)


def kind_of(budget: Any) -> str:
    """What a budget limits where nobody says it: memory if it has a unit or is an int above 1."""
    value = plain(budget)
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value)
        return "memory" if found is not None and found[2].upper() in _UNITS else "flops"
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return "memory" if is_number and value > 1 else "flops"


def _of_text(text: str, of: str, must: str) -> Budget:
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise ValueError(f"{must}, got {text!r}")
    number, unit = float(found[1]), found[2].upper()
    if unit in ("", "%"):
        return Budget(_share(number / 100 if unit else number, must, text), None)
    if of != "memory" or unit not in _UNITS:
        raise ValueError(f"{must}, got {text!r}")
    count = number * _UNITS[unit]
    if not 1 <= count < math.inf:
        raise ValueError(f"{must}, got {text!r}")
    return Budget(None, int(count))


def _share(value: float, must: str, given: Any) -> float:
    if not 0.0 < value <= 1.0:  # NaN is neither
        raise ValueError(f"{must}, got {given!r}")
    return value


def shown(number: float, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 G."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale * 0.9995:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()
