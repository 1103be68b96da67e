"""Docstrings for the site: Sphinx roles become code, formulas MathML, which browsers draw without a script.

Used by ``.mkdocs.yml``.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

_MATH_BLOCK = re.compile(r"^([ \t]*)\.\. math::[ \t]*(.*)\n((?:(?:\1[ \t]+.*)?\n)*)", re.MULTILINE)


def _formula(latex: str, display: str) -> str:
    """MathML of one formula, with nothing in it that Markdown would read."""
    return convert(latex, display=display).replace("*", "&#42;").replace("_", "&#95;")


def plain(text: str) -> str:
    """A docstring in Markdown.

    Args:
        text: As it stands in the source.

    Returns:
        With roles such as ``func`` as code, and ``math``, inline or as a block, as MathML.
    """

    def block(match: re.Match[str]) -> str:
        indent, first, rest = match.groups()
        body = " ".join(part.strip() for part in [first, *textwrap.dedent(rest).splitlines()] if part.strip())
        return f"{indent}{_formula(body, 'block')}\n\n"

    text = _MATH_BLOCK.sub(block, text + "\n")
    text = re.sub(r":math:`([^`]*)`", lambda match: _formula(" ".join(match[1].split()), "inline"), text)
    text = re.sub(r":\w+:`~[\w.\s]*?(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+:`\.*([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]*)``", r"`\1`", text).rstrip()


class Roles(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
