"""Files so old that their time stamps prove that nothing changed since."""

from __future__ import annotations

import time
from pathlib import Path

from moai.sources.discover import discover


def wait_until_stamps_prove(folder: Path) -> None:
    while any(file.stamp.is_racy() for given in discover(str(folder)) for file in given.files):
        time.sleep(0.1)
