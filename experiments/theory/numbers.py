"""Numbers in tables and in JSON."""

from __future__ import annotations

import math
from typing import Any


def short(value: float, digits: int = 3) -> str:
    """With so many significant digits, and no exponent where a reader can do without."""
    return f"{float(f'{value:.{digits}g}'):,g}"


def strict(value: Any) -> Any:
    """As JSON can hold it: None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_error(value: float, error: float) -> str:
    """The error with one significant digit."""
    return f"{short(value)} ± {short(error, 1)}"
