"""Refuse options of another library's layer that this package's compatible layer does not support."""

from typing import Any


def refuse(place: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise ValueError for an option that is not at the value that turns it off, and TypeError for one that
    does not exist.

    place: the name of the layer or method, for the message. given: the options that were passed. known: each
    option of the other library that is not supported here, with the value that turns it off.
    """
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{place} has no option {name!r}")
        default = known[name]
        plain = value is None or isinstance(value, bool | int | float | str)
        if not plain or value != default:
            shown = repr(value) if plain else f"a {type(value).__name__}"
            raise ValueError(f"{place} does not support {name}={shown}: leave it at {default!r}")
