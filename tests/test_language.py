"""The package's language: docstrings begin with a verb, and names keep to the glossary."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted({*(ROOT / "movae_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")})
# First words of a docstring that is a noun or a clause: "The rows …", "What a step leaves", "Whether it is".
NO_VERB = set(
    "a an the this that these those what whether where which who when how of in on at by for from with without "
    "to if it its every each all any some no not one two both images rows".split()
)
# What docs/glossary.md, "Words to avoid", forbids as a name or as a part of one.
AVOIDED = re.compile(
    r"(^|_)(figures|reaching|reached|share|shares|found)(_|$)|^own_(parameters|grad)$|^StepRecord$"
)
# Names of other libraries, or of flags: their own words.
FOREIGN = {"resident_share", "share_memory_", "_found", "found_inf"}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def documented(nodes):
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), text


def test_docstrings_begin_with_a_verb() -> None:
    wrong, read = [], 0
    for path in FILES:
        for name, text in documented(nodes(path)):
            read += 1
            first = text.split()[0].strip(".,:;")
            if name.endswith("Config") or name in ("SweepFlags", "DataCommand"):
                continue  # the text is the heading of a group of flags in --help
            if not re.fullmatch(r"[A-Z][a-z]+", first) or first.lower() in NO_VERB:
                wrong.append(f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}")
    assert wrong == []
    assert read > 2000


def names(nodes):
    """Return every name that a module defines: variables, parameters, attributes, functions, classes."""
    there = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            there.add(node.name)
        elif isinstance(node, ast.arg):
            there.add(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            there.add(node.id if isinstance(node, ast.Name) else node.attr)
    return there


def test_names_keep_to_the_glossary() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in sorted(names(nodes(path)) - FOREIGN)
        if AVOIDED.search(name)
    ]
    assert wrong == []


def test_these_tests_can_fail() -> None:
    there = list(ast.walk(ast.parse('def f(share):\n    """The rows."""\n    found = 1\n')))
    assert next(text for _, text in documented(there)).split()[0].lower() in NO_VERB
    assert {n for n in names(there) if AVOIDED.search(n)} == {"share", "found"}
