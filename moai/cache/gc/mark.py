"""Which small records of a cache still serve something that stays: digests of ranges, transforms, verdicts on tokenizer
backends.

    reach = Reach.of(cache, shards=keys, directories=paths, plans=records)          # those that stay
    list(reach.useless(cache))          # (what they are, paths)

None of them says who needs it, so it is asked the other way round. A digest of a range saves reading it where a
finished shard was made of that content: whatever was done to it, the receipt names it. A transform's record says that
finished shards may be found under its key. A verdict keeps a backend from a tokenizer that something here was made
with.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.cache.ledger import Ledger
from moai.core.errors import DamagedError
from moai.core.fsops import read_regular
from moai.prepared.manifest import read_manifest

_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Reach:
    """What the receipts, plans and manifests that stay speak of."""

    contents: frozenset[str]
    """Digests of ranges that finished shards were made of."""
    transforms: frozenset[str]
    tokenizers: frozenset[str]
    """sha256 of tokenizer.json, or its beginning."""

    @classmethod
    def of(
        cls, cache: Path, *, shards: Iterable[str], directories: Iterable[Path], plans: Iterable[Mapping[str, Any]]
    ) -> Reach:
        receipts = [receipt for key in shards if (receipt := Ledger(cache).receipt(key))]
        tokenizers = {receipt.made_by.get("tokenizer_sha256", "") for receipt in receipts}
        tokenizers |= {str(record["fields"]["tokenizer"].get("tokenizer_sha256", "")) for record in plans}
        for directory in directories:
            with contextlib.suppress(DamagedError):
                tokenizers.add(read_manifest(directory)["content"]["tokenizer_digest"])
        return cls(
            frozenset(receipt.raw.digest for receipt in receipts),
            frozenset(receipt.transform_key for receipt in receipts),
            frozenset(tokenizers),
        )

    def useless(self, cache: Path) -> Iterator[tuple[str, list[Path]]]:
        """Records by kind that serve nothing of this, and those that are none."""
        yield "digests of input of which no finished shard is left", self._ranges(cache)
        yield (
            "records of transforms of which no finished shard is left",
            [path for path in records_in(cache / "transforms") if path.stem not in self.transforms],
        )
        verdicts = [path for path in records_in(cache / "distrusted") if not self._is_judged(path)]
        yield "verdicts on tokenizer backends with whose tokenizer nothing here was made", verdicts

    def _ranges(self, cache: Path) -> list[Path]:
        """The ends of a stream's ranges are used only where the digest of each of them is known: each must be of a size
        that a kept one has.
        """
        paths = [path for folder in listed(cache / "ranges") for path in records_in(folder)]
        records = {path: Ledger(cache).known(path.stem) or {} for path in paths}
        kept = {path for path, record in records.items() if record.get("digest") in self.contents}
        sizes = {tuple(records[path]["bytes"]) for path in kept}
        for path, record in records.items():
            ends = record.get("ends")
            if ends and all((end - start,) in sizes for start, end in zip([0, *ends], ends)):
                kept.add(path)
        return [path for path in paths if path not in kept]

    def _is_judged(self, path: Path) -> bool:
        """By a verdict that is one, and over a tokenizer that is still there."""
        try:
            wrong = str(json.loads(read_regular(path, _MOST_BYTES))["made_by"]["tokenizer_sha256"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return False
        return bool(wrong) and any(digest.startswith(wrong) for digest in self.tokenizers)


def listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def records_in(folder: Path) -> list[Path]:
    """Finished JSON files, links and everything that may not be read left out."""
    return [
        path
        for path in listed(folder)
        if path.suffix == ".json" and not path.name.startswith(".") and path.is_file() and not path.is_symlink()
    ]
