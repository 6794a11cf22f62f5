"""A prepared directory: what `datasets.load_from_disk` opens, and the manifest that says what it must be.

    data-00000-of-00012.arrow ...  state.json  dataset_info.json    for `datasets`
    tokenizer.json                                                  the bytes that made the ids
    quarantine.jsonl                                                bad records with file, line, offset and reason, if any
    manifest.json                                                   written last: without it the directory is nothing

The manifest has two parts. `content` follows from input and configuration alone and is the same for any number of workers;
`run` tells how it came about this time. What is read here may come from anywhere: a directory is opened only if its manifest has
the shape of one, names nothing outside, and lists regular files of just these sizes.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.errors import DamagedError
from moai.files import canonical_json, digest_json, is_plain_name
from moai.fsops import kind_of, look_at, read_regular
from moai.sinks.arrow import features

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


_POLL_SECONDS = 0.1
_MOST_BYTES = 1 << 28
"""A manifest takes some 350 bytes a shard: this is hundreds of thousands of them. A file beyond is none, and is not read into memory."""
_SHARD = {
    "file": (str, type(None)), "rows": int, "bytes": int, "xxh3_128": str, "shard_key": str, "source": str, "documents": int, "tokens": int, "raw_digest": str,
}  # fmt: skip
_SHAPE = {
    "content": {
        "format_version": int, "recipe": str, "config": dict, "seq_len": int, "packing": str, "dtype": frozenset({"uint16", "uint32"}), "vocab_size": int,
        "tokenizer": {"tokenizer_sha256": str, "eos_id": int, "bos_id": (int, type(None)), "eos_token": str}, "tokenizer_digest": str,
        "rows": int, "tokens": int, "fill_rate": float, "documents": int, "records": {"read": int, "kept": int, "filtered": int, "quarantined": int},
        "filtered": {"*": int}, "quarantined": {"*": int}, "token_counts": {"text": int, "eos": int, "rows": int, "*": int},
        "sources": [{"name": str, "kind": str, "shards": int}], "shards": [_SHARD], "files": [{"file": str, "bytes": int, "xxh3_128": str}],
    },
    "content_digest": str, "run": dict,
}  # fmt: skip
"""What a reader relies on. In a list every entry has the shape, and under `*` every value of an object; numbers are not negative."""
_CHAT_SHAPE = {
    "template": {"source": str, "with_tools": str, "tokens": {"*": str}, "date": (str, type(None))}, "counts": {"examples": int, "turns": int, "*": int},
}  # fmt: skip
"""Of `content.chat`, which only conversations have."""


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

    @property
    def is_chat(self) -> bool:
        """Rows of conversations, which have `trained_runs`."""
        return is_chat(self.manifest)

    @classmethod
    def open(cls, path: Path, *, memory_mode: str = "balanced", patience_seconds: float = 0.0) -> Prepared:
        """Raises DamagedError, naming file and difference, unless the manifest is whole and every file has its size.

        A directory that another process has just published may show up late on a shared file system: so long its absence is not believed.
        """
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                return cls._open(path, memory_mode)
            except DamagedError as error:
                if not isinstance(error.__cause__, FileNotFoundError) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    @classmethod
    def _open(cls, path: Path, memory_mode: str) -> Prepared:
        manifest = read_manifest(path)
        again = f"remove {path} and prepare again, or mend it: python -m moai repair {path}"
        for name, size in file_sizes(manifest).items():
            try:
                found = look_at(path / name)
            except OSError as error:
                raise DamagedError(f"{path / name}: {error.strerror}, though the manifest lists it with {size} bytes; {again}") from error
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{path / name}: {kind_of(found.st_mode)}, though the manifest lists it as a file of {size} bytes; {again}")
            if found.st_size != size:
                raise DamagedError(f"{path / name}: {found.st_size} bytes, the manifest says {size}; {again}")
        return cls(path, manifest, memory_mode)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared directory. Raises DamagedError if it is absent, cut, changed in any bit, of another shape, or names odd files."""
    file = path / MANIFEST
    again = f"remove {path} and prepare again: finished shards are reused"
    try:
        data = read_regular(file, _MOST_BYTES)
        manifest = json.loads(data)
        said = manifest.pop("self_digest")
        same = (
            data == _rendered({**manifest, "self_digest": said})
            and said == digest_json(manifest)
            and manifest["content_digest"] == digest_json(manifest["content"])
        )
        version = manifest["content"]["format_version"]
    except FileNotFoundError as error:
        raise DamagedError(
            f"{path}: has no {MANIFEST}; it is not a prepared directory, or its preparation did not finish; in a cache, remove it and prepare again"
        ) from error
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{file}: not readable as a manifest ({type(error).__name__}: {str(error)[:200]}); {again}") from error
    if not same:
        raise DamagedError(f"{file}: its text does not match its own digest; {again}")
    if version != FORMAT_VERSION:
        raise DamagedError(f"{file}: format {str(version)[:40]}, this moai reads {FORMAT_VERSION}; prepare again")
    misfits = [_misfits(manifest, _SHAPE, ""), *([_misfits(manifest["content"]["chat"], _CHAT_SHAPE, "content.chat")] if is_chat(manifest) else [])]
    if misfit := next(itertools.chain.from_iterable(misfits), None):
        raise DamagedError(f"{file}: no manifest that moai wrote: {misfit}; {again}")
    _check_names(file, manifest)
    return dict(manifest)


def is_chat(manifest: Mapping[str, Any]) -> bool:
    return "chat" in manifest["content"]


def file_sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every file the manifest answers for."""
    content = manifest["content"]
    return {shard["file"]: shard["bytes"] for shard in content["shards"] if shard["file"]} | {f["file"]: f["bytes"] for f in content["files"]}


def write_manifest(path: Path, content: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """The last file of a directory in staging."""
    manifest: dict[str, Any] = {"content": content, "content_digest": digest_json(content), "run": run}
    manifest["self_digest"] = digest_json(manifest)
    write_file(path / MANIFEST, _rendered(manifest))


def write_dataset_files(path: Path, names: list[str], dtype: str, fingerprint: str, *, chat: bool = False) -> None:
    """state.json and dataset_info.json, as `datasets` 5 writes them."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names], "_fingerprint": fingerprint, "_format_columns": None, "_format_kwargs": {},
        "_format_type": None, "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    info: dict[str, Any] = {"citation": "", "description": "", "features": features(dtype, chat=chat), "homepage": "", "license": ""}
    write_file(path / "state.json", canonical_json(state))
    write_file(path / "dataset_info.json", canonical_json(info))


def write_file(path: Path, data: bytes) -> None:
    """A file in staging, durable before its directory is published."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rendered(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest: a bit may change in a file without changing what JSON reads from it (1e-5 and 1E-5)."""
    return json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def _check_names(file: Path, manifest: Mapping[str, Any]) -> None:
    """Every file is a plain name in the directory and is listed once, and only a shard without rows has none."""
    content = manifest["content"]
    names = [MANIFEST, *(entry["file"] for entry in [*content["shards"], *content["files"]] if entry["file"] is not None)]
    odd = [name for name in names if not is_plain_name(name)]
    if odd:
        raise DamagedError(f"{file}: the file name {odd[0][:80]!r} is not a plain name in its directory")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DamagedError(f"{file}: lists {name} more than once")
    if any((shard["file"] is None) != (shard["rows"] == 0) for shard in content["shards"]):
        raise DamagedError(f"{file}: a shard has rows and no file, or a file and no rows")


def _misfits(value: Any, shape: Any, place: str) -> Iterator[str]:
    """Where `value` is not as `shape` says, in words."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{place or 'the top'} is no object"
            return
        for name, inner in shape.items():
            if name == "*":
                for key, entry in value.items():
                    yield from _misfits(entry, inner, f"{place}.{key[:40]}")
            elif name not in value:
                yield f"{place}.{name} is absent".lstrip(".")
            else:
                yield from _misfits(value[name], inner, f"{place}.{name}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for index, entry in enumerate(value):
            yield from _misfits(entry, shape[0], f"{place}[{index}]")
    elif isinstance(shape, frozenset):
        if not isinstance(value, str) or value not in shape:
            yield f"{place} is {str(value)[:40]!r}"
    elif isinstance(value, bool) or not isinstance(value, shape):
        yield f"{place} is {str(value)[:40]!r}"
    elif isinstance(value, int | float) and value < 0:
        yield f"{place} is {value}"
