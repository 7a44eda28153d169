"""Turn the package's docstrings into Markdown for the API pages.

A docstring names its arguments at the start of a line (`rows: [m, P] float32, …`), with more lines indented. Here
each becomes an item of a list, and asterisks and angle brackets stay what they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Arguments(griffe.Extension):
    """Rewrite every docstring when it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            names = {p.name for p in obj.parameters} if isinstance(obj, griffe.Function) else set()
            if isinstance(obj, griffe.Class) and "__init__" in obj.members:
                names = {p.name for p in obj.members["__init__"].parameters}
            obj.docstring.value = as_markdown(obj.docstring.value, names)


def as_markdown(text: str, names: set[str]) -> str:
    """Return the docstring with a list item for each argument, and nothing that Markdown would take for markup."""
    lines: list[str] = []
    in_list = False
    for line in escaped(text).splitlines():
        heads = re.match(r"([\w, ]+): ?", line)
        if heads and {h.strip() for h in heads[1].split(",")} <= names:
            if not in_list and lines and lines[-1]:
                lines.append("")
            shown = ", ".join(f"`{h.strip()}`" for h in heads[1].split(","))
            lines.append(f"- {shown}: {line[heads.end() :]}")
            in_list = True
        else:
            if in_list and line and not line.startswith(" "):
                in_list = False
                if lines[-1]:
                    lines.append("")
            lines.append(line)
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return the text with `*` and `<` escaped outside of code spans."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("*", "\\*").replace("<", "&lt;") for p in parts)
