"""What is derived from an object that does not change: made once, kept while the object lives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

Subject = TypeVar("Subject")
Details = ParamSpec("Details")
Result = TypeVar("Result")


def kept(
    make: Callable[Concatenate[Subject, Details], Result],
) -> Callable[Concatenate[Subject, Details], Result]:
    """``make``, called once for each object and each choice of further, hashable arguments.

    Results are kept as long as the object lives. Its class has ``eq=False``, since objects are
    told apart by identity. A result must not refer to its object, or neither is ever freed.
    """
    results: WeakKeyDictionary[Subject, dict[Any, Result]] = WeakKeyDictionary()

    @functools.wraps(make)
    def find(subject: Subject, /, *args: Details.args, **kwargs: Details.kwargs) -> Result:
        known = results.get(subject)
        if known is None:
            known = results[subject] = {}
        key = (*args, *kwargs.items())
        if key not in known:
            known[key] = make(subject, *args, **kwargs)
        return known[key]

    return find
