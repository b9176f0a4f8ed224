"""Griffe extension: Sphinx roles in docstrings, such as :class:`X`, are shown as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Mkdocstrings reads docstrings as Markdown, which has no roles."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
