"""Suggest the valid names nearest to a misspelt one, and print names and error messages as one line."""

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ArgumentError(ValueError):
    """Report a wrong argument of a function.

    The message begins with the argument's name; the command line puts the dashes of a flag before it.
    """


def with_former_names(**former: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator by which a function still takes arguments by their former names (former name -> name),
    with a FutureWarning that says the present one.

    The function raises TypeError where both are given.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> T:
            for old in former.keys() & given.keys():
                new = former[old]
                if new in given:
                    raise TypeError(f"{function.__name__}: {old} is the former name of {new}; give {new} alone")
                text = f"{function.__name__}: {old} is called {new} now"
                warnings.warn(text, FutureWarning, stacklevel=2)
                given[new] = given.pop(old)
            return function(*args, **given)

        return call

    return decorate


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the text " (did you mean a, b?)" with up to three valid names that resemble `name`, or ""."""
    close = difflib.get_close_matches(name.lower(), list(valid), n=3, cutoff=0.4)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def pick(flag: str, name: str, valid: Iterable[str]) -> str:
    """Return the valid name that `name` spells, ignoring case, dashes and underscores.

    Raises ValueError, one line that names the flag and the nearest valid names, if there is none.
    """
    names = list(valid)
    squeezed = {"".join(c for c in n.lower() if c.isalnum()): n for n in names}
    exact = squeezed.get("".join(c for c in name.lower() if c.isalnum()))
    if exact is None:
        raise ValueError(f"--{flag} {name}: unknown{nearest(name, names)}; valid: {', '.join(names)}")
    return exact


def shown(text: object) -> str:
    """Return `text`, most often a file's name, as one line that is safe to print on a terminal.

    Characters that are not printable (line ends, escape sequences, marks of writing direction, bytes that are
    not UTF-8) are escaped as in a Python string.
    """
    line = str(text)
    return line if line.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in line)


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """Return the first line of an error's message. If the message is empty, return `otherwise`, or the name of
    the error's type if that is None."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__ if otherwise is None else otherwise


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
