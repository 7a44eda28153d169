"""Imports follow the direction that data flows."""

import ast
from pathlib import Path

import pytest

import movae_fast

ROOT = Path(movae_fast.__file__).parent
# Layer -> the layers of this package that it may import.
LEAVES = {"exchange", "files", "names", "own_code", "reference"}
ALLOWED = {
    "__init__": set(),
    "__main__": {"cli", *LEAVES},
    "exchange": set(),
    "files": set(),
    "names": set(),
    "own_code": set(),
    "reference": set(),
    "kernels": set(),
    "ops": {"kernels", "_csrc", *LEAVES},
    "nn": {"ops", *LEAVES},
    "aggregation": {"ops", *LEAVES},
    "projected_step": {"ops", *LEAVES},
    "jacobian": {"ops", "aggregation", "projected_step", *LEAVES},
    "models": {"ops", "nn", *LEAVES},
    "schedules": set(),
    "objectives": {"ops", "nn", "models", "schedules", *LEAVES},
    "data": {*LEAVES},
    "training": {
        *(
            "ops",
            "nn",
            "aggregation",
            "jacobian",
            "projected_step",
            "models",
            "objectives",
            "schedules",
            "data",
        ),
        *LEAVES,
    },
    "figures": {*LEAVES},
    "metrics": {*LEAVES},
}
FILES = sorted(p for p in ROOT.rglob("*.py"))


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_layers(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "movae_fast" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = layer(path)
    if here == "cli":
        return  # the end of the chain imports what it likes
    for there in imported_layers(path):
        assert there == here or there in ALLOWED[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_the_command_line(path):
    if layer(path) not in ("cli", "__main__"):
        assert "cli" not in set(imported_layers(path))


def module_of(path):
    return ".".join(("movae_fast", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(path, names):
    """Modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_modules_import_each_other():
    """Imports for types and inside functions count: a circle that happens to load is one."""
    names = {module_of(path): path for path in FILES}
    # A package's __init__ imports its modules, and they import their siblings from those, not from it.
    graph = {name: set(imported_modules(path, names)) & names.keys() - {name} for name, path in names.items()}
    left = dict(graph)
    while loose := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in loose:
            del left[name]
    assert not left, f"in or behind a circle: {sorted(left)}"


def test_kernels_are_reached_by_one_name():
    assert (ROOT / "kernels").is_symlink()
    assert (ROOT / "kernels").resolve() == (ROOT.parent / "kernels").resolve()
