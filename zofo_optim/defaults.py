"""Values of options that were not given, told apart from the same values given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Default:
    """What an option is where the user does not give it; printed as its value."""

    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


def default(value: Any) -> Any:
    """The same, for a signature, whose option has a type of its own."""
    return Default(value)


def given(option: Any) -> bool:
    return not isinstance(option, Default)


def value_of(option: Any) -> Any:
    """The option's value, given or not."""
    return option.value if isinstance(option, Default) else option
