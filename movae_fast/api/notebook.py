"""Show a run's pictures inside a Jupyter notebook."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def running() -> bool:
    """Return whether this process is a notebook's kernel; nothing is imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Pictures:
    """Hold one place below a cell in which a run's newest pictures are shown."""

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, folder: Path, tag: str) -> None:
        """Show the pictures of a tag, and the loss curves, in place of those before."""
        from IPython.display import HTML, display

        page = HTML(pictures_html(folder, tag))
        if self.handle is None:
            self.handle = display(page, display_id=True)
        else:
            self.handle.update(page)


def pictures_html(folder: Path, tag: str) -> str:
    """Return a piece of HTML that holds a run's curves, and its reconstructions and samples of a tag."""
    import base64
    from html import escape

    names = ("loss_curves.png", f"reconstructions_{tag}.png", f"samples_{tag}.png")
    pieces = []
    for path in (folder / "figures" / name for name in names):
        if path.exists():
            data = base64.b64encode(path.read_bytes()).decode()
            caption = escape(path.stem.replace("_", " "))
            pieces.append(
                f'<figure style="display:inline-block;margin:4px;vertical-align:top"><figcaption>{caption}'
                f'</figcaption><img style="max-width:100%" src="data:image/png;base64,{data}" '
                f'alt="{caption}"></figure>'
            )
    return "".join(pieces)
