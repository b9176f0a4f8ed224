"""What is wrong with a journal, or with the weights that it is applied to."""

from __future__ import annotations


class JournalError(ValueError):
    """A journal that is damaged, incomplete, or does not belong to these weights."""
