"""Which small records of a cache serve nothing that stays: digests of ranges, transforms, verdicts on backends.

None of them says who needs it, so it is asked the other way round. A digest saves reading its range where a finished
shard was made of that content, whatever was done to it. A transform's record says that finished shards may be found
under its key. A verdict keeps a backend from a tokenizer that something here was made with.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moai.cache.ledger import Ledger
from moai.core.errors import DamagedError
from moai.core.fsops import read_regular
from moai.prepared.manifest import read_manifest

_MOST_BYTES = 1 << 16


def useless(
    cache: Path, *, shards: Iterable[str], directories: Iterable[Path], plans: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[str, list[Path]]]:
    """(what they are, paths) of the records of which none of these shards, directories and plans speaks."""
    receipts = [receipt for key in shards if (receipt := Ledger(cache).receipt(key))]
    contents = {receipt.raw.digest for receipt in receipts}
    transforms = {receipt.transform_key for receipt in receipts}
    tokenizers = {receipt.made_by.get("tokenizer_sha256", "") for receipt in receipts}  # it, or its beginning
    tokenizers |= {str(record["fields"]["tokenizer"].get("tokenizer_sha256", "")) for record in plans}
    for directory in directories:
        with contextlib.suppress(DamagedError):
            tokenizers.add(read_manifest(directory)["content"]["tokenizer_digest"])
    yield "digests of input of which no finished shard is left", _ranges(cache, contents)
    unused = [path for path in records_in(cache / "transforms") if path.stem not in transforms]
    yield "records of transforms of which no finished shard is left", unused
    verdicts = [path for path in records_in(cache / "distrusted") if not _is_about(path, tokenizers)]
    yield "verdicts on tokenizer backends with whose tokenizer nothing here was made", verdicts


def listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def records_in(folder: Path) -> list[Path]:
    """Finished JSON files; no links."""
    return [
        path
        for path in listed(folder)
        if path.suffix == ".json" and not path.name.startswith(".") and path.is_file() and not path.is_symlink()
    ]


def _ranges(cache: Path, contents: set[str]) -> list[Path]:
    """A stream's ends are used only where the digest of each of its ranges is known: each must be of a size that a kept
    one has.
    """
    records = {
        path: Ledger(cache).known(path.stem) or {} for folder in listed(cache / "ranges") for path in records_in(folder)
    }
    kept = {path for path, record in records.items() if record.get("digest") in contents}
    sizes = {tuple(records[path]["bytes"]) for path in kept}
    for path, record in records.items():
        ends = record.get("ends")
        if ends and all((end - start,) in sizes for start, end in zip([0, *ends], ends)):
            kept.add(path)
    return [path for path in records if path not in kept]


def _is_about(verdict: Path, tokenizers: set[str]) -> bool:
    """Whether it is a verdict, over one of these."""
    try:
        wrong = str(json.loads(read_regular(verdict, _MOST_BYTES))["made_by"]["tokenizer_sha256"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(wrong) and any(digest.startswith(wrong) for digest in tokenizers)
