"""Import a module when something in it is first used, so that a process that uses none of it does not pay for
it.

A place is written "package.module:name".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

Value = TypeVar("Value")


def resolve(place: str) -> Any:
    """Return what is at a place, importing its module."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def exports(
    package: str, names: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that exports `names` (module -> names in it).

    A name becomes an attribute of the package at its first use. The package imports the same names where
    TYPE_CHECKING is true, for who reads the code without running it.
    """
    places = {name: f"{package}.{module}:{name}" for module, inside in names.items() for name in inside}
    this = import_module(package)

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = resolve(places[name])
        setattr(this, name, value)
        return value

    return get, lambda: sorted({*vars(this), *places})


@dataclass(frozen=True)
class Later:
    """Stand for a function at a place, imported at its first call; with `made_from`, for one that a
    function there makes."""

    place: str
    made_from: tuple[Any, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = resolve(self.place)
        return (function(*self.made_from) if self.made_from else function)(*args, **kwargs)


class Registry(MutableMapping[str, Value]):
    """Hold values by name, as a dict; a value that is given by its place is imported when it is looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = dict(places)
        self.values_by_name: dict[str, Value | None] = dict.fromkeys(places)

    def __getitem__(self, name: str) -> Value:
        value = self.values_by_name[name]
        if value is None:
            value = self.values_by_name[name] = resolve(self.places[name])
        return value

    def __setitem__(self, name: str, value: Value) -> None:
        self.values_by_name[name] = value

    def __delitem__(self, name: str) -> None:
        del self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __contains__(self, name: object) -> bool:  # without an import
        return name in self.values_by_name

    def built_in(self, name: str) -> bool:
        """Return whether the name still stands for what it was given at the start."""
        if name not in self.places or name not in self.values_by_name:
            return False
        value = self.values_by_name[name]
        return value is None or value is resolve(self.places[name])
