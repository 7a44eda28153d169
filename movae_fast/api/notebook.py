"""Show a run's pictures inside a Jupyter notebook."""

from __future__ import annotations

import sys
from pathlib import Path


def running() -> bool:
    """Return whether this process is the kernel of a Jupyter notebook. IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def show_pictures(folder: Path, tag: str) -> None:
    """Show a run's loss curves, reconstructions and samples below the running cell of a notebook.

    tag: the end of the pictures' file names, which says when in training they were drawn.
    """
    from IPython.display import HTML, display

    display(HTML(pictures_html(folder, tag)))


def pictures_html(folder: Path, tag: str) -> str:
    """Return HTML with the pictures that `show_pictures` shows inside it; "" if there are none."""
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
