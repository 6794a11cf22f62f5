"""A prepared directory: what `datasets.load_from_disk` opens, and the manifest that says what it must be.

    data-00000-of-00012.arrow ...  state.json  dataset_info.json    for `datasets`
    documents-00000.arrow ...                                       what became of each document, a file a shard
    tokenizer.json  tokenizer_config.json ...                       the bytes that made the ids, and what stood beside
                                                                    them
    quarantine.jsonl                                                bad records with file, line, offset and reason, if
                                                                    any
    held_out/                                                       the other side of --eval_ratio, in directories of
                                                                    --save_to
    manifest.json                                                   written last: without it the directory is nothing

The manifest has two parts. `content` follows from input and configuration alone and is the same for any number of
workers; `run` tells how it came about this time. Where there is a held-out side, its own manifest stands in `held_out`,
and there is none in that directory. What is read here may come from anywhere: a directory is opened only if its
manifest has the shape of one, names nothing outside, and lists regular files of just these sizes.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from moai.core.errors import ConfigError, DamagedError, StorageError
from moai.core.files import canonical_json, digest_json, is_plain_name
from moai.core.fsops import kind_of, look_at, read_regular
from moai.engine.schema import TRAINED, Column, columns_from_json, features
from moai.prepared.formats import FORMATS, PRETRAINING, misfits

FORMAT_VERSION = FORMATS[PRETRAINING].version
MANIFEST = "manifest.json"
HELD_OUT = "held_out"
"""The directory inside a prepared one with what is held out of it."""
_KEY = re.compile("[0-9a-f]{32}")
"""A dataset key, which names a directory of a cache."""
_POLL_SECONDS = 0.1
_MOST_BYTES = 1 << 28
"""A manifest takes some 350 bytes a shard: this is hundreds of thousands of them. A file beyond is none, and is not
read into memory.
"""


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
    def columns(self) -> tuple[Column, ...]:
        """Of the rows, as the shards hold them."""
        return columns_from_json(self.manifest["content"]["columns"])

    @property
    def beside(self) -> tuple[Column, ...]:
        """The columns that travel with the tokens and are no part of training, in the types they have in a batch:
        numbers with nulls are float64.
        """
        nulls = self.manifest["content"].get("nulls", {})
        found = [column for column in self.columns if column.name not in ("input_ids", "seq_lengths", TRAINED.name)]
        return tuple(
            replace(column, type="float64") if column.name in nulls and column.is_number else column for column in found
        )

    @property
    def held_out(self) -> Self | None:
        """What was held out of it, where both sides were saved together."""
        manifest = self.manifest.get(HELD_OUT)
        return type(self)(self.path / HELD_OUT, manifest, self.memory_mode) if manifest else None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        memory_mode: str = "balanced",
        patience_seconds: float = 0.0,
        recipe: str | None = PRETRAINING,
    ) -> Prepared:
        """Raises DamagedError, naming file and difference, unless the manifest is whole and every file has its size.

        recipe  what the directory must be; None for any that moai makes
        A directory that another process has just published may show up late on a shared file system: so long its
        absence is not believed.
        """
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                return cls._open(path, memory_mode, recipe)
            except DamagedError as error:
                if not isinstance(error.__cause__, FileNotFoundError) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    @classmethod
    def _open(cls, path: Path, memory_mode: str, recipe: str | None) -> Prepared:
        prepared = cls(path, read_manifest(path, recipe), memory_mode)
        prepared._check_files()
        if prepared.held_out:
            prepared.held_out._check_files()
        return prepared

    def _check_files(self) -> None:
        path = self.path
        again = f"remove {path} and prepare again, or mend it: python -m moai repair {path}"
        if path.name == HELD_OUT and path.is_symlink():
            raise DamagedError(f"{path}: a symbolic link, not a directory; {again}")
        for name, size in file_sizes(self.manifest).items():
            folder, _ = in_folder(name, self.manifest["content"])
            if folder and (path / folder).is_symlink():
                raise DamagedError(f"{path / folder}: a symbolic link, not a directory; {again}")
            try:
                found = look_at(path / name)
            except PermissionError as error:
                raise _forbidden(path / name) from error
            except OSError as error:
                raise DamagedError(
                    f"{path / name}: {error.strerror}, though the manifest lists it with {size} bytes; {again}"
                ) from error
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(
                    f"{path / name}: {kind_of(found.st_mode)}, though the manifest lists it as a file of {size} bytes; "
                    f"{again}"
                )
            if found.st_size != size:
                raise DamagedError(f"{path / name}: {found.st_size} bytes, the manifest says {size}; {again}")


def read_manifest(path: Path, recipe: str | None = PRETRAINING) -> dict[str, Any]:
    """The manifest of a prepared directory; with None, of any recipe.

    Raises DamagedError if it is absent, cut, changed in any bit, of another recipe or shape, or names odd files.
    """
    file = path / MANIFEST
    if path.name == HELD_OUT and not os.path.lexists(file) and os.path.lexists(path.parent / MANIFEST):
        around = read_manifest(path.parent, recipe)
        if HELD_OUT in around:
            return dict(around[HELD_OUT])
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
        version, made_by = manifest["content"]["format_version"], str(manifest["content"].get("recipe"))
    except FileNotFoundError as error:
        if not os.path.lexists(path):
            raise DamagedError(f"{path}: no such directory") from error
        raise DamagedError(
            f"{path}: has no {MANIFEST}; it is not a prepared directory, or its preparation did not finish; in a "
            f"cache, remove it and prepare again"
        ) from error
    except PermissionError as error:
        raise _forbidden(file) from error
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(
            f"{file}: not readable as a manifest ({type(error).__name__}: {str(error)[:200]}); {again}"
        ) from error
    if not same:
        raise DamagedError(f"{file}: its text does not match its own digest; {again}")
    if made_by not in FORMATS:
        raise DamagedError(
            f"{file}: recipe {made_by[:40]!r}, which is none of this moai's ({', '.join(FORMATS)}); prepare again"
        )
    if recipe not in (made_by, None):
        raise DamagedError(
            f"{path}: was made by {FORMATS[made_by].command}; what is needed here is made by "
            f"{FORMATS[str(recipe)].command}"
        )
    if version != FORMATS[made_by].version:
        raise DamagedError(
            f"{file}: format {str(version)[:40]}, this moai reads {FORMATS[made_by].version}; prepare again"
        )
    for side in (manifest, manifest.get(HELD_OUT)) if HELD_OUT in manifest else (manifest,):
        misfit = next(misfits(side, made_by), None)
        try:
            columns_from_json(side["content"].get("columns", ()) if not misfit else ())
        except (ConfigError, TypeError) as error:
            misfit = str(error)
        if misfit:
            raise DamagedError(f"{file}: no manifest that moai wrote: {misfit}; {again}")
        _check_names(file, side)
    here, name = Path(os.path.abspath(path)), manifest["run"].get("directory")
    if here.parent.name == "datasets" and _KEY.fullmatch(here.name) and name not in (None, here.name):
        raise DamagedError(f"{path}: its manifest is that of {name}, so it was exchanged or copied; {again}")
    if HELD_OUT in manifest and manifest[HELD_OUT]["content_digest"] != digest_json(manifest[HELD_OUT]["content"]):
        raise DamagedError(f"{file}: no manifest that moai wrote: {HELD_OUT} has another digest than it says; {again}")
    return dict(manifest)


def _forbidden(file: Path) -> StorageError:
    return StorageError(f"{file}: no permission to read it, it may be another user's: ask for it, or prepare your own")


def is_prepared(path: Path) -> bool:
    """Whether this is a prepared directory, whole or not: it is not read as data."""
    if not os.path.isfile(path / MANIFEST):  # which a name that is too long is not, either
        return False
    try:
        return str(read_manifest(path, None)["content"]["recipe"]) == PRETRAINING
    except DamagedError:
        return any(path.glob("data-*-of-*.arrow")) and (path / "tokenizer.json").is_file()


def in_folder(name: str, content: Mapping[str, Any]) -> tuple[str, str]:
    """(folder, the rest of the name): a recipe's splits are the only folders; without one, the whole name."""
    folder, _, rest = name.rpartition("/")
    return (folder, rest) if folder in FORMATS[content["recipe"]].folders else ("", name)


def listed_files(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every file the manifest answers for, each with `file`, `bytes` and `xxh3_128`: shards, their documents files, all
    others.
    """
    shards = content["shards"]
    documents = [shard["documents_file"] for shard in shards if "documents_file" in shard]
    return [*(shard for shard in shards if shard["file"] is not None), *documents, *content["files"]]


def file_sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every file the manifest answers for."""
    return {entry["file"]: entry["bytes"] for entry in listed_files(manifest["content"])}


def write_manifest(
    path: Path, content: Mapping[str, Any], run: Mapping[str, Any], held_out: Mapping[str, Any] | None = None
) -> None:
    """The last file of a directory in staging. `held_out` is the manifest of its other side."""
    write_file(path / MANIFEST, manifest_bytes(content, run, held_out))


def manifest_bytes(
    content: Mapping[str, Any], run: Mapping[str, Any], held_out: Mapping[str, Any] | None = None
) -> bytes:
    manifest: dict[str, Any] = {
        "content": content,
        "content_digest": digest_json(content),
        "run": run,
        **({HELD_OUT: held_out} if held_out else {}),
    }
    manifest["self_digest"] = digest_json(manifest)
    return _rendered(manifest)


def write_dataset_files(path: Path, names: list[str], schema: pa.Schema, fingerprint: str) -> None:
    """state.json and dataset_info.json of these shards, as `datasets` 5 writes them."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info: dict[str, Any] = {
        "citation": "",
        "description": "",
        "features": features(schema),
        "homepage": "",
        "license": "",
    }
    write_file(path / "state.json", canonical_json(state))
    write_file(path / "dataset_info.json", canonical_json(info))


def write_file(path: Path, data: bytes) -> None:
    """A file in staging, durable before its directory is published."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rendered(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest: a bit may change in a file without changing what JSON reads from it (1e-5 and
    1E-5).
    """
    return json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def _check_names(file: Path, manifest: Mapping[str, Any]) -> None:
    """Every file is a plain name in the directory and is listed once, and only a shard without rows has none."""
    content = manifest["content"]
    names = [MANIFEST, *(entry["file"] for entry in listed_files(content))]
    odd = [name for name in names if not is_plain_name(in_folder(name, content)[1])]
    if odd:
        raise DamagedError(f"{file}: the file name {odd[0][:80]!r} is not a plain name in its directory")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise DamagedError(f"{file}: lists {name} more than once")
    if any((shard["file"] is None) != (shard["rows"] == 0) for shard in content["shards"]):
        raise DamagedError(f"{file}: a shard has rows and no file, or a file and no rows")
