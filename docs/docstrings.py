"""Turn the package's docstrings into Markdown for the API pages.

A docstring names its arguments at the start of a line (`rows: [m, P] float32, …`), with more lines indented.
Here each becomes an item of a list, and asterisks and angle brackets stay what they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Arguments(griffe.Extension):
    """Rewrite every docstring once what it describes has been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if not isinstance(obj, griffe.Class):
            rewrite(obj, {p.name for p in obj.parameters} if isinstance(obj, griffe.Function) else set())

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        init = cls.members.get("__init__")
        rewrite(cls, {p.name for p in init.parameters} if isinstance(init, griffe.Function) else set())


def rewrite(obj: griffe.Object, names: set[str]) -> None:
    """Put Markdown in the place of the docstring; `names` are the arguments that it may describe."""
    if obj.docstring is not None:
        obj.docstring.value = as_markdown(obj.docstring.value, names)


def as_markdown(text: str, names: set[str]) -> str:
    """Return the docstring with an item per argument, and nothing else that Markdown would take for markup."""
    paragraphs = re.split(r"\n\s*\n", escaped(text))
    return "\n\n".join(as_list(p, names) or p for p in paragraphs)


def as_list(paragraph: str, names: set[str]) -> str:
    """Return a paragraph of arguments as a list; empty if a line begins with anything else."""
    lines = []
    for line in paragraph.splitlines():
        head, colon, rest = line.partition(":")
        words = [word.strip() for word in head.split(",")]
        if colon and set(words) <= names:
            line = f"- {', '.join(f'`{word}`' for word in words)}:{rest}"
        elif not line.startswith("    "):
            return ""
        lines.append(line)
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return the text with `*` and `<` escaped outside of code spans."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("*", "\\*").replace("<", "&lt;") for p in parts)
