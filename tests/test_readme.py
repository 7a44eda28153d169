"""The Python of the README and of docs/ runs as it stands."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    source
    for page in PAGES
    for source in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
]


def test_the_drop_in_parts_are_shown() -> None:
    assert len(SNIPPETS) >= 3
    for part in ("ops.nearest_code", "ops.quantize", "VectorQuantizer", "UPGrad", "jacobian.project_step"):
        assert any(part in source for source in SNIPPETS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page: Path) -> None:
    assert "@@" not in page.read_text()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SNIPPETS[number]
    name = f"readme_snippet_{number + 1}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
