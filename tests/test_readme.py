"""The README and the pages of docs/: their Python runs, their commands parse, what they name is there."""

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from movae_fast import __version__, aggregation, jacobian, nn, ops
from movae_fast.aggregation.registry import AGGREGATORS
from movae_fast.cli import COMMANDS, main
from movae_fast.cli.parsing import ALIASES
from movae_fast.data import DATASETS
from movae_fast.models import MODELS
from movae_fast.objectives import OBJECTIVES
from tests.test_layout import ALLOWED, LEAVES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def project_table(name: str) -> str:
    """Return the text of a table of pyproject.toml."""
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8").split(f"[{name}]\n")[1].split("\n[")[0]


SNIPPETS = [
    pytest.param(source, id=f"{name}-{number}")
    for page, name in zip(PAGES, NAMES, strict=True)
    for number, source in enumerate(blocks(page, "python"), 1)
]


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in a page's shell blocks."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMAND_LINES = [
    pytest.param(words, id=f"{name}: {' '.join(words)}"[:120])
    for page, name in zip(PAGES, NAMES, strict=True)
    for words in commands(page)
]


def test_the_readme_leads_with_the_result_and_stays_short() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert readme[4].startswith("|")
    assert len(readme) < 150
    table = [line for line in readme[4:] if line.startswith("|")][:5]
    assert "\n".join(table) in (DOCS / "index.md").read_text(encoding="utf-8")


def test_the_drop_in_parts_are_shown() -> None:
    sources = [snippet.values[0] for snippet in SNIPPETS]
    for part in ("ops.nearest_code", "ops.quantize", "VectorQuantizer", "UPGrad", "jacobian.project_step"):
        assert any(part in source for source in sources)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["title"].startswith("movae-fast")


def test_continuous_integration_runs_what_a_contributor_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert {"run": ".ci/run"} in workflow["jobs"]["checks"]["steps"]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert all(f"make {target}" in script for target in ("lint", "docs", "test"))


@every_page
def test_no_placeholder_is_left(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")


@pytest.fixture
def registries():
    """Take out again what a page's example adds to them."""
    kept = [(registry, dict(registry)) for registry in (MODELS, OBJECTIVES, DATASETS)]
    yield
    for registry, values in kept:
        registry.clear()
        registry.update(values)


@pytest.mark.parametrize("source", SNIPPETS)
def test_snippet(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request, registries) -> None:
    name = re.sub(r"\W", "_", f"page_{request.node.callspec.id}")
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.import_module(name)


COLLECTION = "encoder: {params: {z_dim: 128}}\ndata: {target: src.data.CelebA}\ntrain: {n_steps: 10}\n"


@pytest.fixture
def parsed(tmp_path, monkeypatch, capsys):
    """Parse a command line of movae as it is, and run nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vae-celeba.yaml").write_text(COLLECTION)

    def parse(command: str, *words: str) -> None:
        if command == "doctor":
            assert words in ((), ("--gpu",))
            return
        if "--resume" in words:  # of a run that is not there
            words = tuple(w for i, w in enumerate(words) if "--resume" not in words[max(i - 1, 0) : i + 1])
        if command == "sweep" and "--config" in words:
            name = words[words.index("--config") + 1]
            assert (ROOT / "movae_fast" / "sweeps" / f"{name}.yaml").is_file()
        last = "--help" if command in ("sweep", "data") else "--print_config"
        try:
            status = main([command, *words, last])
        except SystemExit as stop:
            status = stop.code
        assert status in (0, None), capsys.readouterr().err

    return parse


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_command_parses(words: list[str], parsed) -> None:
    program, *rest = words
    if program == "torchrun":
        launcher, module = rest[: rest.index("-m")], rest[rest.index("-m") + 1]
        assert module == "movae_fast"
        assert all(word.startswith("--nproc_per_node=") for word in launcher)
        program, rest = "movae", rest[rest.index("-m") + 2 :]
    if program == "movae":
        parsed(*rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "pip":
        extras = re.findall(r"^([\w-]+) = \[", project_table("project.optional-dependencies"), re.MULTILINE)
        for named in re.findall(r"\[([\w,-]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= set(extras)
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
        assert all((ROOT / word).is_file() for word in rest[2:] if word.endswith(".py"))
    else:
        pytest.fail(f"what is {program}?")


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag that some command's help has, and other systems' spellings."""
    found = {"gpu", "help", "help-all", "print_config", "nproc_per_node", "recons_objective"}
    for command in COMMANDS:
        words = ["data", "list"] if command == "data" else [command]
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            main([*words, "--help-all" if command == "train" else "--help"])
        found |= set(re.findall(r"--([\w.]+)", shown.getvalue()))
    return found | set(ALIASES)


@every_page
def test_flags_exist(page: Path, flags: set[str]) -> None:
    for span in code_spans(page):
        for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", span):
            assert flag in flags or flag.split(".")[0] in flags, f"{page.name}: `{span}`"


PATH = re.compile(r"^(?:movae_fast|tests|csrc|kernels|benchmarks|docs|examples)/[\w./-]*$")


@every_page
def test_files_exist(page: Path) -> None:
    for span in code_spans(page):
        if PATH.match(span):
            assert (ROOT / span).exists(), f"{page.name}: `{span}`"
    if page.parent == ROOT:  # the pages' own links are mkdocs's to check
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page)):
            assert "://" in target or (ROOT / target).exists(), f"{page.name}: {target}"


@every_page
def test_quotations_are_in_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, source in re.findall(r'^```py title="(.*?)"\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        code = {line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()}
        for line in source.splitlines():
            assert line.strip() in code, f"{page.name} quotes {file}: {line.strip()}"


def test_the_house_is_as_drawn() -> None:
    (drawing,) = (block for block in blocks(DOCS / "architecture.md", "text") if "reference.py" in block)
    folder = ROOT
    for line in drawing.splitlines():
        indent = len(line) - len(line.lstrip())
        folder = ROOT if indent == 0 else ROOT / "movae_fast"
        for name in re.findall(r"^(?:[\w.]+(?:/|\.py) *)+", line.strip()):
            for one in name.split():
                assert (folder / one).exists(), line


def test_the_import_law_is_as_written() -> None:
    written: dict[str, set[str]] = {}
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|$", prose(DOCS / "architecture.md"), re.MULTILINE)
    for layers, allowed in rows:
        for layer in re.findall(r"`(\w+)`", layers):
            if layer in ALLOWED:
                written[layer] = (
                    set() if allowed.startswith("nothing") else set(re.findall(r"`(\w+)`", allowed))
                )
    expected = {layer: allowed - LEAVES for layer, allowed in ALLOWED.items() if not layer.startswith("__")}
    assert written == expected


def test_all_models_aggregators_and_datasets_are_listed() -> None:
    spans = code_spans(DOCS / "what_there_is.md")
    named: set[str] = set()
    family = ""
    for span in spans:
        if re.fullmatch(r"_\d+", span):  # of `cnn_vae_28`, `_32`, `_64`
            named.add(family + span)
        else:
            named.add(span)
            family = re.sub(r"_\d+$", "", span)
    assert named >= {*MODELS, *AGGREGATORS, "sum", *DATASETS}


def test_all_recipes_are_listed() -> None:
    table = prose(DOCS / "what_there_is.md").split("\n## Recipes\n")[1]
    listed = [
        span for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for span in row.split("`")[1::2]
    ]
    patterns = [re.compile(re.sub(r"[A-Z]{2,}", r"\\w+", span)) for span in listed]  # `provlae/DATASET-port`
    folder = ROOT / "movae_fast" / "recipes"
    recipes = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    assert [name for name in recipes if not any(p.fullmatch(name) for p in patterns)] == []
    assert [p.pattern for p in patterns if not any(p.fullmatch(name) for name in recipes)] == []


def test_all_extras_are_listed() -> None:
    listed = re.findall(r"^\| (`.*?`) \|", prose(DOCS / "install.md"), re.MULTILINE)
    extras = re.findall(r"^([\w-]+) = \[", project_table("project.optional-dependencies"), re.MULTILINE)
    assert set(extras) <= set(re.findall(r"`([\w-]+)`", " ".join(listed)))


@pytest.mark.parametrize(
    ("page", "module"), [("ops", ops), ("jacobian", jacobian), ("aggregation", aggregation), ("nn", nn)]
)
def test_the_reference_has_every_public_name(page: str, module) -> None:
    text = (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8")
    for name in module.__all__:
        assert re.search(rf"\b{name}\b", text), name


def test_a_docstrings_arguments_become_a_list() -> None:
    pytest.importorskip("griffe", reason="pip install 'movae-fast[docs]'")
    as_markdown = runpy.run_path(str(DOCS / "docstrings.py"))["as_markdown"]
    text = "Add a * b < c.\n\nrows, out: [m, P]\n    more\nweights: [m]\n\nrows: this is\nprose."
    assert as_markdown(text, {"rows", "out", "weights"}) == (
        "Add a \\* b &lt; c.\n\n- `rows`, `out`: [m, P]\n    more\n- `weights`: [m]\n\nrows: this is\nprose."
    )
