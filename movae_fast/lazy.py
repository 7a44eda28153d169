"""Import modules at first use, so that a process that does not need them starts faster.

A place is the string "package.module:name", which says where an object is to be imported from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

Value = TypeVar("Value")


def resolve(place: str) -> Any:
    """Import and return the object at a place "package.module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def exports(
    package: str, names: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the functions `__getattr__` and `__dir__` for the `__init__.py` of a package that exports names of
    its modules without importing them.

    `names` maps a module of the package to the names that are exported from it. A name is imported and set as
    the package's attribute at its first use. The package repeats these imports under `if TYPE_CHECKING:`, for
    type checkers and editors.
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
    """Call the function at a place "package.module:name", importing it at the first call.

    With `made_from`, the object at the place is a factory: it is called with `made_from`, and the function that
    it returns is called with the arguments.
    """

    place: str
    made_from: tuple[Any, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = resolve(self.place)
        return (function(*self.made_from) if self.made_from else function)(*args, **kwargs)


class Registry(MutableMapping[str, Value]):
    """Map names to values, as a dict does, where the built-in values are given by their place
    "package.module:name" and imported at their first look-up."""

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
        """Return whether the name still has the value that the registry was made with, and was not replaced or
        deleted."""
        if name not in self.places or name not in self.values_by_name:
            return False
        value = self.values_by_name[name]
        return value is None or value is resolve(self.places[name])
