"""Docstrings as the reference shows them: with links, and examples as code."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import griffe

import gradwire


class Readable(griffe.Extension):
    """Links names in backticks, and has examples shown as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text of an object that was read from its source."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        # The heading of the section, in the parser's words.
        text = re.sub(r"(?m)^Example:$", "Examples:", text)
        # Neither ``literals`` nor links: some objects come here twice.
        text = re.sub(
            r"(?<![`\w[])`(\w+(?:\.\w+)*)`(?!`)",
            lambda match: _linked(match[1], obj.path),
            text,
        )
        obj.docstring.value = text


def _linked(name: str, within: str) -> str:
    """A name as a link, if it is another one of the SDK's."""
    if not _is_public(name) or within.rpartition(".")[2] == name:
        return f"`{name}`"
    return f"[`{name}`][gradwire.{name}]"


@cache
def _is_public(name: str) -> bool:
    first, _, member = name.partition(".")
    if first not in gradwire.__all__:
        return False
    return not member or hasattr(getattr(gradwire, first), member)
