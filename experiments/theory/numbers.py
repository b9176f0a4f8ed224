"""Numbers in tables."""

from __future__ import annotations


def short(value: float, digits: int = 3) -> str:
    """With so many significant digits, and no exponent where a reader can do without."""
    return f"{float(f'{value:.{digits}g}'):,g}"


def with_error(value: float, error: float) -> str:
    """The error with one significant digit."""
    return f"{short(value)} ± {short(error, 1)}"
