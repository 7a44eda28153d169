"""Helping with misspelt names."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean a, b?)" for the valid names nearest to `name`, or ""."""
    close = difflib.get_close_matches(name.lower(), list(valid), n=3, cutoff=0.4)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def pick(flag: str, name: str, valid: Iterable[str]) -> str:
    """`name` if it is one of `valid`, with dashes and case forgiven; else a one-line ValueError."""
    names = list(valid)
    squeezed = {"".join(c for c in n.lower() if c.isalnum()): n for n in names}
    found = squeezed.get("".join(c for c in name.lower() if c.isalnum()))
    if found is None:
        raise ValueError(f"--{flag} {name}: unknown{nearest(name, names)}; valid: {', '.join(names)}")
    return found
