"""A prepared directory: what `datasets.load_from_disk` opens, and the manifest that says what it must be.

    data-00000-of-00012.arrow ...  state.json  dataset_info.json    for `datasets`
    tokenizer.json                                                  the bytes that made the ids
    quarantine.jsonl                                                bad records with file, line, offset and reason, if any
    manifest.json                                                   written last: without it the directory is nothing

The manifest has two parts. `content` follows from input and configuration alone and is the same for any number of workers;
`run` tells how it came about this time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.errors import DamagedError
from moai.files import canonical_json, digest_json, is_plain_name
from moai.sinks.arrow import features

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Prepared:
    """An opened prepared directory. `manifest` was checked against its own digest, the files against their sizes."""

    path: Path
    manifest: Mapping[str, Any]
    memory_mode: str = "balanced"

    @property
    def content(self) -> dict[str, Any]:
        return dict(self.manifest["content"])

    @property
    def content_digest(self) -> str:
        return str(self.manifest["content_digest"])

    @classmethod
    def open(cls, path: Path, *, memory_mode: str = "balanced") -> Prepared:
        """Raises DamagedError, naming file and difference, unless the manifest is whole and every file has its size."""
        manifest = read_manifest(path)
        for name, size in file_sizes(manifest).items():
            try:
                found = (path / name).stat().st_size
            except OSError as error:
                raise DamagedError(
                    f"{path / name}: {error.strerror}, though the manifest lists it with {size} bytes; remove {path} and prepare again"
                ) from error
            if found != size:
                raise DamagedError(f"{path / name}: {found} bytes, the manifest says {size}; remove {path} and prepare again")
        return cls(path, manifest, memory_mode)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared directory. Raises DamagedError if it is absent, cut, changed, or names odd files."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        said = manifest.pop("self_digest")
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: has no {MANIFEST}; it is not a prepared directory, or its preparation did not finish") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{file}: not readable as a manifest ({type(error).__name__}: {error}); remove {path} and prepare again") from error
    if said != digest_json(manifest) or manifest["content_digest"] != digest_json(manifest["content"]):
        raise DamagedError(f"{file}: its text does not match its own digest; remove {path} and prepare again")
    odd = [name for name in file_sizes(manifest) if not is_plain_name(name)]
    if odd:
        raise DamagedError(f"{file}: the file name {odd[0]!r} is not a plain name in its directory")
    if manifest["content"]["format_version"] != FORMAT_VERSION:
        raise DamagedError(f"{file}: format {manifest['content']['format_version']}, this moai reads {FORMAT_VERSION}; prepare again")
    return dict(manifest)


def file_sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every file the manifest answers for."""
    content = manifest["content"]
    return {shard["file"]: shard["bytes"] for shard in content["shards"] if shard["file"]} | {f["file"]: f["bytes"] for f in content["files"]}


def write_manifest(path: Path, content: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """The last file of a directory in staging."""
    manifest: dict[str, Any] = {"content": content, "content_digest": digest_json(content), "run": run}
    manifest["self_digest"] = digest_json(manifest)
    write_file(path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True).encode())


def write_dataset_files(path: Path, names: list[str], dtype: str, fingerprint: str) -> None:
    """state.json and dataset_info.json, as `datasets` 5 writes them."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names], "_fingerprint": fingerprint, "_format_columns": None, "_format_kwargs": {},
        "_format_type": None, "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    info: dict[str, Any] = {"citation": "", "description": "", "features": features(dtype), "homepage": "", "license": ""}
    write_file(path / "state.json", canonical_json(state))
    write_file(path / "dataset_info.json", canonical_json(info))


def write_file(path: Path, data: bytes) -> None:
    """A file in staging, durable before its directory is published."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
