"""Where the engine keeps what it can make again: quantised weights, compiled kernels. Safe to delete at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """The folder for one kind of content, which may not exist yet.

    $ENGINE_CACHE, or else `sharq-engine` in $XDG_CACHE_HOME or ~/.cache.
    """
    own = os.environ.get("ENGINE_CACHE")
    if own:
        return Path(own).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sharq-engine" / kind
