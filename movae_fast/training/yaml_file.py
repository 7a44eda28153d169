"""Read YAML files of flags, with limits on size and depth, no key twice, and numbers such as 1e-4 read as
numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

LARGEST = 1 << 18  # bytes of a file
DEEPEST = 20  # levels of mappings and lists
MOST = 20_000  # values, those that an alias repeats included
MERGE = "tag:yaml.org,2002:merge"
BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML was built with it
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
KNOWN_TAGS = [None, *(f"tag:yaml.org,2002:{tag}" for tag in "null bool int float str seq map".split())]


class BeyondBoundsError(yaml.YAMLError):
    """Report that a document is deeper or larger than a file of flags can be, or contains itself."""


class FlagsLoader(BASE):
    """Load plain YAML values only: `1e-4` is a number, `off` and dates are text, and a key may occur only
    once."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, Any]]]] = {}
    yaml_constructors: ClassVar = {tag: BASE.yaml_constructors[tag] for tag in KNOWN_TAGS}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True) if key.tag != MERGE else None
            if key.tag == MERGE or not isinstance(name, str | int | float | bool):
                continue
            if name in seen:
                mark = key.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


# YAML 1.2's core schema: 1.1's octal, sexagesimal, yes/no and dates turn names and numbers into something else.
for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    FlagsLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))
# An empty value has no first character.
FlagsLoader.yaml_implicit_resolvers[""] = FlagsLoader.yaml_implicit_resolvers.pop("\0")
FlagsLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def yaml_text(values: Mapping[str, Any]) -> str:
    """Return plain values by name as the text of a YAML file, in their order."""
    try:
        return str(yaml.dump(dict(values), Dumper=DUMPER, sort_keys=False))
    except UnicodeEncodeError:  # a file's name that is not UTF-8, which libyaml does not write
        return str(yaml.dump(dict(values), Dumper=yaml.SafeDumper, sort_keys=False))


def read_yaml(path: Path, what: str) -> Any:
    """Return the value in the YAML file at `path`.

    Raises ValueError, with a one-line message that begins with `what`, for a file that cannot be read, is not
    YAML, is larger or deeper than a file of flags can be, repeats a key, or contains itself.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{what} {path} has more than {LARGEST // 1024} KiB: no file of flags is as large")
        text = path.read_text(encoding="utf-8")
        check_shape(text)
        return yaml.load(text, Loader=FlagsLoader)
    except OSError as error:
        raise ValueError(f"{what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not text in UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError, LookupError) as error:  # from PyYAML's constructors, for such as `!!int x`
        if str(error).startswith(what):
            raise
        raise ValueError(f"{what} {path} is no YAML of flags: {' '.join(str(error).split())}") from None


def check_shape(text: str) -> None:
    """Check a YAML document's depth and size without building its values; aliases count as what they stand for.

    Raises BeyondBoundsError if it is too deep or too large, or contains itself, and yaml.YAMLError if it is not
    YAML. The events of the document are read without recursion, so that depth does no harm.
    """
    sizes: dict[str | None, int] = {}  # anchor -> values that an alias to it stands for
    parents: list[tuple[str | None, int]] = []  # of each open collection: its anchor, and the values before it
    open_anchors: set[str] = set()
    total = 0
    for event in yaml.parse(text, Loader=FlagsLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            parents.append((event.anchor, total))
            total += 1
            if event.anchor:
                open_anchors.add(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = parents.pop()
            if anchor:
                open_anchors.discard(anchor)
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in open_anchors:
                raise BeyondBoundsError(f"*{event.anchor} contains itself")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        if len(parents) > DEEPEST:
            raise BeyondBoundsError(f"deeper than {DEEPEST} levels of mappings and lists")
        if total > MOST:
            raise BeyondBoundsError(f"more than {MOST:,} values, those that aliases repeat included")
