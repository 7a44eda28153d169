"""The README's Python runs as it stands."""

import importlib
import re
from pathlib import Path

import pytest

from movae_fast import aggregation

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_drop_in_parts_are_shown() -> None:
    assert len(SNIPPETS) >= 3
    for part in ("ops.nearest_code", "ops.quantize", "VectorQuantizer", "UPGrad"):
        assert any(part in source for source in SNIPPETS)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SNIPPETS[number]
    if "aggregation import UPGrad" in source and not hasattr(aggregation, "UPGrad"):
        pytest.skip("movae_fast.aggregation has no UPGrad yet")
    name = f"readme_snippet_{number + 1}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
