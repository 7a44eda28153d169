"""Imports follow the direction that data flows."""

import ast
import functools
import graphlib
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import movae_fast
from movae_fast import ops
from movae_fast.cli import COMMANDS

ROOT = Path(movae_fast.__file__).parent
# Layer -> the layers of this package that it may import.
LEAVES = {"bounds", "choices", "exchange", "files", "lazy", "names", "own_code", "reference"}
IN_TRAINING = {
    "ops",
    "nn",
    "aggregation",
    "jacobian",
    "projected_step",
    "models",
    "objectives",
    "schedules",
    "data",
}
ALLOWED = {
    "__init__": {"api"},  # for type checkers: a name of it is imported when it is first used
    "__main__": {"cli", *LEAVES},
    "bounds": set(),
    "choices": set(),
    "exchange": set(),
    "files": set(),
    "lazy": set(),
    "names": set(),
    "own_code": set(),
    "reference": {"choices"},
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
    "training": {*IN_TRAINING, *LEAVES},
    "priors": {"training", *IN_TRAINING, *LEAVES},
    "evaluation": {"priors", "training", *IN_TRAINING, *LEAVES},
    "sweeps": {"evaluation", "priors", "training", *IN_TRAINING, *LEAVES},
    "pages": {"evaluation", "priors", "training", "pictures", "plots", *IN_TRAINING, *LEAVES},
    "pictures": {*LEAVES},
    "plots": {*LEAVES},
    "run_pictures": {"evaluation", "training", *IN_TRAINING, "pictures", "plots", *LEAVES},
    "api": {"run_pictures", "evaluation", "training", *IN_TRAINING, "pictures", "plots", *LEAVES},
}
# A search does not follow the link to the kernels.
FILES = sorted({*ROOT.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")})


def layer(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_names(nodes, path):
    """Every name that is imported, in full: movae_fast.nn.codebook.Codebook."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            # The kernels alone do not know the package's name.
            assert node.level <= (layer(path) == "kernels"), f"{path}: relative import"
            package = [*module(path).split(".")[: -node.level], node.module] if node.level else [node.module]
            yield from (".".join([*filter(None, package), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def every_node(path):
    return list(ast.walk(parsed(path)))


def imported_layers(path):
    for name in imported_names(every_node(path), path):
        parts = name.split(".")
        if parts[0] == "movae_fast" and len(parts) > 1 and parts[1] != "__version__":
            yield parts[1]


def module(path):
    return ".".join(["movae_fast", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        here = layer(path)
        if here == "cli":
            continue  # the end of the chain imports what it likes
        for there in imported_layers(path):
            if there != here and there not in ALLOWED[here]:
                wrong.append(f"{path.relative_to(ROOT)}: {here} imports {there}")
    assert wrong == []


def test_nothing_imports_the_command_line():
    below = [path for path in FILES if layer(path) not in ("cli", "__main__")]
    assert [str(path.relative_to(ROOT)) for path in below if "cli" in set(imported_layers(path))] == []


def module_of(path):
    return ".".join(("movae_fast", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(path, names):
    """Modules of this package that a file imports, wherever in it.

    The package's version is no module: it is there before anything is imported.
    """
    for node in every_node(path):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if alias.name != "__version__":
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


def test_commands_do_not_import_each_other():
    for command in COMMANDS:
        path = ROOT / "cli" / f"{command}.py"
        for name in imported_names(every_node(path), path):
            parts = name.split(".")
            if parts[:2] == ["movae_fast", "cli"] and len(parts) > 2:
                assert parts[2] == command or parts[2] not in COMMANDS, f"{command} imports {parts[2]}"


def test_no_module_imports_itself_by_way_of_others():
    modules = {module(path): path for path in FILES}
    imports = {}
    for name, path in modules.items():
        names = imported_names(parsed(path).body, path)
        imports[name] = {n if n in modules else n.rpartition(".")[0] for n in names} - {name}
    for name in modules:
        seen, ahead = set(), [name]
        while ahead:
            ahead += (found := imports.get(ahead.pop(), set()) - seen)
            seen |= found
        assert name not in seen, f"{name} imports itself by way of others"


def test_every_layer_is_below_the_next():
    """What is allowed has no circle: layers can be taken off the top, one after the other."""
    left = {name: there & set(ALLOWED) for name, there in ALLOWED.items()}
    while left:
        top = [name for name in left if not any(name in there for there in left.values())]
        assert top, f"a circle among {sorted(left)}"
        for name in top:
            del left[name]


def test_a_library_error_names_an_argument_and_no_flag():
    """Where a layer above training raises, the command line adds the dashes."""
    for path in FILES:
        if layer(path) in ("evaluation", "priors", "sweeps"):
            raised = [node for node in every_node(path) if isinstance(node, ast.Raise)]
            for text in (
                n.value
                for r in raised
                for n in ast.walk(r)
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ):
                assert not text.startswith("--"), f"{path.name}: {text}"


# Folder or module of data/ -> what it may not import of data/.
DATA_FORBIDDEN = {
    "sources": {"datasets", "loaders", "prepare", "prepared", "prepared_format", "unreadable"},
    "datasets": {"loaders", "prepare", "prepared", "prepared_format", "unreadable"},
    "loaders": {"datasets", "prepare", "prepared", "prepared_format", "unreadable"},
    "prepared_format": {"loaders", "prepare", "prepared"},
    "prepared": {"loaders", "prepare"},
}


def data_imports():
    """Return {module of movae_fast.data: the modules of movae_fast.data that it imports}."""
    paths = {
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in (ROOT / "data").rglob("*.py")
    }
    graph = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in every_node(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("movae_fast.data"):
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {m if m in paths else node.module for m in members}
    return graph


def test_data_has_no_import_circle():
    graph = data_imports()
    assert len(graph) > 20
    assert sum(map(len, graph.values())) > 60
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_datasets_and_loaders_know_sources_but_not_each_other():
    for name, imported in data_imports().items():
        here = name.removeprefix("movae_fast.data").lstrip(".").partition(".")[0]
        for other in imported:
            there = other.removeprefix("movae_fast.data").lstrip(".").partition(".")[0]
            assert there, f"{name} imports the whole of movae_fast.data"
            assert there == here or there not in DATA_FORBIDDEN.get(here, set()), f"{name} imports {other}"


SECTIONS = ["dispatch", "CPU", "CUDA", "fake", "autograd"]
OP_FILES = sorted({Path(getattr(ops, name).__code__.co_filename) for name in ops.__all__})


@pytest.mark.parametrize("path", OP_FILES, ids=lambda p: p.stem)
def test_an_op_file_has_one_order_of_sections(path):
    """The public function comes first, then what a call meets on its way."""
    source = path.read_text(encoding="utf-8")
    rules = [(m.start(), m[1]) for m in re.finditer(r"^# --- (\w+) -+$", source, re.MULTILINE)]
    names = [name for _, name in rules]
    assert [name for name in SECTIONS if name in names] == names, names
    assert {"CPU", "fake", "autograd"} <= set(names)
    public = set(ops.__all__)
    line_of_first_rule = source[: rules[0][0]].count("\n")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in public:
            assert node.lineno < line_of_first_rule, node.name
            public.remove(node.name)
    assert public != set(ops.__all__), "no public function"


def test_the_fallback_is_the_reference():
    """An op has three definitions: reference.py, C++ and Triton. What stands in for C++ calls the first."""
    for path in OP_FILES:
        for node in every_node(path):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_in_torch"):
                called = {n.func.value.id for n in ast.walk(node) if is_method_call(n)}
                assert "reference" in called, f"{path.name}: {node.name}"


def is_method_call(node):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
    )


LONGEST = 60  # lines of a function, which is a screen
# `backward` is a public function: two thirds of its lines are the docstring.
LONGER = {"jacobian.backward"}


def test_a_function_fits_a_screen():
    long = set()
    for path in FILES:
        if layer(path) != "kernels":
            for node in every_node(path):
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST:
                    long.add(f"{path.stem}.{node.name}")
    assert long == LONGER


def test_every_name_that_is_imported_exists():
    """Packages that export lazily hide a missing name from type checkers and from an import of the module."""
    imported = {
        (node.module, alias.name)
        for path in FILES
        if layer(path) != "kernels"
        for node in every_node(path)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("movae_fast.")
        for alias in node.names
    }
    assert len(imported) > 800
    missing = [
        f"{module}.{name}"
        for module, name in sorted(imported)
        if not hasattr(importlib.import_module(module), name)
        and importlib.util.find_spec(f"{module}.{name}") is None
    ]
    assert missing == []
