"""The folder for what can be recreated: converted models, unpacked vectors, passed checks, files of remote roots."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`TLCAPTURE_CACHE`, or `tlcapture` in the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("TLCAPTURE_CACHE") or platformdirs.user_cache_dir("tlcapture"))
