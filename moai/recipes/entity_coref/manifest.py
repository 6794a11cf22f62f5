"""manifest.json of a published corpus: `content`, which follows from input and options alone, and `run`, which tells how it came about this time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moai.errors import DamagedError
from moai.files import digest_json
from moai.recipes.prepared import write_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def write_manifest(path: Path, content: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """The last file of a directory in staging."""
    manifest: dict[str, Any] = {"content": content, "content_digest": digest_json(content), "run": run}
    manifest["self_digest"] = digest_json(manifest)
    write_file(path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False).encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises DamagedError if it is absent, cut or changed, is another recipe's, or a file it lists has not its size."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        said = manifest.pop("self_digest")
        content, run = manifest["content"], manifest["run"]
        if said != digest_json(manifest) or manifest["content_digest"] != digest_json(content):
            raise DamagedError(f"{file}: its text does not match its own digest")
        if (content["recipe"], content["format_version"]) != ("entity_coref", FORMAT_VERSION):
            raise DamagedError(f"{file}: recipe {content['recipe']!r}, format {content['format_version']}; this is entity_coref, format {FORMAT_VERSION}")
        for entry in (*content["shards"], *content["files"]):
            size = (path / entry["file"]).stat().st_size
            if size != entry["bytes"]:
                raise DamagedError(f"{path / entry['file']}: {size:,} bytes, the manifest says {entry['bytes']:,}")
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename}: is not there; {path} is no whole corpus") from error
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise DamagedError(f"{file}: not readable as a manifest ({type(error).__name__}: {str(error)[:200]})") from error
    assert isinstance(run, dict)
    return {"content": content, "content_digest": manifest["content_digest"], "run": run}
