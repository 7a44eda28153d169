"""Keep the results of slow file inspections in the user's cache folder, so that later runs need not repeat
them."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from movae_fast.files import replacing

T = TypeVar("T")


def cached_on_disk(name: str, work: Callable[[], T], lasting: Callable[[], bool] = lambda: True) -> T:
    """Return work(), or the result of an earlier call under the same `name`, in any run of this user.

    A result must be representable as JSON. `lasting` is called after `work`; if it returns False, the result is
    not stored. A stored result that was damaged is computed again.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "movae" / f"{name}.json"
    with suppress(OSError, ValueError):
        crc, _, text = path.read_bytes().partition(b"\n")
        if int(crc, 16) == zlib.crc32(text):
            return json.loads(text)
    result = work()
    if not lasting():
        return result
    # If the home folder cannot be written, the next run takes longer; this one goes on.
    with suppress(OSError), replacing(path) as file:
        text = json.dumps(result).encode()
        file.write(b"%08x\n" % zlib.crc32(text) + text)
    return result
