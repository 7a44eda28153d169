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


def shown(text: object) -> str:
    """Return `text`, a file's name above all, as one line that a terminal can show.

    What is not printable (line ends, escape sequences, marks of writing direction, bytes that are not UTF-8) is
    escaped as in a string of Python.
    """
    line = str(text)
    return line if line.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in line)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
