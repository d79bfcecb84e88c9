"""Where tinyllm keeps what it can make or fetch again: models and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """$TINYLLM_CACHE, or the user's cache folder for tinyllm. It may not exist yet."""
    chosen = os.environ.get("TINYLLM_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen))
    import platformdirs

    return Path(platformdirs.user_cache_dir("tinyllm", appauthor=False))
