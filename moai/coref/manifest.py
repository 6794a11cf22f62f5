"""manifest.json of a published corpus: written, sealed and read as that of any prepared directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moai.prepared.formats import ENTITY_COREF, FORMATS
from moai.prepared.manifest import Prepared

FORMAT_VERSION = FORMATS[ENTITY_COREF].version


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises DamagedError if it is absent, cut or changed, is another recipe's, or a file it lists has not its size."""
    return dict(Prepared.open(path, recipe=ENTITY_COREF).manifest)
