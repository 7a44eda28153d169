"""Define and check the words of `movae completion`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from movae_fast.names import nearest

SHELLS = ("bash", "zsh", "tcsh")
HELP = """usage: movae completion bash|zsh|tcsh

Print a script that completes movae's commands, flags and names in a shell. For bash:
  movae completion bash > ~/.local/share/bash-completion/completions/movae"""


def parse(argv: Sequence[str]) -> str | int:
    """Return the shell, or the status where the help was printed. Raises ValueError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    if len(argv) > 1 or argv[0] not in SHELLS:
        word = " ".join(argv)
        raise ValueError(f"completion {word}: unknown{nearest(word, SHELLS)}; valid: {', '.join(SHELLS)}")
    if importlib.util.find_spec("shtab") is None:
        raise ValueError("completion needs the extra: pip install 'movae-fast[completion]'")
    return argv[0]
