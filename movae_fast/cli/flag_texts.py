"""Read what the dataclasses of flags say of each flag, without building a parser."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence


def flag_texts(sections: Sequence[type]) -> dict[str, str]:
    """Return the text of each flag, on one line, from the `Args:` of dataclasses."""
    texts: dict[str, str] = {}
    for section in sections:
        doc = inspect.getdoc(section) or ""
        _, _, arguments = doc.partition("Args:\n")
        name = ""
        for line in arguments.splitlines():
            match = re.match(r"    (\w+): (.*)$", line)
            if match:
                name = match[1]
                texts[name] = match[2]
            elif name and line.strip():
                texts[name] += " " + line.strip()
    return texts


def first_sentence(text: str) -> str:
    """Return a text up to its first full stop or semicolon, without remarks in brackets on single models."""
    text = re.sub(r" \([^)]*:[^)]*\)", "", text)
    return re.split(r"[.;](?:\s|$)", text, maxsplit=1)[0]
