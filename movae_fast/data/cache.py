"""Keep the results of slow look-ups of files in the user's cache folder, from one run to the next."""

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
    """Return work(), or what JSON made of its result in an earlier call by that name in any run of this user.

    A result is kept unless `lasting`, which is asked after `work`, says no. A kept result that was damaged on
    the disk is worked out again.
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
