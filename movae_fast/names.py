"""Find the valid names nearest to a misspelt one, and print names and messages as one line."""

import difflib
from collections.abc import Iterable


class ArgumentError(ValueError):
    """Report a wrong argument. The message begins with the argument's name, to which the command line adds
    the dashes."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return " (did you mean a, b?)" with the valid names nearest to `name`, or ""."""
    close = difflib.get_close_matches(name.lower(), list(valid), n=3, cutoff=0.4)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def pick(flag: str, name: str, valid: Iterable[str]) -> str:
    """Return the valid name that `name` spells, with dashes and case forgiven. Raises a one-line ValueError
    if there is none."""
    names = list(valid)
    squeezed = {"".join(c for c in n.lower() if c.isalnum()): n for n in names}
    exact = squeezed.get("".join(c for c in name.lower() if c.isalnum()))
    if exact is None:
        raise ValueError(f"--{flag} {name}: unknown{nearest(name, names)}; valid: {', '.join(names)}")
    return exact


def shown(text: object) -> str:
    """Return `text`, a file's name above all, as one line that a terminal can show.

    What is not printable (line ends, escape sequences, marks of writing direction, bytes that are not UTF-8) is
    escaped as in a string of Python.
    """
    line = str(text)
    return line if line.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in line)


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """Return the first line of an error's message; its type's name, or `otherwise`, if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__ if otherwise is None else otherwise


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
